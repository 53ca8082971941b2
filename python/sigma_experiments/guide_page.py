"""What `guide-languages` found, as a page: neurons, routing, and what further training moves."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sigma_neurons.identified import LEAST_ROUTED
from sigma_neurons.matrices import cells, own_of_all, own_others_random
from sigma_neurons.pictures import COLORS, kinds_figure, matrix_figure, routing_figure
from sigma_neurons.taxonomy import KINDS
from sigma_train.config import Config

from sigma_experiments.guide_found import CLAIMS, JUDGED, PARTS, After, Before, Found, parts_of
from sigma_experiments.guide_texts import Pair, agreement, strangers
from sigma_experiments.page import Page, spread, table


def page(
    config: Config,
    before: Sequence[Before],
    after: Mapping[str, Sequence[After]],
    pairs: Mapping[str, list[Pair]],
    windows: int,
    steps: int,
) -> Page:
    """steps: of what went on; pairs: that it went on with, in so many windows."""
    found = Found(before, after)
    figures = {
        "layers": kinds_figure(found.profiles("joint")),
        "layers-conditional": kinds_figure(found.profiles("conditional")),
        "matrix": matrix_figure("the neurons of each, joint", found.matrix("joint")),
        "matrix-conditional": matrix_figure("the neurons of each, conditional", found.matrix("conditional")),
        "routing": routing_figure(before[0].found["joint"].figures()),
        "moves": moves_figure(found),
    }
    parts = [
        of_text(config, found),
        of_languages(found),
        of_layers(found),
        of_routing(found),
        of_going_on(config, found, pairs, windows, steps),
    ]
    text = "\n\n".join(part.strip() for part in parts)
    return Page("Language neurons of Debian's installation guide", text, figures, data(found, pairs))


def of_text(config: Config, found: Found) -> str:
    one = found.before[0].found["joint"]
    model, t = config.model, config.train
    rows = [
        [
            way,
            *(spread(found.totals(way, kind), 0) for kind in KINDS),
            spread([each.found[way].kinds.lam for each in found.before], 2),
            spread([each.found[way].kinds.tau for each in found.before], 3),
        ]
        for way in found.ways
    ]
    return f"""
A book in {len(found.languages)} languages, most of it parallel; what a version has in English, word for word, is left
out, and held out are other chapters in each. A model of {model.num_layers} layers of {model.num_experts} experts,
{model.layer_top_k[0]} a token, learns {t.steps * t.batch_size * t.seq_len:,} tokens: {spread(found.bits)} bits per
byte, the mean of the languages, here and below on {JUDGED * t.batch_size * t.seq_len:,} tokens of each one's validation
text. Neurons are counted on {int(one.stats.tokens.min()):,} tokens of each language, evenly over its training text;
{one.top_rate:.0%} of {len(one.p):,} are selected. Mean [lowest, highest] of the seeds.

{table(["probability", *KINDS, "lambda", "tau"], rows)}

By the conditional probability {spread(found.untold().mean(1), 0, " %")} of the neurons cannot be told: some language
goes to their expert less than {LEAST_ROUTED} times.
"""


def of_languages(found: Found) -> str:
    rows, counts = [], []
    for way in found.ways:
        matrices = found.matrices(way)
        own, others, at_random = zip(*map(own_others_random, matrices), strict=True)
        sizes = [sum(m.sizes) / len(m.sizes) for m in matrices]
        of_all = [*map(own_of_all, matrices)]
        rows.append([way, spread(sizes, 1), *(spread(x, 4) for x in (own, of_all, others, at_random))])
        counts.append([way, *map(str, cells(matrices))])
    nearest = found.nearest()
    columns = ["language"]
    of_language = [[name] for name in found.languages]
    for way in found.ways:
        columns += [
            f"{what}, {way}" for what in ("specific", "related", "own", "own at random", "most of others")
        ]
        matrix = found.matrix(way)
        for k, row in enumerate(of_language):
            row += [f"{found.size(way, k, kind):.0f}" for kind in ("specific", "related")]
            row += [f"{matrix[key][k, k]:+.4f}" for key in ("rise", "random")]
            row.append(_most_of_others(found.languages, matrix["rise"][k], k))
    for row, name in zip(of_language, nearest, strict=True):
        row.append(name)
    return f"""
