"""Draws of the number of experts a token goes to."""

import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from scipy.stats import chisquare

from sigma_kernels.nn import ExpertCountSampler
from sigma_kernels.nn.expert_count import within_budget

LAYERWISE = ExpertCountSampler([1, 2, 3, 4, 5, 6], seed=7)


def test_draws_are_these():
    """Defends: another process, numpy, platform or way to count, with which a run would go on with other draws."""
    assert LAYERWISE.sample(0, 0, 8) == (6, 2, 3, 3, 1, 5, 2, 4)
    assert LAYERWISE.sample(3, 1, 8) == (1, 3, 4, 1, 3, 1, 3, 6)
    last = ExpertCountSampler([1, 2, 4, 8], "micro-batch", "capacity", 2.0, seed=2**64 - 1)
    assert [last.sample(2**64 - 1, micro, 1)[0] for micro in range(8)] == [8, 8, 2, 4, 1, 4, 8, 8]
    of_steps = ExpertCountSampler([1, 2, 4, 8], "global")
    assert [of_steps.sample(step, 9, 1)[0] for step in range(8)] == [1, 2, 8, 2, 8, 8, 8, 8]


def test_a_draw_depends_on_its_place_alone():
    """Defends: state, orders of calls, ranks that hold fewer layers."""
    places = [(step, micro) for step in range(20) for micro in range(3)]
    want = {place: LAYERWISE.sample(*place, 8) for place in places}
    random.Random(0).shuffle(places)
    again = ExpertCountSampler([1, 2, 3, 4, 5, 6], seed=7)
    assert {place: again.sample(*place, 8) for place in places} == want
    assert all(again.sample(*place, 3) == want[place][:3] for place in places)
    assert len(set(want.values())) == len(places)
    assert ExpertCountSampler([1, 2, 3, 4, 5, 6], seed=8).sample(3, 1, 8) != want[3, 1]


def test_granularity_says_what_shares_a_draw():
    step_wise = ExpertCountSampler(range(1, 7), "global")
    batch_wise = ExpertCountSampler(range(1, 7), "micro-batch")
    for sampler in (step_wise, batch_wise):
        assert all(len(set(sampler.sample(step, 1, 8))) == 1 for step in range(50))
    of_step = [{step_wise.sample(step, micro, 8) for micro in range(4)} for step in range(50)]
    assert all(len(found) == 1 for found in of_step)
    assert len(set.union(*of_step)) == 6
    assert len({batch_wise.sample(0, micro, 8) for micro in range(50)}) == 6


@pytest.mark.parametrize("granularity", ["global", "micro-batch", "layer"])
@pytest.mark.parametrize(
    "distribution, temperature", [("uniform", 1.0), ("capacity", 1.0), ("capacity", 0.5)]
)
def test_draws_have_their_distribution(granularity, distribution, temperature):
    """6,000 draws with a fixed seed, over steps, micro-batches and layers as far as they differ."""
    sampler = ExpertCountSampler(range(1, 7), granularity, distribution, temperature, seed=1)
    micros, layers = {"global": (1, 1), "micro-batch": (4, 1), "layer": (4, 10)}[granularity]
    drawn = Counter(
        k
        for step in range(6000 // (micros * layers))
        for micro in range(micros)
        for k in sampler.sample(step, micro, layers)
    )
    found = [drawn[k] for k in sampler.top_k]
    assert chisquare(found, [6000 * p for p in sampler.probabilities]).pvalue > 0.01
    assert chisquare(found, [1000 * k for k in (3.2, 2.4, 1.6, 0.8, 0.4, 0.2)], sum_check=False).pvalue < 1e-9


def test_layers_and_steps_are_independent():
    """Defends: draws of neighbours that go together: each pair of values is as frequent as any."""
    sampler = ExpertCountSampler(range(1, 5))
    ks = [sampler.sample(step, 0, 2) for step in range(4001)]
    for pairs in (Counter(ks[1:]), Counter((a[0], b[0]) for a, b in pairwise(ks))):
        assert chisquare([pairs[a, b] for a in range(1, 5) for b in range(1, 5)]).pvalue > 0.01


def test_probabilities_by_hand():
    assert ExpertCountSampler([2, 4, 8]).probabilities == (1 / 3,) * 3
    assert ExpertCountSampler(range(1, 5), distribution="capacity").probabilities == (0.1, 0.2, 0.3, 0.4)
    squares = ExpertCountSampler(range(1, 5), distribution="capacity", temperature=0.5).probabilities
    assert squares == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30])
    assert ExpertCountSampler(range(1, 5), distribution="capacity", temperature=1e-9).probabilities[-1] == 1
    assert ExpertCountSampler([3], distribution="capacity").sample(5, 5, 4) == (3, 3, 3, 3)


