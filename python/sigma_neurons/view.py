"""Language neurons for people who look at a terminal."""

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sigma_train.console import say

from sigma_neurons.ablation import Deactivation
from sigma_neurons.identified import Identified
from sigma_neurons.matrices import own_of_all, own_others_random
from sigma_neurons.overlap import Overlap
from sigma_neurons.taxonomy import KINDS, score_words


def show(found: Identified, folder: Path) -> None:
    console, figures = Console(), found.figures()
    table = _table("layer", *KINDS, *found.stats.languages)
    rows = zip(figures["layers"]["kinds"], figures["layers"]["languages"], strict=True)
    for layer, (kinds, languages) in enumerate(rows):
        table.add_row(str(layer), *map(str, kinds), *map(str, languages))
    table.add_section()
    experts = figures["experts"]
    for name, all_of in (("all", figures), *((("experts", experts),) if experts else ())):
        own = (of["specific"] + of["related"] for of in all_of["of_language"].values())
        table.add_row(name, *(str(all_of["totals"][kind]) for kind in KINDS), *map(str, own))
    console.print(table)
    some, general = ("some or all", "none") if found.score == "lape" else ("some", "of all languages")
    chosen = f"the lowest {found.top_rate:.2%} of {len(found.p)} by {score_words(found.kinds.lam)}"
    say(console, f"specific: of one language, related: of {some}, both of {chosen}; general: {general}")
    say(
        console,
        f"a language has a neuron where its {found.probability} p is above tau = {found.kinds.tau:.4f}",
    )
    if experts:
        lowest = f"the lowest {experts['top_rate']:.2%} of {len(experts['places'])}"
        say(
            console,
            f"experts: by a language's share of tokens alone, {lowest} by {score_words(experts['lambda'])}, tau = "
            f"{experts['tau']:.4f}",
        )
    say(console, f"wrote {folder / 'neurons.json'} and counts.safetensors")


def show_matrices(matrices: Mapping[str, Deactivation], folder: Path) -> None:
    console = Console()
    for name, matrix in matrices.items():
        table = _table("of", "neurons", *matrix.languages)
        for mask, size, rise in zip(matrix.masks, matrix.sizes, matrix.rise.tolist(), strict=True):
            table.add_row(mask, str(size), *(f"{value:+.3f}" for value in rise))
        say(console, f"without {name}: rise of each language, bits per byte")
        console.print(table)
        own, others, at_random = own_others_random(matrix)
        say(
            console,
            f"own language {own:+.4f} bits per byte, others {others:+.4f}, own at random {at_random:+.4f}: means of "
            f"the {sum(size > 0 for size in matrix.sizes)} languages that have neurons; own, of all "
            f"{own_of_all(matrix):+.4f}",
        )
    say(console, f"wrote {folder / 'ablation.json'}")


def show_overlaps(overlaps: Mapping[str, Overlap]) -> None:
    table = _table("language", "first", "second", "in both", "of the smaller")
    for name, found in overlaps.items():
        ratio = "" if math.isnan(found.ratio) else f"{found.ratio:.1%}"
        table.add_row(name, str(found.first), str(found.second), str(found.both), ratio)
    Console().print(table)


def _table(first: str, *columns: str) -> Table:
    table = Table(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
