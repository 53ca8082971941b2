"""What k over the run and all statistics of routing cost ten steps of the trainer, against the same work without.

Schedule and sampler have another k at nearly every step.  The steps without have the same k of each layer, known before
and one after another; one step of ten is looked at.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sigma_train.config import Config, load_config
from sigma_train.expert_counts import ExpertCounts
from sigma_train.loop import Trainer

PRESET, STEPS, LAYERS = "tiny-96", 10, 4
PHASES = [[step, [1 + step % 2] * LAYERS] for step in range(STEPS)]
METHODS = {
    "schedule": [f"sparsity.phases={PHASES}", "model.top_k=2"],
    "sampler": ["sparsity.sample=[1, 2]"],
}


class EveryTen(ExpertCounts):
    """Those of the first ten steps, over and over, as the method finds them each time."""

    def of_step(self, step: int) -> tuple[int, ...]:
        return super().of_step(step % STEPS)

    def of_batch(self, step: int, micro: int) -> tuple[int, ...]:
        return super().of_batch(step % STEPS, micro)


class OneAfterAnother:
    """The same k of each layer in ten steps, sorted."""

    def __init__(self, experts: ExpertCounts) -> None:
        drawn = [experts.of_batch(step, 0) for step in range(STEPS)]
        self.ks = list(zip(*map(sorted, zip(*drawn, strict=True)), strict=True))

    def of_step(self, step: int) -> tuple[int, ...]:
        return self.ks[step % STEPS]

    def of_batch(self, step: int, micro: int) -> tuple[int, ...]:
        return self.of_step(step)


def settings(out: Path, *more: str) -> Config:
    own = [f"train.out={out}", f"train.threads={torch.get_num_threads()}", "train.steps=1000000"]
    return load_config(PRESET, None, [*own, "data.max_bytes=3000000", "guard.spike=1e9", *more])


@pytest.mark.keeps_memory
@pytest.mark.parametrize("method", METHODS)
def test_train_step_with_methods(race, device, tmp_path, method):
    if device.type != "cpu":
        pytest.skip("the trainer runs on a CPU")
    (tmp_path / "run").mkdir()
    config = settings(tmp_path / "run", *METHODS[method])
    trainer = Trainer(config, Console(quiet=True), False)
    with_method = EveryTen(config)
    without = OneAfterAnother(with_method)
    t, m = trainer.config.train, trainer.config.model

    def steps(experts: ExpertCounts | OneAfterAnother, every: int) -> Callable[[], list[bool]]:
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
        shape=f"{m.num_layers} layers, E{m.num_experts} k1-2 H{m.hidden_size}, "
        f"{STEPS} x {t.batch_size} x {t.seq_len} tokens",
        check=check,
        note="one step of ten is looked at; what a look costs: docs/routing-metrics.md",
        limits={"bound_without": 1 << 30},  # as many rounds as ours, though slow
        bound_without=steps(without, 0),
    )
    trainer.metrics.close()
    trainer.saver.close()