## Without a language's neurons

Its specific and related neurons are taken out: rise in bits per byte on validation text, of the language itself, of the
others, and of itself without as many random neurons of the same layers: means of the languages that have neurons, and
in "own, of all" of all languages, with 0 for those that have none. The control of a language and seed is one random
mask, judged as all of this on {JUDGED} batch of each language.

{table(["probability", "neurons a language", "own", "own, of all", "others", "own at random"], rows)}

Language by language, all seeds together: how many have neurons, how many of these lose more than twice what random
ones cost, and in how many another language loses more than the one whose neurons they are. The paper's own figures have
Chinese, Japanese, Bengali and Thai harm each other.

{table(["probability", "have neurons", "beyond twice random", "another loses more"], counts)}

Of each language, means of the seeds, and which other one loses most without its neurons:

{table([*columns, "routed most like"], of_language)}

![Rise of each language without the neurons of each](guide-languages-matrix.png)

![The same, chosen by the conditional probability](guide-languages-matrix-conditional.png)
"""


def _most_of_others(languages: Sequence[str], rise: np.ndarray, own: int) -> str:
    """The other language that loses most without the neurons of `own`, and how much; nothing where it has none."""
    if not rise.any():
        return ""
    others = rise.copy()
    others[own] = -np.inf
    return f"{languages[others.argmax()]} {others.max():+.4f}"


def of_layers(found: Found) -> str:
    count = found.profiles("joint").shape[1]
    rows = []
    for name, layers in zip(PARTS, parts_of(count), strict=True):
        row = [name, ", ".join(map(str, layers))]
        for way in found.ways:
            profile = found.profiles(way)[:, layers].mean(1)  # [seeds, 3]
            row += [spread(profile[:, :2].sum(1), 1), spread(profile[:, 2], 1)]
        rows.append([*row, spread(found.untold()[:, layers].mean(1), 0, " %")])
    shows = {way: found.claims(way) for way in found.ways}
    seeds = len(found.before)
    claims = [
        [claim, *(f"{sum(one[i] for one in shows[way])} of {seeds}" for way in found.ways)]
        for i, claim in enumerate(CLAIMS)
    ]
    columns = [f"{what}, {way}" for way in found.ways for what in ("specific and related", "general")]
    return f"""
## Layers

The paper tells four stages apart. Neurons a layer:

{table(["stage", "layers", *columns, "not to be told, conditional"], rows)}

What cannot be told is of no kind. What it says of them, and in how many seeds it shows here:

{table(["published", *found.ways], claims)}

![Kinds by layer](guide-languages-layers.png)

![Kinds by layer, chosen by the conditional probability](guide-languages-layers-conditional.png)
"""


def of_routing(found: Found) -> str:
    apart, same = found.routing_distances()
    rows = [
        [str(layer), spread(apart[:, layer], 3), spread(same[:, layer], 3)] for layer in range(apart.shape[1])
    ]
    return f"""
## Routing

Half the sum over experts of the differences of two languages' shares of tokens: 0 where both go to the same experts
equally often, 1 where they share none. Beside it, of one language on two halves of its text.

{table(["layer", "two languages", "two halves"], rows)}

![Each expert's share of a language's tokens, first seed](guide-languages-routing.png)
"""


def of_going_on(
    config: Config, found: Found, pairs: Mapping[str, list[Pair]], windows: int, steps: int
) -> str:
    counts, read = [len(own) for own in pairs.values() if own], steps * config.train.batch_size
    agree = 100 * np.mean([agreement(own) for own in pairs.values() if own])
    apart = 100 * np.mean([agreement(strangers(own)) for own in pairs.values() if own])
    tables = []
    for way in found.ways:
        rows = []
        for name, moved in found.moves[way].items():
            kept, were, *changes = np.array(moved, dtype=float).T
            rows.append(
                [name, spread(kept, 1, " %"), spread(were, 1, " %"), *(spread(each, 0) for each in changes)]
            )
        totals = ", ".join(f"{spread(found.half_totals(way, kind), 0)} {kind}" for kind in KINDS)
        columns = ["then", "of before, kept", "of then, were before", *KINDS]
        tables.append(f"By the {way} probability, {totals} before:\n\n{table(columns, rows)}")
    after = [[name, spread([one.bits for one in of_arm])] for name, of_arm in found.after.items()]
    return f"""
