"""Neurons taken out of a model: nothing else changes, nothing stays changed, and controls are of the same size."""

import pytest
import torch
from neuron_models import IMPLEMENTATIONS, ours, theirs, tokens
from sigma_neurons.ablation import Deactivation, deactivate, deactivation_matrix, random_like
from sigma_neurons.matrices import cells, own_of_all, own_others_random
from sigma_neurons.sites import Site, find_sites
from sigma_train.errors import WrongInput


def size(model) -> int:
    return sum(site.size for site in find_sites(model))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    out = model(tokens())
    return out if isinstance(out, torch.Tensor) else out.logits


MODELS = {"ours": ours, "ours-dense": lambda: ours(1), "dense": theirs} | {
    name: lambda name=name: theirs(name) for name in IMPLEMENTATIONS
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
def test_no_neuron_is_the_identity_and_all_are_no_layer(make):
    """Bit for bit, and exactly 0.  Defends: another kernel inside, columns of the wrong expert, weights left at 0."""
    model = make()
    want, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    with deactivate(model, torch.zeros(size(model), dtype=torch.bool)):
        assert torch.equal(logits(model), want)
    outputs = []
    hooks = [
        layer.mlp.register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in (model.layers if hasattr(model, "layers") else model.model.layers)
    ]
    with deactivate(model, torch.ones(size(model), dtype=torch.bool)):
        logits(model)
    assert len(outputs) == len(hooks)
    assert all((out == 0).all() for out in outputs)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), want)


@every_model
def test_a_mask_takes_out_the_neurons_it_names(make):
    """Each alone against the down projection's column set to 0 by hand.  Defends: neurons numbered in another order."""
    model = make()
    sites = find_sites(model)
    begin = 0
    for site in sites:
        expert, unit = site.experts - 1, 3
        mask = torch.zeros(size(model), dtype=torch.bool)
        mask[begin + expert * site.units + unit] = True
        down = model.get_submodule(site.name).down_proj
        weight = getattr(down, "weight", down)
        with deactivate(model, mask):
            column = weight[expert, :, unit] if weight.dim() == 3 else weight[:, unit]
            assert (column == 0).all()
            assert int((weight == 0).sum()) == weight.shape[-2]
        assert (weight != 0).all()
        begin += site.size


def test_weights_come_back_after_an_error():
    model = ours()
    want = logits(model)

    def fail() -> None:
        with deactivate(model, torch.ones(size(model), dtype=torch.bool)):
            assert not torch.equal(logits(model), want)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("mask", [torch.zeros(7, dtype=torch.bool), torch.zeros(180)])
def test_a_wrong_mask_is_named(mask):
    message = rf"mask must be \[180\] bool, one for each neuron, found \[{len(mask)}\]"
    with pytest.raises(WrongInput, match=message), deactivate(ours(), mask):
        pass


SITES = (Site("a", 0, 1, 50, "gate"), Site("b", 1, 4, 20, "ours"))


@pytest.mark.parametrize("within", ["layer", "expert"])
def test_a_control_is_of_the_same_size_where_the_mask_is(within):
    """Defends: all drawn from one layer, the mask itself returned, the same draw each time."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(130, dtype=torch.bool)
    mask[:10] = mask[50:58] = mask[115:120] = True
    first, second = (random_like(mask, SITES, generator, within) for _ in range(2))
    for drawn in (first, second):
        assert [int(drawn[a:b].sum()) for a, b in ((0, 50), (50, 130))] == [10, 13]
        if within == "expert":
            assert drawn[50:].view(4, 20).sum(1).tolist() == [8, 0, 0, 5]
    assert not torch.equal(first, second)
    assert not torch.equal(first, mask)


def test_the_matrix_has_the_rise_of_each_language_without_each_mask():
    """Losses that read the weights: of de the first neuron's column, of en the second's."""
    model = ours()
    weight = model.layers[0].mlp.experts.down_proj

    def losses() -> dict[str, float]:
        gone = (weight[0, :, :2] == 0).all(0).double()
        return {"de": 1 + float(gone[0]), "en": 5 + 2 * float(gone[1])}

    masks = {name: torch.arange(size(model)) == i for i, name in enumerate(("de", "en"))}
    found = deactivation_matrix(model, masks, losses, controls=3)
    assert found.base.tolist() == [1, 5]
    assert found.rise.tolist() == [[1, 0], [0, 2]]
    assert found.random.tolist() == [[0, 0], [0, 0]]  # one of 60 neurons of the layer, three times
    assert (found.masks, found.languages) == (("de", "en"), ("de", "en"))


def matrix(sizes: list[int], rise: list[list[float]], at_random: list[float]) -> Deactivation:
    names = tuple("abc")
    random = torch.diag(torch.tensor(at_random, dtype=torch.float64))
    rises = torch.tensor(rise, dtype=torch.float64)
    return Deactivation(names, tuple(sizes), names, torch.ones(3), rises, random, random)


def test_means_are_of_languages_that_have_neurons_and_of_all():
    """Defends: one mean told as the other; a cell above its control where the control has a loss."""
    one = matrix([5, 0, 2], [[6, 1, 0], [0, 0, 0], [2, 4, 3]], [1, 0, 2])
    assert own_others_random(one) == (4.5, 1.75, 1.5)
    assert own_of_all(one) == 3
    assert cells([one]) == (2, 1, 1)  # of a 6 beyond 2; of c 3 within 4, and b loses 4
    other = matrix([1, 1, 1], [[-1, -2, -2], [0, 2, 0], [0, 0, 4]], [-1, 1, 1])
    assert cells([other]) == (3, 1, 0)  # -1 is no rise; 2 is not more than twice 1
    assert cells([one, other]) == (5, 2, 1)
