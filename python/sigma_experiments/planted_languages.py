"""Language neurons (arXiv 2505.21505) where it is known what is to be found: four languages made of one text.

A model learns the mixture.  Its neurons are chosen by the finer score and by LAPE and taken out, language by language,
beside as many random ones; then neurons are planted in it, and both scores search them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sigma_neurons.ablation import Deactivation, deactivation_matrix
from sigma_neurons.identified import LEAST_ROUTED, Identified, Probability, identify
from sigma_neurons.matrices import cells, mean_of, own_of_all, own_others_random
from sigma_neurons.measured import load
from sigma_neurons.pictures import kinds_figure, matrix_figure
from sigma_neurons.planting import found_and_right, plant
from sigma_neurons.scores import lape, quantile
from sigma_neurons.stats import ActivationStats
from sigma_neurons.taxonomy import KINDS
from torch import Tensor

from sigma_experiments.invented import LANGUAGES, write_texts
from sigma_experiments.lab import SHORT, Lab, Run, Trained
from sigma_experiments.page import Page, spread, table

LAYERS, EXPERTS = 6, 8
TOP_RATE = 0.05  # of 4,608 neurons: 1 % would be 46
PLANTED = 2  # neurons a language and layer
HALF = 0.5  # a bar that is the same for every model: active more often than not
CHARACTERS, SHORT_CHARACTERS = 4_000_000, 500_000
BASE = {
    "model.vocab_size": 1024,
    "model.num_layers": LAYERS,
    "model.num_experts": EXPERTS,
    "model.top_k": 2,
    "model.intermediate_size": 96,
    "router.balance_coef": 1e-2,
    "data.languages": True,
    "data.val_fraction": 0.1,
    "optim.lr": 3e-3,
    "optim.warmup_steps": 30,
    "train.steps": 800,
    "train.batch_size": 16,
    "train.eval_every": 400,
    "train.save_every": 400,
}
SETS = ("specific", "specific and related", "LAPE")
TOLD = ("recall", "recall by chance", "precision", "planted ones above tau")  # of a search


@dataclass(frozen=True)
class Seen:
    """Of one training."""

    found: Identified
    matrices: Mapping[str, Deactivation]  # of SETS
    planted: Mapping[str, tuple[float, ...]]  # of each search what TOLD names
    chance: float  # precision of neurons and languages that are drawn at random


def run(lab: Lab) -> Page:
    text_folder = lab.folder / "text"
    write_texts(text_folder, SHORT_CHARACTERS if lab.is_short else CHARACTERS)
    short = {**SHORT, "data.max_bytes": None, "model.num_layers": 2} if lab.is_short else {}
    settings = {**BASE, **short, "data.paths": [str(text_folder)]}
    trained = lab.train([Run("mixture", seed, settings) for seed in range(lab.seeds)])
    with lab.threads() as pool:
        seen = [*pool.map(lambda each: look(each, lab.is_short), trained.values())]
    bits = [each.validation[-1][1] for each in trained.values()]
    shown = "specific and related"
    figures = {
        "layers": kinds_figure([one.found.profile().numpy() for one in seen]),
        "matrix": matrix_figure(shown, mean_of([one.matrices[shown] for one in seen])),
    }
    return Page("Language neurons of four invented languages", text(seen, bits), figures, data(seen, bits))


def look(trained: Trained, is_short: bool) -> Seen:
    batches, judged = (2, 1) if is_short else (24, 4)
    one = load(trained.folder)
    found = identify(one.count("train", batches), TOP_RATE)
    by_lape = lape(found.p, TOP_RATE)
    masks = {
        "specific": [found.mask(k, "specific") for k in range(len(LANGUAGES))],
        "specific and related": [found.mask(k, "specific", "related") for k in range(len(LANGUAGES))],
        "LAPE": [by_lape[:, k] for k in range(len(LANGUAGES))],
    }
    matrices = {
        name: deactivation_matrix(
            one.model, dict(zip(LANGUAGES, each, strict=True)), lambda: one.losses(judged), controls=2
        )
        for name, each in masks.items()
    }
    probed = [(LANGUAGES.index(name), tokens) for name, tokens in one.batches("train", min(batches, 4))]
    truth = plant(one.model, probed, len(LANGUAGES), PLANTED, trained.run.seed)
    planted = {
        name: told(chosen, above, truth)
        for name, (chosen, above) in searches(one.count("train", batches)).items()
    }
    return Seen(found, matrices, planted, int(truth.sum()) / truth.numel())


def told(chosen: Tensor, above: Tensor, truth: Tensor) -> tuple[float, ...]:
    """TOLD, of [N, K] bool each.  By chance a planted neuron is chosen as often as any other, whichever they are."""
    recall, precision = found_and_right(chosen, truth)
    return recall, float(chosen.double().mean()), precision, found_and_right(above, truth)[0]


def searches(stats: ActivationStats) -> dict[str, tuple[Tensor, Tensor]]:
    """[N, K] bool of each: which neurons it gives to which language, and which are active enough to be given to it."""

    def finer(probability: Probability, tau: float | None = None) -> tuple[Tensor, Tensor]:
        found = identify(stats, TOP_RATE, probability, tau=tau)
        own = [found.mask(k, "specific", "related") for k in range(len(stats.languages))]
        return torch.stack(own, dim=1), found.kinds.above

    def coarser(p: Tensor) -> tuple[Tensor, Tensor]:
        return lape(p, TOP_RATE), p > quantile(p, 0.95)

    return {
        "H - lambda max p, joint": finer("joint"),
        "LAPE, joint": coarser(stats.joint()),
        "H - lambda max p, conditional": finer("conditional"),
        "LAPE, conditional": coarser(stats.conditional(LEAST_ROUTED)),
        f"H - lambda max p, conditional, tau = {HALF}": finer("conditional", HALF),
    }


def text(seen: Sequence[Seen], bits: Sequence[float]) -> str:
    tokens = int(seen[0].found.stats.tokens.min())
    rows, counts = [], []
    for name in SETS:
        matrices = [one.matrices[name] for one in seen]
        own, others, at_random = zip(*map(own_others_random, matrices), strict=True)
        sizes = [sum(one.sizes) / len(LANGUAGES) for one in matrices]
        of_all = [*map(own_of_all, matrices)]
        rows.append([name, spread(sizes, 1), *(spread(x, 4) for x in (own, of_all, others, at_random))])
        counts.append([name, *map(str, cells(matrices))])
    planted = []
    for name in seen[0].planted:
        recall, by_chance, precision, above = zip(*(one.planted[name] for one in seen), strict=True)
        planted.append(
            [name, spread(recall, 2), spread(by_chance, 4), spread(precision, 2), spread(above, 2)]
        )
    kinds = [
        [name, *(spread([float(one.found.mask(k, kind).sum()) for one in seen], 0) for kind in KINDS)]
        for k, name in enumerate(LANGUAGES)
    ]
    related = [float(one.found.kinds.related.sum()) for one in seen]
    own = [one.found.profile().numpy()[:, :2].sum(1) for one in seen]
    by_layer = "; ".join(" ".join(map(str, of_seed)) for of_seed in own)
    layers, neurons = len(own[0]), len(seen[0].found.p)
    return f"""
