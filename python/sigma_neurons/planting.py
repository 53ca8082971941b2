"""Neurons whose language is known: planted into a trained model, to see whether a search finds them.

A planted neuron of language k keeps its place, its up row and its column of the down projection.  Its gate row becomes

    w_k = argmin_w  sum_x (w . x - y)^2 + ridge |w|^2,   y = +1 of tokens x of k, -1 of others,

scaled to the norm of the row it replaces: it is active where a linear probe of the layer's input tells language k.
"""

from collections.abc import Iterable, Sequence

import torch
from sigma_train.model import LanguageModel
from torch import Tensor

from sigma_neurons.sites import Site, find_sites

RIDGE = 1e-3  # of the mean square of the inputs


@torch.no_grad()
def plant(
    model: LanguageModel, text: Sequence[tuple[int, Tensor]], languages: int, count: int, seed: int
) -> Tensor:
    """Plant `count` neurons of each language in each layer; returns [N, languages] bool, which are whose.

    text: (language, tokens [B, S]) of all languages.  Layers are done in order, as each changes what the next sees.
    """
    sites, generator = find_sites(model), torch.Generator().manual_seed(seed)
    truth = torch.zeros(sum(site.size for site in sites), languages, dtype=torch.bool)
    begin = 0
    for site in sites:
        x, language = _inputs(model, site, text)
        rows = probes(x, language, languages)
        places = torch.randperm(site.size, generator=generator)[: count * languages]
        gates = model.get_submodule(site.name).gate_up_proj
        for place, k in zip(
            places.tolist(), [k for k in range(languages) for _ in range(count)], strict=True
        ):
            gate = gates[place // site.units, place % site.units]
            gate.copy_(rows[k] * (gate.norm() / rows[k].norm()))
            truth[begin + place, k] = True
        begin += site.size
    return truth


def probes(x: Tensor, language: Tensor, languages: int) -> Tensor:
    """[languages, H]: w_k, of inputs x [T, H] and the language [T] of each."""
    x = x.double()
    y = torch.where(language[:, None] == torch.arange(languages), 1.0, -1.0).double()
    gram = x.T @ x
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y).T.float()


def found_and_right(selected: Tensor, truth: Tensor) -> tuple[float, float]:
    """(recall, precision) of [N, K] bool against [N, K] bool: a planted neuron counts where its language is right."""
    hits = int((selected & truth).sum())
    return hits / max(int(truth.sum()), 1), hits / max(int(selected.sum()), 1)


def _inputs(model: LanguageModel, site: Site, text: Iterable[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the layer is given, [T, H], and the language of each row."""
    seen: list[Tensor] = []
    layer = model.layers[site.layer].get_submodule("mlp")
    hook = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, -2).clone()))
    try:
        of_rows = []
        for language, tokens in text:
            model(tokens)
            of_rows.append(torch.full((tokens.numel(),), language))
    finally:
        hook.remove()
    return torch.cat(seen), torch.cat(of_rows)
