"""`train.place_every`: experts move between ranks while a run goes on, and the run is the one in which they stay."""

import pytest
import rank_faults as faults
import torch
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint
from sigma_train.config import TrainConfig
from sigma_train.generate import load_run
from sigma_train.placing import Placing
from test_train_checkpoint import codes, resumed_at, rows, run

from sigma_kernels.distributed import balanced_placement, rank_load


def test_experts_that_move_are_those_that_stay_bit_for_bit(cache, tmp_path):
    """Defends: rows, moments or choices that go to another expert; a run that was stopped and decides by what it has
    seen since; a rollback that takes the rows of the checkpoint and leaves the places as they were; whole models that
    have experts in the order of places.
    """
    still, moves = tmp_path / "still", tmp_path / "moves"
    common = [
        "optim.grad_clip=1e9",
        "guard.on_nonfinite=rollback",
    ]  # not cut: the norm is summed in another order
    results = run(2, still, cache, *common, steps=7, fault=faults.goes_back_past_a_placement)
    assert codes(results) == [0, 0], results
    placed = [*common, "train.place_every=1"]
    results = run(2, moves, cache, *placed, "train.time_budget_s=1e-9", steps=7)
    assert codes(results) == [0, 0], results
    results = run(2, moves, cache, *placed, steps=7, fault=faults.goes_back_past_a_placement)
    assert codes(results) == [0, 0], results
    assert resumed_at(results) == 1
    assert "back from step 5 to 2" in results[0].stdout
    for name in ("loss", "load", "val_bits_per_byte"):
        assert rows(moves, name) == rows(still, name), name
    assert_decided_by_the_load_since_the_last_time(moves)
    ends = [load_checkpoint(latest_checkpoint(run / "checkpoints")) for run in (still, moves)]
    for want, got in zip(*((end.model_state | end.optim_state).items() for end in ends), strict=True):
        assert got[0] == want[0]
        assert torch.equal(got[1], want[1]), got[0]
    _, model, _ = load_run(moves)
    assert all(torch.equal(x, ends[0].model_state[name]) for name, x in model.named_parameters())
    assert rows(still, "experts_moved") == {}


def assert_decided_by_the_load_since_the_last_time(out):
    """Of two steps, on two ranks."""
    loads, told = rows(out, "load"), rows(out, "rank_load")
    places = [torch.arange(8)] * 2
    assert told.keys() == {2, 4, 6}
    for step in told:
        seen = [loads[s] for s in (step - 1, step) if s in loads]
        since = torch.tensor(seen).sum(0)
        want = max(float(rank_load(x, 2, p).max() / x.sum() * 2) for x, p in zip(since, places, strict=True))
        assert told[step] == pytest.approx(want)
        former = places
        places = [balanced_placement(x, 2, p) for x, p in zip(since, former, strict=True)]
        moved = sum(int((a != b).sum()) for a, b in zip(former, places, strict=True))
        assert rows(out, "experts_moved")[step] == moved > 0
        assert rows(out, "bytes_moved")[step] == moved * 3 * 64 * 64 * 4 * 3, "weights and two moments"
        after = max(float(rank_load(x, 2, p).max() / x.sum() * 2) for x, p in zip(since, places, strict=True))
        assert rows(out, "rank_load_placed")[step] == pytest.approx(after)


@pytest.mark.parametrize(
    "every, step, is_due",
    [(0, 10, False), (1, 10, True), (1, 15, False), (2, 10, False), (2, 20, True), (2, 40, False)],
)
def test_due_at_every_nth_checkpoint_but_the_last(every, step, is_due):
    config = TrainConfig(place_every=every, save_every=10, steps=40)
    assert Placing(config).is_due(step) == is_due
