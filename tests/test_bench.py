"""The benchmark's own promises: everyone in turns, nobody wrong, pages that say what was run."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from sigma_cli.bench import lines, page, rich_table

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import oracle
import shapes
from race import OURS, Race, first_calls, record


def test_everyone_runs_once_a_round_in_turns():
    ran = []
    clock = itertools.count().__next__
    race = Race(
        {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, rounds=20, limits={"b": 3}, clock=clock
    )
    for _ in range(20):
        race.until_ours()
        ran.append(OURS)
    race.finish()
    assert [ran.count(name) for name in (OURS, "a", "b")] == [20, 20, 3]
    assert race.times == {"a": [1] * 20, "b": [1] * 3}
    assert {tuple(ran[i : i + 2]) for i in range(9, 43, 2)} == {(OURS, "a"), ("a", OURS)}, "the order changes"


def test_a_wrong_candidate_ends_the_race_and_bounds_are_not_asked():
    def check(who, result):
        assert result == 1, who

    first_calls({"right": lambda: 1, "bound_dense": lambda: 2}, check)
    with pytest.raises(AssertionError, match="wrong"):
        first_calls({"right": lambda: 1, "wrong": lambda: 2}, check)


def test_those_too_slow_are_timed_in_their_first_call():
    clock = itertools.count().__next__
    assert first_calls({"slow": lambda: 1, "fast": lambda: 1}, None, {"slow"}, clock) == {"slow": [1]}


def test_the_oracle_knows_right_from_slightly_wrong():
    shape = shapes.Shape("test", E=4, k=2, H=64, I=32, T=50)
    x, weights, gate_up, down = shapes.layer_inputs(shape, torch.float32)
    index = shapes.choices(shape, "zipf")
    want = oracle.layer(x, weights, gate_up, down, index, torch.ones(50, 64))
    doubles = oracle.layer(
        *(t.double() for t in (x, weights, gate_up, down)), index, torch.ones(50, 64).double()
    )
    oracle.assert_agrees("same", want, [t.float() for t in doubles], shape.H)
    wrong = want[0].clone()
    wrong[3, 5] += 0.01 * want[0].abs().max()
    with pytest.raises(AssertionError, match="them: output 0 is off by"):
        oracle.assert_agrees("them", [wrong], want[:1], shape.H)


def test_the_page_names_command_environment_and_ratios(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
    race = {
        "group": "layer/forward/f32", "shape": "A", "load": "balanced", "memory": "", "flops": 2e9, "moved": 1e9,
        "candidates": [record("sigma", [0.1]), record("bound_dense", [0.05]), record("peer", [0.3, 0.2, 0.4])],
    }  # fmt: skip
    text = page([race], "sigma bench forward", 2)
    assert "`MALLOC_TOP_PAD_=7 sigma bench forward`" in text
    assert "| peer | 300.0 | 200.0 | 3 | 3.00 | 7 | 3.3 |" in text
    assert [row[0] for row in lines(race)] == ["sigma", "bound: dense", "peer"]
    assert rich_table(race).row_count == 3
