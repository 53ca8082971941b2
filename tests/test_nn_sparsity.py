"""Schedules of the number of experts a token goes to."""

import json
import re
import tomllib

import pytest

from sigma_kernels.nn import Phase, SparsitySchedule

EARLY = (8, 8, 6, 6, 4, 4, 2, 2)
RAMPED = SparsitySchedule([(0, [8, 4, 1]), (0.5, [2, 1, 1], 0.8), (95, [2, 1, 3])], steps=100)


@pytest.mark.parametrize(
    "switch, steps, at", [(0.9, 1000, 900), (900, None, 900), (0.07, 100, 7), (0.29, 100, 29)]
)
def test_the_published_schedule_switches_once(switch, steps, at):
    """Defends: the step of the switch, of a share too, whose product with the steps is not the integer meant."""
    schedule = SparsitySchedule.sigma_moe_tiny(56, switch, steps)
    assert schedule.top_k(0) == schedule.top_k(at - 1) == EARLY + (1,) * 48
    assert schedule.top_k(at) == schedule.top_k(10**9) == (1,) * 56
    assert sum(schedule.top_k(0)) - 56 == 32
    assert SparsitySchedule.sigma_moe_tiny(3, switch, steps).top_k(0) == (8, 8, 6)


def test_a_ramp_falls_by_ones_spread_evenly_to_its_end():
    ks = [RAMPED.top_k(step) for step in range(120)]
    assert set(ks[:50]) == {(8, 4, 1)}
    first = {k: step for step, (k, *_) in reversed(list(enumerate(ks)))}
    assert first == {8: 0, 7: 55, 6: 60, 5: 65, 4: 70, 3: 75, 2: 80}
    assert [ks[step][1] for step in (59, 60, 69, 70, 79, 80)] == [4, 3, 3, 2, 2, 1]
    assert ks[94] == (2, 1, 1)
    assert set(ks[95:]) == {(2, 1, 3)}
    for of_layer in list(zip(*ks[:95], strict=True)):
        assert list(of_layer) == sorted(of_layer, reverse=True)


def test_a_ramp_may_rise_and_be_shorter_than_its_fall():
    rising = SparsitySchedule([(0, [1]), (10, [4], 16)])
    assert [rising.top_k(step)[0] for step in range(9, 18)] == [1, 1, 1, 2, 2, 3, 3, 4, 4]
    steep = SparsitySchedule([(0, [8]), (10, [1], 12)])
    assert [steep.top_k(step)[0] for step in range(9, 14)] == [8, 8, 5, 1, 1]


@pytest.mark.parametrize("steps", range(3, 60))
def test_a_phase_may_begin_where_a_ramp_ends_whatever_the_steps(steps):
    """Defends: shares that round apart, each by itself the same."""
    schedule = SparsitySchedule([(0, [4]), (0.25, [2], 0.75), (0.75, [1])], steps=steps)
    ks = [schedule.top_k(step)[0] for step in range(steps)]
    assert ks == sorted(ks, reverse=True)
    assert ks[round(0.75 * steps)] == 1


def test_json_and_toml_hold_it():
    assert SparsitySchedule.from_dict(json.loads(json.dumps(RAMPED.to_dict()))) == RAMPED
    plain = SparsitySchedule.sigma_moe_tiny(4, 10)
    assert plain.to_dict() == {
        "phases": [{"begin": 0, "top_k": [8, 8, 6, 6]}, {"begin": 10, "top_k": [1, 1, 1, 1]}]
    }
    text = """
        steps = 100
        [[phases]]
        begin = 0
        top_k = [8, 4, 1]
        [[phases]]
        begin = 0.5
        top_k = [2, 1, 1]
        ramp_end = 0.8
        [[phases]]
        begin = 95
        top_k = [2, 1, 3]
    """
    assert SparsitySchedule.from_dict(tomllib.loads(text), num_experts=8) == RAMPED


