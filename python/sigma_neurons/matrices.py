"""The ablations of a run: by language, of two sets of kinds, and their summary."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sigma_neurons.ablation import Deactivation, deactivation_matrix
from sigma_neurons.identified import Identified
from sigma_neurons.measured import Measured
from sigma_neurons.taxonomy import Kind

SETS: dict[str, tuple[Kind, ...]] = {
    "specific": ("specific",),
    "specific and related": ("specific", "related"),
    "with general": ("specific", "related", "general"),
}


def masks_of(found: Identified, kinds: tuple[Kind, ...]) -> dict[str, Tensor]:
    return {name: found.mask(k, *kinds) for k, name in enumerate(found.stats.languages)}


def ablate(
    run: Measured,
    found: Identified,
    batches: int,
    controls: int,
    seed: int,
    within: Literal["layer", "expert"],
) -> dict[str, Deactivation]:
    """Of each of SETS; one that has the very neurons of the one before, as where none is general, is not done again."""
    out: dict[str, Deactivation] = {}
    last: dict[str, Tensor] = {}
    for name, kinds in SETS.items():
        masks = masks_of(found, kinds)
        if not last or any(not torch.equal(mask, last[language]) for language, mask in masks.items()):
            out[name] = deactivation_matrix(
                run.model, masks, lambda: run.losses(batches), controls, seed, within
            )
        last = masks
    return out


def own_others_random(matrix: Deactivation) -> tuple[float, float, float]:
    """Means over the languages that have neurons: the rise of the language itself, of the others, of itself at random.

    All 0 where no language has any.
    """
    has = torch.tensor(matrix.sizes) > 0
    own = torch.eye(len(has), dtype=torch.bool) & has[:, None]
    others = ~torch.eye(len(has), dtype=torch.bool) & has[:, None]
    parts = (matrix.rise[own], matrix.rise[others], matrix.random[own])
    rise, of_others, at_random = (float(part.mean()) if len(part) else 0.0 for part in parts)
    return rise, of_others, at_random


def own_of_all(matrix: Deactivation) -> float:
    """The mean over all languages of the rise of each without its own neurons, 0 of one that has none."""
    return float(matrix.rise.diagonal().mean())


def cells(matrices: Sequence[Deactivation]) -> tuple[int, int, int]:
    """How many languages have neurons; of these how many lose more than twice what random ones cost, and in how many
    another language loses more than the one whose neurons they are.  Languages of all matrices together.
    """
    counts = torch.zeros(3, dtype=torch.int64)
    for matrix in matrices:
        has, own = torch.tensor(matrix.sizes) > 0, matrix.rise.diagonal()
        is_own = torch.eye(len(has), dtype=torch.bool)
        most_of_others = matrix.rise.masked_fill(is_own, -torch.inf).amax(1)
        is_beyond = own > 2 * matrix.random.diagonal().clamp(min=0)
        counts += torch.stack([has, has & is_beyond, has & (most_of_others > own)]).sum(1)
    languages, beyond, harming = counts.tolist()
    return languages, beyond, harming


def mean_of(matrices: Sequence[Deactivation]) -> dict[str, Any]:
    """Of several runs with the same languages, as `pictures.matrix_figure` wants it."""
    sizes = np.mean([m.sizes for m in matrices], axis=0)
    return {
        "languages": list(matrices[0].languages),
        "neurons": dict(zip(matrices[0].masks, sizes, strict=True)),
        "rise": np.mean([m.rise.numpy() for m in matrices], axis=0),
        "random": np.mean([m.random.numpy() for m in matrices], axis=0),
    }


def figures(matrices: Mapping[str, Deactivation]) -> dict[str, Any]:
    """As JSON has it; bits per byte."""
    out = {}
    for name, matrix in matrices.items():
        own, others, at_random = own_others_random(matrix)
        out[name] = {
            "languages": list(matrix.languages),
            "neurons": dict(zip(matrix.masks, matrix.sizes, strict=True)),
            "base": matrix.base.tolist(),
            "rise": matrix.rise.tolist(),
            "random": matrix.random.tolist(),
            "spread": matrix.spread.tolist(),
            "own": own,
            "own_of_all": own_of_all(matrix),
            "others": others,
            "own_random": at_random,
        }
    return out
