"""What `train.noise` costs a step of the trainer on one rank: presets smoke and tiny-96, recorded and not.

The whole step as the loop makes it, its row in metrics.jsonl included, again and again on the first batch.
"""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from sigma_train.config import load_config
from sigma_train.loop import Trainer
from sigma_train.step_noise import LOG, NoRecord


@pytest.mark.keeps_memory
@pytest.mark.parametrize("preset", ["smoke", "tiny-96"])
def test_train_step_with_noise(race, device, tmp_path, preset):
    if device.type != "cpu":
        pytest.skip("the trainer runs on a CPU")
    (tmp_path / "run").mkdir()
    settings = [f"train.out={tmp_path / 'run'}", "data.max_bytes=3000000", "train.noise=true"]
    settings += [f"train.threads={torch.get_num_threads()}", "guard.spike=1e9"]
    trainer = Trainer(load_config(preset, None, settings), Console(quiet=True), False)
    recording, silent = trainer.noise, NoRecord()
    recording.watch(trainer.model, None)
    t, m = trainer.config.train, trainer.config.model

    def step(noise: NoRecord) -> Callable[[], bool]:
        """Whether the step is in the record."""

        def run() -> bool:
            before = len(recording._recorder)
            trainer.noise = trainer.one_step.noise = noise
            noise.begin_step(1)
            row = trainer._train_step()
            noise.turn(LOG)
            trainer._record(**row)
            noise.end_step()
            return len(recording._recorder) > before

        return run

    def check(who: str, is_recorded: bool) -> None:
        assert is_recorded, who

    race(
        f"train_step_with_noise/{preset}",
        step(recording),
        shape=f"{m.num_layers} layers, E{m.num_experts} k1 H{m.hidden_size}, {t.batch_size} x {t.seq_len} tokens",
        check=check,
        bound_without=step(silent),
    )
    recording.close()
    trainer.metrics.close()
    trainer.saver.close()
