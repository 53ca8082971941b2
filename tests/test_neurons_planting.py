"""Planted neurons: where they are said to be, active in their language, and found again by both searches."""

import numpy as np
import pytest
import torch
from neuron_models import ours
from sigma_experiments.invented import LANGUAGES, SHARES, translate
from sigma_experiments.planted_languages import TOLD, is_u_shaped, searches, told
from sigma_neurons.counting import ActivationCounter
from sigma_neurons.planting import found_and_right, plant, probes
from sigma_neurons.scores import lape
from sigma_neurons.sites import Site
from sigma_neurons.stats import ActivationStats
from sigma_neurons.taxonomy import classify_neurons


def text(languages: int, batches: int) -> list[tuple[int, torch.Tensor]]:
    """Languages of 50 tokens each that share none."""
    g = torch.Generator().manual_seed(0)
    return [
        (k, 50 * k + torch.randint(50, (8, 32), generator=g))
        for _ in range(batches)
        for k in range(languages)
    ]


def speaking() -> torch.nn.Module:
    """A model whose embeddings have a direction for each language, as a trained one has."""
    model = ours()
    with torch.no_grad():
        for k in range(3):
            model.embed_tokens.weight[50 * k : 50 * k + 50, k] += 0.8
    return model


def counts(model, batches):
    names = ["a", "b", "c"]
    with torch.no_grad(), ActivationCounter(model, names) as counter:
        for language, tokens in batches:
            with counter.batch(names[language], tokens):
                model(tokens)
    return counter.stats


def test_planted_neurons_are_found_and_nothing_else_is_changed():
    """Defends: a gate in another expert than truth says, a probe of another language, ups or downs overwritten."""
    model = speaking()
    before = {name: p.clone() for name, p in model.named_parameters()}
    truth = plant(model, text(3, 2), languages=3, count=2, seed=0)
    assert truth.sum(0).tolist() == [6, 6, 6]  # two in each of three layers
    changed = torch.zeros(len(truth), dtype=torch.bool)
    for layer, moe in enumerate(model.moe_layers()):
        gates, was = (
            moe.experts.gate_up_proj[:, :10],
            before[f"layers.{layer}.mlp.experts.gate_up_proj"][:, :10],
        )
        changed[60 * layer : 60 * layer + 60] = (gates != was).any(2).flatten()
        assert torch.equal(
            moe.experts.gate_up_proj[:, 10:], before[f"layers.{layer}.mlp.experts.gate_up_proj"][:, 10:]
        )
        assert gates.norm(dim=2).flatten().tolist() == pytest.approx(
            was.norm(dim=2).flatten().tolist(), rel=1e-5
        )
    assert torch.equal(changed, truth.any(1))
    stats = counts(model, text(3, 3))
    p = stats.conditional(least=20)
    known = p.sum(1) > 0
    of_planted = p[known & truth.any(1)]
    own = of_planted[truth[known & truth.any(1)]]
    others = of_planted[~truth[known & truth.any(1)]]
    assert len(own) > 6
    assert own.mean() > 0.85
    assert others.mean() < 0.15


def test_both_searches_find_what_is_planted():
    model = speaking()
    truth = plant(model, text(3, 2), languages=3, count=2, seed=0)
    p = counts(model, text(3, 3)).conditional(least=20)
    kinds = classify_neurons(p, top_rate=0.1, tau=0.8)
    chosen = torch.stack([kinds.of_language(k, "specific", "related") for k in range(3)], dim=1)
    known = (p.sum(1) > 0)[:, None]
    recall, precision = found_and_right(chosen, truth & known)
    assert recall > 0.6
    assert precision > 0.4  # of random neurons and languages 0.03
    recall, precision = found_and_right(lape(p, top_rate=0.1), truth & known)
    assert recall > 0.3
    assert precision > 0.2


def test_the_joint_probability_misses_a_sure_gate_in_an_expert_that_is_seldom_visited():
    """Defends: planted neurons counted as missed by the score where routing alone keeps them under the bar."""
    site = Site("experts", 0, 2, 20, "ours")
    routed = torch.tensor([[900, 100], [900, 100]])
    fired = routed[:, :, None].expand(2, 2, 20) * 2 // 5
    fired[:, 1, 0] = torch.tensor([100, 0])  # of language 0 always, of language 1 never
    stats = ActivationStats(("a", "b"), (site,), torch.tensor([1000, 1000]), (routed,), (fired,))
    truth = torch.zeros(40, 2, dtype=torch.bool)
    truth[20, 0] = True
    got = {
        name: (found_and_right(own, truth), found_and_right(above, truth)[0])
        for name, (own, above) in searches(stats).items()
    }
    assert got == {
        "H - lambda max p, joint": ((0, 0), 0),
        "LAPE, joint": ((0, 0), 0),
        "H - lambda max p, conditional": ((1, 1), 1),
        "LAPE, conditional": ((1, 1), 1),
        "H - lambda max p, conditional, tau = 0.5": ((1, 1), 1),
    }


def test_recall_and_precision_want_the_right_language():
    truth = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.bool)
    chosen = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]], dtype=torch.bool)
    assert found_and_right(chosen, truth) == (0.5, 0.25)
    assert found_and_right(torch.zeros_like(truth), truth) == (0, 0)


def test_chance_is_of_what_a_search_selects():
    """Defends: the precision of random neurons, which is the same for all searches, told as their recall."""
    truth = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.bool)
    chosen = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 0]], dtype=torch.bool)
    above = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 1]], dtype=torch.bool)
    want = {"recall": 1 / 2, "recall by chance": 3 / 8, "precision": 1 / 3, "planted ones above tau": 1}
    assert dict(zip(TOLD, told(chosen, above, truth), strict=True)) == want


def test_a_u_over_layers():
    assert is_u_shaped(np.array([20, 21, 38, 4, 12, 63]))
    assert not is_u_shaped(np.array([71, 1, 1, 8, 13, 2]))
    assert not is_u_shaped(np.array([7, 7]))


def test_a_probe_tells_languages_apart_without_a_bias():
    x = torch.tensor([[1.0, 1, 0], [1, 1.1, 0], [1, 0, 1], [1, 0, 0.9]])
    rows = probes(x, torch.tensor([0, 0, 1, 1]), 2)
    assert ((x @ rows.T) > 0).tolist() == [[True, False], [True, False], [False, True], [False, True]]


def test_invented_languages_say_the_same():
    text = "Read the file.\nIt has 3 lines, and no more."
    assert translate(text, "pivot") == text.lower()
    assert translate(translate(text, "rot13"), "rot13") == text.lower()
    words = translate(text, "reversed").split("\n")[1].split(" ")
    assert [len(word) for word in words] == [5, 2, 3, 6, 1, 3, 2]
    letters = {name: set(translate("abcxyz", name)) for name in LANGUAGES}
    assert not letters["cyrillic"] & (letters["pivot"] | letters["reversed"])
    assert sum(SHARES.values()) == pytest.approx(1)
    assert sorted(SHARES) == list(LANGUAGES)
