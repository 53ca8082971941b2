"""Scores, quantiles, lambda and kinds of neurons: the study's exact values, and planted sets found again."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sigma_neurons.overlap import overlap
from sigma_neurons.scores import entropy, language_neuron_score, lape, paper_lambda, quantile, released_score
from sigma_neurons.taxonomy import (
    KINDS,
    NeuronTaxonomy,
    classify_by_lape,
    classify_neurons,
    fit_lambda,
    stage_profile,
)
from sigma_train.errors import WrongInput


def f64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "p, h, score",
    [
        ([0.8, 0.1, 0.1], 0.639032, 0.559032),
        ([0.5, 0.4, 0.1], 0.943348, 0.893348),
        ([0.4, 0.4, 0.4], 1.098612, 1.058612),
        ([0.9, 0.0, 0.0], 0.0, -0.09),
        ([0.04, 0.0, 0.0], 0.0, -0.004),
    ],
)
def test_the_score_has_the_exact_values_of_the_study(p, h, score):
    """Defends: another logarithm, entropy of p that does not add up to 1, lambda on the wrong side."""
    assert float(entropy(f64(p))) == pytest.approx(h, abs=5e-7)
    assert float(language_neuron_score(f64(p), 0.1)) == pytest.approx(score, abs=5e-7)


def test_lambda_tells_a_specialist_from_a_neuron_that_hardly_fires():
    p = f64([0.9, 0, 0], [0.04, 0, 0])
    tied, told = language_neuron_score(p, 0.0), language_neuron_score(p, 0.1)
    assert tied[0] == tied[1]
    assert told[0] < told[1]


def test_the_released_scale_has_the_exact_values_of_the_study():
    assert float(released_score(f64([0.8, 0.1, 0.1]), 0.1)) == pytest.approx(0.450763, abs=5e-7)
    assert paper_lambda(1, 3) == pytest.approx(1.79773, abs=1e-6)
    assert paper_lambda(1, 10) == pytest.approx(7.86142, abs=1e-5)
    assert paper_lambda(0.109375, 10) == pytest.approx(0.860, abs=5e-4)  # of the released mask


def test_both_scales_order_neurons_alike():
    p = torch.rand(200, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = language_neuron_score(p, paper_lambda(0.1, 7)), released_score(p, 0.1)
    assert torch.equal(ours.argsort(), theirs.argsort())


def test_a_neuron_that_never_fires_is_as_unspecific_as_can_be_and_never_selected():
    p = f64([0, 0, 0, 0], [0.5, 0.5, 0.5, 0.4])
    assert float(entropy(p)[0]) == math.log(4)
    assert classify_neurons(p, lam=0.0, top_rate=1.0, tau=0.45).selected.tolist() == [False, True]


def test_quantiles_are_values_and_nothing_equal_passes():
    """Values i/20: the 19th is 0.95, and only 1.0 is above it."""
    values = torch.arange(1, 21, dtype=torch.float64) / 20
    bar = quantile(values, 0.95)
    assert bar == 0.95
    assert values[values > bar].tolist() == [1.0]
    assert quantile(values[:10], 0.95) == 0.5  # of ten a twentieth is none


@given(st.integers(1, 400), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_at_most_the_share_passes(n, rate):
    """Defends: 0.95 * 140 taken for more than 133."""
    values = torch.arange(n, dtype=torch.float64)
    assert int((values > quantile(values, rate)).sum()) == int(n * (100 - round(rate * 100)) // 100)


def test_kinds_by_the_number_of_languages_above_tau():
    p = f64([0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.4, 0.4, 0.4])
    kinds = classify_neurons(p, lam=0.1, top_rate=1.0, tau=0.3)
    assert kinds.num_languages.tolist() == [1, 2, 3]
    assert kinds.specific.tolist() == [True, False, False]
    assert kinds.related.tolist() == [False, True, False]
    assert kinds.general.tolist() == [False, False, True]
    assert kinds.of_language(1, "specific", "related").tolist() == [False, True, False]
    of_few = classify_neurons(p, lam=0.1, top_rate=1 / 3, tau=0.3)
    assert of_few.related.tolist() == [False] * 3  # not selected
    assert of_few.general.tolist() == [False, False, True]  # selected or not


def test_lape_keeps_the_planted_neurons():
    """The three of the study beside neurons that nothing selects.

    Defends: a neuron of little activity taken for a specialist, entropy in the other direction.
    """
    p = f64([0.9, 0.0], [0.01, 0.0], [0.9, 0.9], *[[0.2, 0.2]] * 37)
    found = lape(p, top_rate=0.05)  # two of forty; p above the 76th of eighty
    assert found.nonzero().tolist() == [[0, 0], [2, 0], [2, 1]]  # the second lowest of those that are active
    assert lape(p, top_rate=0.025).nonzero().tolist() == [[0, 0]]


def test_kinds_by_lape_are_its_neurons():
    """Defends: a neuron that it gives to all languages lost, since it has no general ones; another bar."""
    for p, rate in (
        (f64([0.9, 0.0], [0.01, 0.0], [0.9, 0.9], *[[0.2, 0.2]] * 37), 0.05),
        (torch.rand(300, 4, generator=torch.Generator().manual_seed(0)).pow(4).double(), 0.2),
    ):
        kinds, want = classify_by_lape(p, rate), lape(p, rate)
        own = [kinds.of_language(k, "specific", "related") for k in range(p.shape[1])]
        assert torch.equal(torch.stack(own, dim=1), want)
        assert all(torch.equal(kinds.of_language(k, *KINDS), own[k]) for k in range(p.shape[1]))
        assert torch.equal(kinds.specific, want.sum(1) == 1)
        assert kinds.related.any()
        assert not kinds.general.any()


def planted(seed: int) -> torch.Tensor:
    """A hundred neurons: 20 of one language each, 77 weak ones, 3 of all."""
    g = torch.Generator().manual_seed(seed)
    p = 0.02 + 0.1 * torch.rand(100, 4, dtype=torch.float64, generator=g)
    for i in range(20):
        p[i] *= 0.1
        p[i, i % 4] = 0.3 + 0.2 * float(torch.rand(1, generator=g))
    p[97:] = 0.8 + 0.1 * torch.rand(3, 4, dtype=torch.float64, generator=g)
    return p


@pytest.mark.parametrize("seed", range(4))
def test_lambda_is_the_largest_that_selects_no_universal_neuron(seed):
    """Defends: a search that stops early, one past the edge, tau of another quantile than the classes'."""
    p = planted(seed)
    lam = fit_lambda(p, top_rate=0.2, tau=0.25, most=4)
    assert 0 < lam < 4

    def universal(lam: float) -> int:
        kinds = classify_neurons(p, lam, top_rate=0.2, tau=0.25)
        return int((kinds.selected & kinds.general).sum())

    assert universal(lam) == 0
    assert universal(lam + 2e-4) > 0
    kinds = classify_neurons(p, lam, top_rate=0.2, tau=0.25)
    assert kinds.specific.nonzero().flatten().tolist() == list(range(20))
    assert kinds.general.nonzero().flatten().tolist() == [97, 98, 99]


def test_without_universal_neurons_lambda_is_the_bound_and_with_them_alone_there_is_none():
    p = planted(0)
    assert fit_lambda(p[:97], top_rate=0.2, tau=0.25, most=4) == 4
    assert fit_lambda(p[:97], top_rate=0.2, tau=0.25) == pytest.approx(paper_lambda(0.2, 4))
    assert classify_neurons(p[:97], top_rate=0.2, tau=0.25).lam == pytest.approx(paper_lambda(0.2, 4))
    with pytest.raises(
        WrongInput, match=r"no lambda keeps neurons of all 4 languages out of the lowest 50.0%"
    ):
        fit_lambda(p[97:].repeat(2, 1), top_rate=0.5, tau=0.25)


def test_kinds_by_layer():
    above = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    kinds = NeuronTaxonomy(torch.tensor([True, False, True, True]), above, 0.0, 0.5)
    assert stage_profile(kinds, torch.tensor([0, 0, 2, 2])).tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_overlap_is_of_the_smaller_set():
    assert overlap({0, 1, 2}, {1, 2}).ratio == 1
    assert overlap({0, 1, 2}, {0, 3}).ratio == 0.5
    assert math.isnan(overlap({0, 1, 2}, set()).ratio)
