"""What `guard.stats_every` costs a step of the trainer: preset tiny-96 with statistics of each layer and without.

The whole step, its row in metrics.jsonl and on the board included, again and again on the first batch.
"""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from sigma_train.config import load_config
from sigma_train.loop import Trainer

PRESET = "tiny-96"


@pytest.mark.keeps_memory
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_train_step_with_layer_statistics(race, device, tmp_path, dtype):
    if device.type != "cpu":
        pytest.skip("the trainer runs on a CPU")
    (tmp_path / "run").mkdir()
    settings = [f"train.out={tmp_path / 'run'}", f"train.dtype={dtype}", "data.max_bytes=3000000"]
    settings += [f"train.threads={torch.get_num_threads()}", "guard.spike=1e9"]
    trainer = Trainer(load_config(PRESET, None, settings), Console(quiet=True), False)
    t, m = trainer.config.train, trainer.config.model

    def step(every: int) -> Callable[[], bool]:
        """The first step, of which statistics are due with 1 and not with 2; whether there are any."""

        def run() -> bool:
            trainer.layers.every = every
            row = trainer._train_step()
            trainer._record(**row)
            return "layers" in row

        return run

    def check(who: str, has_statistics: bool) -> None:
        assert has_statistics, who

    race(
        f"train_step_with_layer_statistics/{dtype}",
        step(1),
        shape=f"{m.num_layers} layers, E{m.num_experts} k1 H{m.hidden_size}, {t.batch_size} x {t.seq_len} tokens",
        check=check,
        bound_without=step(0),
        beside_not_due=step(2),
    )
    trainer.metrics.close()