def test_expected_k_by_hand():
    """What a run pays on average: sum of k P(k)."""
    means = {1.0: 3.0, 0.5: 10 / 3, 1e9: 2.5}
    for temperature, want in means.items():
        sampler = ExpertCountSampler(range(1, 5), distribution="capacity", temperature=temperature)
        found = sum(k * p for k, p in zip(sampler.top_k, sampler.probabilities, strict=True))
        assert found == pytest.approx(want)


def test_a_budget_by_hand():
    """The largest first, of equal ones the lowest layer's; to the next smaller that may be drawn."""
    assert within_budget([4, 4, 1, 3], 10, (1, 2, 3, 4)) == (3, 3, 1, 3)
    assert within_budget([4, 4, 1, 3], 12, (1, 2, 3, 4)) == (4, 4, 1, 3)
    assert within_budget([4, 4, 1, 3], 4, (1, 2, 3, 4)) == (1, 1, 1, 1)
    assert within_budget([8, 2, 8], 13, (2, 4, 8)) == (4, 2, 4)
    with pytest.raises(ValueError, match="budget must be at least 8, 2 in each of 4 layers, found 7"):
        within_budget([4, 4, 2, 3], 7, (2, 3, 4))


def test_draws_keep_to_the_budget():
    """Defends: draws that are thrown away and drawn again, which would make a law of its own of those within."""
    free, bound = (ExpertCountSampler(range(1, 7), seed=3, budget=budget) for budget in (None, 20))
    for step in range(200):
        drawn, kept = free.sample(step, 0, 8), bound.sample(step, 0, 8)
        assert kept == within_budget(drawn, 20, range(1, 7))
        assert sum(kept) == min(20, sum(drawn))
    with pytest.raises(ValueError, match="budget must be at least 21, 1 in each of 21 layers, found 20"):
        bound.sample(0, 0, 21)


@pytest.mark.parametrize(
    "call, kind, told",
    [
        (lambda: ExpertCountSampler([]), TypeError, "top_k must be a list of one integer or more, found []"),
        (lambda: ExpertCountSampler(4), TypeError, "top_k must be a list of one integer or more, found 4"),
        (lambda: ExpertCountSampler([0, 1]), ValueError, "top_k[0] must be at least 1, found 0"),
        (lambda: ExpertCountSampler([1, 3, 3]), ValueError, "top_k[2] must be at least 4, found 3"),
        (lambda: ExpertCountSampler([1.0]), TypeError, "top_k[0] must be an integer, found 1.0"),
        (lambda: ExpertCountSampler([1], "batch"), ValueError,
         "granularity must be 'global', 'micro-batch' or 'layer', found 'batch'"),
        (lambda: ExpertCountSampler([1], "layer", "log"), ValueError,
         "distribution must be 'uniform' or 'capacity', found 'log'"),
        (lambda: ExpertCountSampler([1], temperature=0), ValueError,
         "temperature must be a finite number above 0, found 0"),
        (lambda: ExpertCountSampler([1], temperature="1"), ValueError,
         "temperature must be a finite number above 0, found '1'"),
        (lambda: ExpertCountSampler([1], seed=-1), ValueError, f"seed must lie in 0..{2**64 - 1}, found -1"),
        (lambda: ExpertCountSampler([2, 4], budget=1), ValueError, "budget must be at least 2, found 1"),
        (lambda: ExpertCountSampler([1], "global", budget=8), ValueError,
         "budget needs the granularity 'layer', found 'global'"),
        (lambda: LAYERWISE.sample(-1, 0, 1), ValueError, f"step must lie in 0..{2**64 - 1}, found -1"),
        (lambda: LAYERWISE.sample(0, 0.5, 1), TypeError, "micro_batch must be an integer, found 0.5"),
        (lambda: LAYERWISE.sample(0, 0, 0), ValueError, f"layers must lie in 1..{2**64 - 1}, found 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, kind, told):
    with pytest.raises(kind, match=rf"^ExpertCountSampler(\.sample)?: {re.escape(told)}$"):
        call()
