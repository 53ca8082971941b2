"""Expert parallelism on two and four ranks over gloo: what tests/ranks.py asserts on every one of them."""

import pytest
import ranks
import torch
import torch.multiprocessing as mp

import sigma_kernels as sk

CHECKS = {  # by ranks; those of a number share its processes, whose start takes longer than they do
    2: ("layer", "crowded", "chunks", "payloads", "refused"),
    4: ("layer", "order", "visits", "limited", "group_of_two"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", CHECKS)
def test_on_ranks(tmp_path, size):
    mp.spawn(ranks.run, (CHECKS[size], size, str(tmp_path / "store")), nprocs=size)


def test_without_a_process_group_it_says_so():
    routing = sk.route(torch.randn(4, 8))
    for call in (
        lambda: sk.distributed.dispatch(torch.randn(4, 8), routing),
        lambda: sk.distributed.ExpertParallelMoE(16, 8, 4),
    ):
        with pytest.raises(
            RuntimeError, match=r"no process group; call torch\.distributed\.init_process_group"
        ):
            call()