def test_equal_where_the_fields_are():
    same = SparsitySchedule((Phase(0, (4, 2)), Phase(10, (1, 1))))
    assert same == SparsitySchedule([(0, [4, 2]), (10, [1, 1])], num_experts=96)
    assert hash(same) == hash(SparsitySchedule([[0, (4, 2)], [10, (1, 1), None]]))
    assert same != SparsitySchedule([(0, [4, 2]), (11, [1, 1])])
    assert same.num_layers == 2


def of(*phases, **kwargs):
    return lambda: SparsitySchedule(phases, **kwargs)


@pytest.mark.parametrize(
    "call, kind, told",
    [
        (of(), ValueError, "phases must not be empty"),
        (lambda: SparsitySchedule(7), TypeError, "phases must be a list, found 7"),
        (of((0, [97]), num_experts=96), ValueError, "phases[0].top_k[0] must lie in 1..96, found 97"),
        (of((0, [1, 0])), ValueError, "phases[0].top_k[1] must be at least 1, found 0"),
        (of((0, [2.0])), TypeError, "phases[0].top_k[0] must be an integer, found 2.0"),
        (of((0, [True])), TypeError, "phases[0].top_k[0] must be an integer, found True"),
        (of((0, [])), ValueError, "phases[0].top_k must not be empty"),
        (of((0, 8)), TypeError, "phases[0].top_k must be a list, found 8"),
        (of((0, [2, 2]), (5, [1])), ValueError,
         "phases[1].top_k must have 2 entries, one a layer as in phases[0], found 1"),
        (of((1, [2])), ValueError, "phases[0] must begin at step 0 without a ramp, found 1 and ramp_end 1"),
        (of((0, [2], 5)), ValueError, "phases[0] must begin at step 0 without a ramp, found 0 and ramp_end 5"),
        (of((0, [2]), (5, [3]), (5, [1])), ValueError, "phases[2].begin must be at least step 6, found step 5"),
        (of((0, [2]), (5, [3], 9), (8, [1])), ValueError, "phases[2].begin must be at least step 9, found step 8"),
        (of((0, [2]), (5, [1], 4)), ValueError, "phases[1].ramp_end must not come before step 5, found step 4"),
        (of((0, [2]), (0.5, [1])), ValueError, "steps must be given where phases[1] has a share of them, 0.5"),
        (of((0, [2]), (1.5, [1]), steps=9), ValueError,
         "phases[1].begin must be a share in 0..1 where it is a float, found 1.5"),
        (of((0, [2]), (-5, [1])), ValueError, "phases[1].begin must be at least 0, found -5"),
        (of((0, [2]), (0.1, [1]), steps=4), ValueError, "phases[1].begin must be at least step 1, found step 0"),
        (of((0, [2]), steps=0), ValueError, "steps must be at least 1, found 0"),
        (of((0,)), ValueError, "phases[0] must be (begin, top_k) or (begin, top_k, ramp_end), found (0,)"),
        (of({"begin": 0}), ValueError, "phases[0] must have the key 'top_k'"),
        (of({"begin": 0, "top_k": [1], "topk": 1}), ValueError,
         "phases[0] must have no key 'topk'; it knows ['begin', 'ramp_end', 'top_k']"),
        (lambda: SparsitySchedule.from_dict({"phases": [], "step": 3}), ValueError,
         "data must have no key 'step'; it knows ['phases', 'steps']"),
        (lambda: SparsitySchedule.from_dict({}), ValueError, "data must have the key 'phases'"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, kind, told):
    with pytest.raises(kind, match=f"^SparsitySchedule: {re.escape(told)}$"):
        call()


@pytest.mark.parametrize("step, kind", [(-1, ValueError), (1.0, TypeError)])
def test_a_step_is_an_integer_from_0(step, kind):
    with pytest.raises(kind, match=r"^SparsitySchedule.top_k: step must be "):
        RAMPED.top_k(step)
