"""Neurons taken out of a model, and what that costs each language."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from sigma_train.errors import WrongInput
from torch import Tensor, nn

from sigma_neurons.sites import Site, check_not_spread, down_weight, find_sites


@contextmanager
def deactivate(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Compute without the neurons of `mask` [N] bool, numbered as in ActivationStats, while the block lasts.

    What a neuron adds is its hidden value times its column of the down projection: the columns are zero meanwhile and
    then what they were, bit for bit.  So every implementation of a layer leaves the neurons out, fused ones too.
    Raises: WrongInput if there is not one entry for each neuron.
    """
    check_not_spread(model)
    sites = find_sites(model)
    if mask.dtype != torch.bool or tuple(mask.shape) != (sum(site.size for site in sites),):
        raise WrongInput(
            f"neurons: mask must be [{sum(site.size for site in sites)}] bool, one for each neuron, "
            f"found {list(mask.shape)} {str(mask.dtype).removeprefix('torch.')}"
        )
    saved: list[tuple[Tensor, tuple[Tensor, Tensor], Tensor]] = []
    try:
        for site, part in zip(sites, mask.split([site.size for site in sites]), strict=True):
            expert, unit = part.view(site.experts, site.units).nonzero(as_tuple=True)
            if len(expert):
                weight = down_weight(model, site)  # [E, H, I]
                saved.append((weight, (expert, unit), weight[expert, :, unit]))
                weight[expert, :, unit] = 0
        yield
    finally:
        for weight, (expert, unit), columns in saved:
            weight[expert, :, unit] = columns


def random_like(
    mask: Tensor,
    sites: Sequence[Site],
    generator: torch.Generator,
    within: Literal["layer", "expert"] = "layer",
) -> Tensor:
    """As many neurons as `mask` has in each layer, or in each expert, drawn at random: the control of an ablation."""
    out = torch.zeros_like(mask)
    begin = 0
    for site in sites:
        parts, size = (1, site.size) if within == "layer" else (site.experts, site.units)
        for _ in range(parts):
            count = int(mask[begin : begin + size].sum())
            out[begin + torch.randperm(size, generator=generator)[:count]] = True
            begin += size
    return out


@dataclass(frozen=True)
class Deactivation:
    """[K, K] f64 each: by how much the loss of language j rises without the neurons of language i.

    random: the mean over masks of as many neurons in each layer, or expert; spread: their largest less their least.
    """

    masks: tuple[str, ...]
    sizes: tuple[int, ...]  # of the masks
    languages: tuple[str, ...]
    base: Tensor  # [K], of the whole model
    rise: Tensor
    random: Tensor
    spread: Tensor


def deactivation_matrix(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    losses: Callable[[], Mapping[str, float]],
    controls: int = 2,
    seed: int = 0,
    within: Literal["layer", "expert"] = "layer",
) -> Deactivation:
    """`losses` evaluates the model as it is, by language: once, and 1 + `controls` (1 or more) times for each mask."""
    sites, generator = find_sites(model), torch.Generator().manual_seed(seed)
    languages = tuple(base := losses())
    whole = _row(base, languages)

    def rise(mask: Tensor) -> Tensor:
        if not mask.any():
            return torch.zeros_like(whole)
        with deactivate(model, mask):
            return _row(losses(), languages) - whole

    rows, means, spreads = [], [], []
    for mask in masks.values():
        rows.append(rise(mask))
        drawn = torch.stack([rise(random_like(mask, sites, generator, within)) for _ in range(controls)])
        means.append(drawn.mean(0))
        spreads.append(drawn.amax(0) - drawn.amin(0))
    sizes = tuple(int(mask.sum()) for mask in masks.values())
    return Deactivation(tuple(masks), sizes, languages, whole, *map(torch.stack, (rows, means, spreads)))


def _row(losses: Mapping[str, float], languages: Sequence[str]) -> Tensor:
    for language in languages:
        if not math.isfinite(losses[language]):
            raise WrongInput(
                f"neurons: the loss of {language} must be a finite number, found {losses[language]}: the model has "
                "diverged or is damaged"
            )
    return torch.tensor([losses[language] for language in languages], dtype=torch.float64)