Four languages of one text: the pivot (60 % of the characters); its letters turned by thirteen, so in the pivot's own
letters (20 %); an alphabet of its own (10 %); another one with the words of each line reversed (10 %). A model of
{layers} layers of {EXPERTS} experts, two a token, learns the mixture: {spread(bits)} bits per byte. Neurons are counted
on {tokens:,} tokens of each language; {TOP_RATE:.0%} of {neurons:,} are selected, by the joint probability.

{table(["language", *KINDS], kinds)}

![Kinds by layer](planted-languages-layers.png)

Specific and related neurons from the lowest layer to the highest, seed by seed:
{by_layer}.
The first and the last layer have more than the mean of those between in {sum(map(is_u_shaped, own))} of {len(seen)}
seeds; the paper has a peak in the first layers and one before the last.

## Without a language's neurons

Rise in bits per byte on validation text, of the language whose neurons are taken out, of the other three, and of the
language itself without as many random neurons of the same layers (two masks): means of the languages that have
neurons, and in "own, of all" of all languages, with 0 for those that have none.

{table(["taken out", "neurons a language", "own", "own, of all", "others", "own, random"], rows)}

Language by language, all seeds together: how many have neurons, how many of these lose more than twice what random
ones cost, and in how many another language loses more than the one whose neurons they are.

{table(["taken out", "have neurons", "beyond twice random", "another loses more"], counts)}

Related are {spread(related, 1)} neurons of a seed; where these are next to none the second row tries nothing that the
first does not. What further training moves is tried on real text alone, by `sigma experiment guide-languages`.

![Rise of each language without the specific and related neurons of each](planted-languages-matrix.png)

## Planted neurons

{PLANTED} neurons of each language in each layer, in experts drawn at random, get the gate of a linear probe for it;
the search does not know them. Found is one that is selected and given to its own language. By chance recall is the
share of all neurons and languages that a search selects, precision the share that is planted, {seen[0].chance:.4f};
neurons that training made specific count against precision here.

{table(["search", *TOLD], planted)}

Only what is above tau in its own language can be found. The joint probability of an expert's neuron is at most the
expert's share of the language's tokens, however sure its gate is; the conditional one is of the gate alone. tau is the
top 5 % of all probabilities where no other is said.
"""


def is_u_shaped(of_layers: np.ndarray) -> bool:
    """[L]: whether both ends have more than the mean of what is between."""
    between = of_layers[1:-1]
    return len(between) > 0 and min(of_layers[0], of_layers[-1]) > between.mean()


def data(seen: Sequence[Seen], bits: Sequence[float]) -> dict[str, Any]:
    return {
        "languages": list(LANGUAGES),
        "bits_per_byte": list(bits),
        "seeds": [
            {
                "lambda": one.found.kinds.lam,
                "tau": one.found.kinds.tau,
                "layers": one.found.profile().tolist(),
                "rise": {name: one.matrices[name].rise.tolist() for name in SETS},
                "random": {name: one.matrices[name].random.tolist() for name in SETS},
                "base": one.matrices[SETS[0]].base.tolist(),
                "planted": {name: dict(zip(TOLD, of, strict=True)) for name, of in one.planted.items()},
                "precision_by_chance": one.chance,
            }
            for one in seen
        ],
    }