## Further training

Each model goes on from its weights with a new optimizer, for {steps} steps each: with its training text in another
order; with pairs, a paragraph and then the English one that says the same; with strangers, the same paragraphs, each
beside an English one of half a book away. Strangers have the languages and shares of the pairs, and not their meaning.
There are {sum(counts):,} pairs in {len(counts)} languages, {min(counts):,} to {max(counts):,} in each: of sections that
both versions have in as many paragraphs, of training text, short enough for a window. They fill {windows:,} windows, no
pair cut and the rest ends of text; {read:,} are read. Of words with a digit or a slash in one of a pair the English one
has {agree:.0f} %, a stranger {apart:.0f} %.

{table(["goes on with", "bits per byte, then"], [["nothing", spread(found.bits)], *after])}

Specific and related neurons of all languages together that are the same ones, both ways, one of several languages once
for each, and by how much the kinds of neurons grow. All are counted on one half of the text; what the model as it was
has on the other half is the noise. Lambda, and tau of the joint probability, are found anew each time. Published of
alignment: 92 to 96 % are kept, specific ones become fewer, related and general ones more.

{tables[0]}

{tables[1]}

![How many neurons each kind gains](guide-languages-moves.png)
"""


def moves_figure(found: Found) -> Figure:
    figure, grid = plt.subplots(1, len(found.ways), figsize=(11, 3.6), layout="constrained")
    for axes, way in zip(grid, found.ways, strict=True):
        moves = found.moves[way]
        values = np.array([*moves.values()], dtype=float)[:, :, 2:]  # [then, seeds, kinds]
        mean = values.mean(1)
        around = np.stack([mean - values.min(1), values.max(1) - mean])
        places = np.arange(len(moves))
        for i, kind in enumerate(KINDS):
            axes.bar(
                places + 0.27 * (i - 1),
                mean[:, i],
                0.25,
                yerr=around[:, :, i],
                color=COLORS[kind],
                label=kind,
            )
        axes.set_xticks(places, ["other half", *found.after])
        axes.set(title=way, ylabel="more neurons than before")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(alpha=0.3, axis="y")
    grid[0].legend(fontsize=8)
    return figure


def data(found: Found, pairs: Mapping[str, list[Pair]]) -> dict[str, Any]:
    ways = {}
    for way in found.ways:
        matrices = found.matrices(way)
        ways[way] = {
            "lambda": [each.found[way].kinds.lam for each in found.before],
            "tau": [each.found[way].kinds.tau for each in found.before],
            "layers": found.profiles(way).tolist(),
            "of_language": [each.found[way].figures()["of_language"] for each in found.before],
            "base": [m.base.tolist() for m in matrices],
            "rise": [m.rise.tolist() for m in matrices],
            "random": [m.random.tolist() for m in matrices],
            "before": {kind: found.half_totals(way, kind) for kind in KINDS},
            "moves": found.moves[way],
        }
    apart, same = found.routing_distances()
    return {
        "languages": list(found.languages),
        "bits_per_byte": found.bits,
        "bits_per_byte_after": {name: [one.bits for one in of_arm] for name, of_arm in found.after.items()},
        "tokens": [each.found["joint"].stats.tokens.tolist() for each in found.before],
        "untold": found.untold().tolist(),
        "pairs": {name: len(own) for name, own in pairs.items()},
        "agreement": {name: [agreement(own), agreement(strangers(own))] for name, own in pairs.items()},
        "routing": [each.found["joint"].stats.routing().tolist() for each in found.before],
        "routing_apart": {"two languages": apart.tolist(), "two halves": same.tolist()},
        "ways": ways,
    }
