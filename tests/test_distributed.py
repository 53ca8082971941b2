"""Expert parallelism on two and four ranks over gloo: what tests/ranks.py asserts on every one of them."""

import pytest
import ranks
import torch
import torch.multiprocessing as mp

import sigma_kernels as sk

CASES = [
    ("layer", 2),
    ("layer", 4),
    ("crowded", 2),
    ("order", 4),
    ("visits", 4),
    ("limited", 4),
    ("chunks", 2),
    ("payloads", 2),
    ("group_of_two", 4),
]
CASES += [("refused", 2)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("check, size", CASES, ids=str)
def test_on_ranks(tmp_path, check, size):
    mp.spawn(ranks.run, (check, size, str(tmp_path / "store")), nprocs=size)


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
