"""train.init_from: a new run begins with the weights of a checkpoint."""

import forked
import pytest
import rank_faults
import torch
from sigma_train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from sigma_train.config import ConfigError
from sigma_train.loop import Trainer
from sigma_train.metrics import read_metrics

SMALL = ["data.max_bytes=200000", "train.batch_size=2", "train.steps=3", "train.save_every=4"]


@pytest.fixture
def base(make_trainer):
    trainer = make_trainer("base")
    trainer.run()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in read_metrics(trainer.out / "metrics.jsonl") if "loss" in row]


def test_a_run_begins_with_the_weights_alone(base, make_trainer):
    """Defends: weights of the new seed left in place, a step or moments taken over unasked."""
    new = make_trainer("new", f"train.init_from={base.out}", "train.seed=1")
    old = base.model.state_dict()
    assert all(torch.equal(x, old[name]) for name, x in new.model.state_dict().items())
    assert (new.step, new.tokens_seen) == (0, 0)
    assert not new.optimizer.state
    new.run()
    assert len(losses(new)) == 3


def test_moments_come_where_they_are_asked_for(base, make_trainer):
    """Defends: moments of another parameter, or none."""
    new = make_trainer("new", f"train.init_from={base.checkpoints}", "train.init_optimizer=true")
    pairs = list(zip(new.optimizer.param_groups, base.optimizer.param_groups, strict=True))
    assert len(pairs) == 4
    for mine, theirs in pairs:
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(new.optimizer.state[p]["exp_avg"], base.optimizer.state[q]["exp_avg"])
            assert new.optimizer.state[p]["exp_avg"].any()


def test_a_run_that_goes_on_reads_its_own_checkpoint(base, make_trainer, tmp_path):
    """Defends: a restart that begins with the given weights again, or that wants them to be there still."""
    settings = (f"train.init_from={latest_checkpoint(base.checkpoints)}", "train.save_every=2")
    whole = make_trainer("whole", *settings)
    whole.run()
    (whole.checkpoints / "step-00000003").rename(tmp_path / "last")
    base.checkpoints.rename(tmp_path / "gone")
    again = make_trainer("whole", *settings, resume=True)
    assert again.step == 2
    again.run()
    want = load_checkpoint(tmp_path / "last").model_state
    got = load_checkpoint(latest_checkpoint(again.checkpoints)).model_state
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "settings, error, told",
    [
        (("train.init_from={out}/nothing",), CheckpointError, "must be a run or a checkpoint, found neither"),
        (("train.init_from={out}", "model.num_experts=7"), CheckpointError, "has shape"),
        (("train.init_from={out}", "data.max_bytes=100000"), ConfigError, "another text"),
        (
            ("train.init_from={out}", "data.val_fraction=0.3"),
            ConfigError,
            r"held out other text: data.val_fraction was .* and is 0.3$",
        ),
        (("train.init_optimizer=true",), ConfigError, "train.init_optimizer wants train.init_from"),
    ],
)
def test_what_does_not_fit_is_told(base, make_trainer, settings, error, told):
    """Defends: a run that silently begins with what it would have had anyway."""
    with pytest.raises(error, match=told):
        make_trainer("new", *(text.format(out=base.out) for text in settings))


def test_text_held_out_language_by_language_is_another(make_trainer, tmp_path):
    """Defends: validation on text that the weights were trained on, and another vocabulary."""
    for name in ("aa", "bb"):  # two documents each
        content = torch.tensor(list(b"abcdef\n"))[torch.randint(7, (72_000,))]
        (tmp_path / f"{name}.txt").write_bytes(bytes(content.tolist()))
    text = (f"data.paths=['{tmp_path}/*.txt']", "train.steps=1")
    base = make_trainer("base", *text)
    base.run()
    with pytest.raises(ConfigError, match=r"held out other text: data.languages was False and is True$"):
        make_trainer("new", *text, f"train.init_from={base.out}", "data.languages=true")


def test_two_ranks_begin_as_one_does(base, make_trainer, tmp_path, cache):
    """Defends: each rank with another part, experts out of order."""
    begun = ("train.steps=1", "train.threads=1", f"train.init_from={base.out}")
    one, two = make_trainer("one", *begun), tmp_path / "two"
    one.run()
    args = ["train", "--preset", "smoke", "--out", str(two)]
    for setting in (*SMALL, "train.batch_size=1", *begun):
        args += ["--set", setting]
    assert [result.returncode for result in forked.on_ranks(2, args, cache, rank_faults.nothing)] == [0, 0]
    first = next(row["loss"] for row in read_metrics(two / "metrics.jsonl") if "loss" in row)
    assert first == pytest.approx(losses(one)[0], rel=1e-5)
