"""What k over the run and all statistics of routing cost ten steps of the trainer, against the same steps without.

Schedule and sampler give the k that the model has anyway, so that the work is the same; one step of ten is looked at.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sigma_train.config import Config, load_config
from sigma_train.expert_counts import ExpertCounts
from sigma_train.loop import Trainer

PRESET, STEPS = "tiny-96", 10
METHODS = {
    "schedule": "sparsity.phases=[[0, [1, 1, 1, 1]], [0.5, [1, 1, 1, 1]]]",
    "sampler": "sparsity.sample=[1]",
}


def settings(out: Path, *more: str) -> Config:
    own = [f"train.out={out}", f"train.threads={torch.get_num_threads()}", "train.steps=1000000"]
    return load_config(PRESET, None, [*own, "data.max_bytes=3000000", "guard.spike=1e9", *more])


@pytest.mark.parametrize("method", METHODS)
def test_train_step_with_methods(race, device, tmp_path, method):
    if device.type != "cpu":
        pytest.skip("the trainer runs on a CPU")
    (tmp_path / "run").mkdir()
    plain = ExpertCounts(settings(tmp_path / "run"))
    trainer = Trainer(settings(tmp_path / "run", METHODS[method]), Console(quiet=True), False)
    with_method = trainer.one_step.experts
    t, m = trainer.config.train, trainer.config.model

    def steps(experts: ExpertCounts, every: int) -> Callable[[], list[bool]]:
        """The next ten; which of them were looked at."""

        def run() -> list[bool]:
            trainer.one_step.experts, trainer.layers.every, looked = experts, every, []
            for _ in range(STEPS):
                row = trainer._train_step()
                trainer.step += 1
                trainer._record(**row)
                looked.append("layers" in row)
            return looked

        return run

    def check(who: str, looked: list[bool]) -> None:
        assert looked == [False] * (STEPS - 1) + [True], who

    race(
        f"train_step_with_methods/{method}",
        steps(with_method, STEPS),
        shape=f"{m.num_layers} layers, E{m.num_experts} k1 H{m.hidden_size}, "
        f"{STEPS} x {t.batch_size} x {t.seq_len} tokens",
        check=check,
        limits={"bound_without": 1 << 30},  # as many rounds as ours, though slow
        bound_without=steps(plain, 0),
    )
    trainer.metrics.close()
    trainer.saver.close()
