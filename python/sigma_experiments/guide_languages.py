"""Language neurons (arXiv 2505.21505) of a real book: Debian's installation guide in 19 languages.

A model learns the versions.  Its neurons are chosen by joint and by conditional probability and taken out, language by
language, beside as many random ones.  Then it goes on: with the same text, and with paragraphs beside their English
ones, which stands for the alignment of the paper; paragraphs beside strangers tell what the pairing itself does.
Published: alignment keeps 92 to 96 % of the neurons, has fewer specific ones, more related and more general ones.
"""

import statistics
from collections.abc import Iterator

import torch
from sigma_neurons.ablation import deactivation_matrix
from sigma_neurons.counting import ActivationCounter
from sigma_neurons.matrices import masks_of
from sigma_neurons.measured import Run as Measured
from sigma_neurons.measured import load
from sigma_neurons.stats import ActivationStats
from sigma_train.by_language import batches_of_language
from sigma_train.dataset import TokenDataset
from sigma_train.model import precision
from torch import Tensor

from sigma_experiments import guide_page, guide_texts
from sigma_experiments.going_on import go_on
from sigma_experiments.guide_found import JUDGED, WAYS, After, Before, identified
from sigma_experiments.guide_texts import strangers
from sigma_experiments.lab import SHORT, Lab, Run, Trained
from sigma_experiments.page import Page

LAYERS, EXPERTS = 6, 8
SEED_AFTER = 1000  # added to a seed: the same text comes in another order
BASE = {
    "model.vocab_size": 2048,
    "model.num_layers": LAYERS,
    "model.num_experts": EXPERTS,
    "model.top_k": 2,
    "model.intermediate_size": 96,
    "model.max_seq_len": 256,
    "router.balance_coef": 1e-2,
    "data.languages": True,
    "data.val_fraction": 0.15,
    "optim.lr": 3e-3,
    "optim.warmup_steps": 30,
    "train.steps": 500,
    "train.batch_size": 8,
    "train.seq_len": 256,  # room for two paragraphs
    "train.eval_every": 500,
    "train.save_every": 250,
}
BRIEF = {**SHORT, "data.max_bytes": None, "model.num_layers": 4, "data.val_fraction": 0.3}
OPTIM_AFTER, STEPS_AFTER = {"lr": 1e-3, "warmup_steps": 10}, 120
BATCHES = 16  # of training text of each language, both halves together


def run(lab: Lab) -> Page:
    texts = guide_texts.made_up() if lab.is_short else guide_texts.versions(lab.folder / "guide")
    paths = guide_texts.write_versions(lab.folder / "text", texts)
    settings = {**BASE, **(BRIEF if lab.is_short else {}), "data.paths": paths}
    trained = [*lab.train([Run("guide", seed, settings) for seed in range(lab.seeds)]).values()]
    steps, batches = (3, 2) if lab.is_short else (STEPS_AFTER, BATCHES)
    config, data = trained[0].config, load(trained[0].folder).data
    size = config.train.seq_len
    pairs = guide_texts.fitting(guide_texts.pairs_of_training(texts, config.data), data.tokenizer, size)
    together = guide_texts.paired(pairs, data, size)
    apart = guide_texts.paired({name: strangers(own) for name, own in pairs.items()}, data, size)
    arms = {"the same text": None, "pairs": together, "strangers": apart}
    with lab.threads() as pool:
        looks = [pool.submit(look, each, batches) for each in trained]
        laters = {
            arm: [pool.submit(later, each, text, steps, batches) for each in trained]
            for arm, text in arms.items()
        }
        before = [future.result() for future in looks]
        after = {arm: [future.result() for future in futures] for arm, futures in laters.items()}
    return guide_page.page(config, before, after, pairs, together.num_windows(size), steps)


def look(trained: Trained, batches: int) -> Before:
    one = load(trained.folder)
    halves = counted(one, 0, batches), counted(one, 1, batches)
    both = halves[0].merge(halves[1])
    found = {way: identified(both, way) for way in WAYS}
    matrices = {
        way: deactivation_matrix(
            one.model,
            masks_of(each, ("specific", "related")),
            lambda: one.losses(JUDGED),
            controls=1,
            seed=trained.run.seed,
        )
        for way, each in found.items()
    }
    return Before(halves, found, matrices)


def later(trained: Trained, text: TokenDataset | None, steps: int, batches: int) -> After:
    """What becomes of it as it goes on with `text`, or with its own."""
    one = load(trained.folder)
    go_on(one, {"optim": OPTIM_AFTER, "train": {"steps": steps, "seed": trained.run.seed + SEED_AFTER}}, text)
    return After(counted(one, 0, batches), statistics.mean(one.losses(JUDGED).values()))


@torch.no_grad()
def counted(one: Measured, half: int, batches: int) -> ActivationStats:
    """On every other of `spread_windows`, from the first (half = 0) or the second."""
    with ActivationCounter(one.model, one.languages) as counter, precision(one.config):
        for language, tokens in spread_windows(one, batches):
            with counter.batch(language, tokens[half::2]):
                one.model(tokens[half::2])
    return counter.stats


def spread_windows(one: Measured, batches: int) -> Iterator[tuple[str, Tensor]]:
    """(language, tokens): of each language as many windows, evenly over all of its training text.

    The first of each are other chapters in each: documents of a split are in the order of their digests.
    """
    t = one.config.train
    found = {
        name: torch.cat([x for x, _ in batches_of_language(one.data.train, name, t.batch_size, t.seq_len)])
        for name in one.languages
    }
    windows = min(batches * t.batch_size, *map(len, found.values()))
    for name, inputs in found.items():
        for tokens in inputs[torch.arange(windows) * len(inputs) // windows].split(t.batch_size):
            yield name, tokens
