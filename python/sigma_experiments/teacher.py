"""Tokens chosen by a teacher of another vocabulary (VocAgnoLM, arXiv 2503.19123), where part of the text is noise.

A teacher is trained on clean text, and reads the students' text once, of which a part cannot be learned.  Students of a
quarter of its active size and another vocabulary see the same tokens and learn from all, or from 40 %: at random, by
their own loss, by how much it is above the teacher's, where tokens of both are paired by their bytes, by edit distance
or by chunks of equal count; or from all, and from how sure the teacher is (ULD).  They are measured on clean text that
nobody has seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sigma_train.alignment import alignment_ios
from sigma_train.config import Config
from sigma_train.console import say
from sigma_train.dataset import PreparedData, prepare
from sigma_train.evaluate import evaluate
from sigma_train.generate import load_run
from sigma_train.kinds import Alignment
from sigma_train.laid_over import Aligned
from sigma_train.model import LanguageModel, flops_per_token
from sigma_train.objective import Objective
from sigma_train.ranks import Ranks
from sigma_train.spans import spans_of_lengths
from sigma_train.teacher import open_teacher
from sigma_train.teacher_cache import cache_losses
from sigma_train.teacher_file import TeacherLosses, read_losses
from torch import Tensor

from sigma_experiments import sparse
from sigma_experiments.lab import SHORT, Lab, Run, Trained
from sigma_experiments.noisy_text import BESIDE_NOISE, CLEAN, NOISE, Texts, write_texts
from sigma_experiments.page import Page, spread, table

TEXT_BYTES, SHORT_BYTES = 2_400_000, 80_000
STEPS, TEACHER_STEPS = 240, 400
NOT_SHORT = ("random", "chunk", "random-longer", "student-longer")
TOP = 64  # probabilities of the teacher that ULD sees
COVERED_TOKENS = 20_000  # of the student's, over which alignments are looked at
LOOKS = 16  # batches of the training text over which a trained student's choice is counted
COMMON = {
    "router.balance": "global",
    "data.val_fraction": 0.02,
    "optim.lr": 3e-3,
    "optim.schedule": "wsd",
    "optim.warmup_steps": 30,
    "train.batch_size": 32,
    "train.eval_every": 100,
    "train.save_every": 200,
}
STUDENT = {
    **COMMON,
    "model.vocab_size": 512,
    "model.num_layers": 4,
    "model.num_experts": 8,
    "train.steps": STEPS,
}
TEACHER = {
    **COMMON,
    "model.vocab_size": 1024,
    "model.hidden_size": 128,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.intermediate_size": 128,
    "model.num_layers": 4,
    "model.num_experts": 16,
    "train.steps": TEACHER_STEPS,
}
GUIDED = {"objective.kind": "teacher_guided"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("all tokens", {}),
    "random": ("40 % at random", {"objective.kind": "random"}),
    "student": ("40 % by the student's loss", {"objective.kind": "student"}),
    "guided": ("40 % by the gap to the teacher", GUIDED),
    "edit": ("the same, paired by edit distance", {**GUIDED, "objective.alignment": "edit"}),
    "chunk": ("the same, paired by chunks", {**GUIDED, "objective.alignment": "chunk"}),
    "uld": ("all tokens, and ULD", {"objective.kind": "uld"}),
}
ALONE = ("plain", "random", "student")  # without a teacher
LONGER = {name: f"{name}-longer" for name in ALONE}
ARMS |= {
    LONGER[name]: (f"{ARMS[name][0]}, FLOPs of the teacher's reading added", ARMS[name][1]) for name in ALONE
}


@dataclass(frozen=True)
class Costs:
    """FLOPs: of a student's step, of the teacher's reading, of the teacher's training."""

    step: float
    reading: float
    training: float

    @property
    def longer(self) -> int:
        """Steps of a student that the reading pays for."""
        return round(self.reading / self.step)


def run(lab: Lab) -> Page:
    texts = write_texts(lab.folder / "text", SHORT_BYTES if lab.is_short else TEXT_BYTES)
    teacher = Run("teacher", 0, settings(lab, TEACHER, texts.teacher, {}))
    alone = lab.train([teacher, *students(lab, texts, *ALONE)])  # these while the teacher is trained
    trained_teacher = alone.pop(teacher)
    place, losses = read_by(trained_teacher, lab, texts)
    costs = costs_of(trained_teacher, lab, texts, losses)
    guided = lab.train(
        [
            *students(lab, texts, *LONGER.values(), more_steps=costs.longer),  # no core waits for a long one
            *students(lab, texts, *(name for name in ARMS if reads_teacher(name)), teacher=place),
        ]
    )
    found = sparse.by_arm(alone | guided)
    trained = {name: found[name] for name in ARMS if name in found}
    with lab.threads() as pool:
        of_text = pool.submit(covered_by, student_config(lab, texts), losses)
        of_arms = {name: pool.submit(kept_by, trained[name], texts) for name in trained if chooses(name)}
        bits = {name: [*pool.map(lambda each: on_clean_text(each, texts), trained[name])] for name in trained}
        kept, covered = {name: of_arm.result() for name, of_arm in of_arms.items()}, of_text.result()
    return Page(
        "Tokens chosen by a teacher of another vocabulary",
        text(trained, trained_teacher, losses, costs, bits, kept, covered),
        {"quality": quality_figure(bits), "kept": kept_figure(kept)},
        {
            "bits_per_byte": bits,
            "kept": kept,
            "flops": vars(costs),
            "covered": covered,
            "teacher": losses.record,
        },
    )


def settings(lab: Lab, base: Mapping[str, Any], place: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    short = SHORT if lab.is_short else {}
    return {**base, "data.paths": (str(place),), **more, **short}


def reads_teacher(name: str) -> bool:
    return ARMS[name][1].get("objective.kind") in ("teacher_guided", "uld")


def chooses(name: str) -> bool:
    """Whether it learns from some tokens alone; of all of them `plain` stands for the others."""
    return ARMS[name][1].get("objective.kind") != "uld" and name not in LONGER.values()


def students(
    lab: Lab, texts: Texts, *names: str, teacher: Path | None = None, more_steps: int = 0
) -> list[Run]:
    own: dict[str, Any] = {} if teacher is None else {"objective.teacher": str(teacher)}
    runs = []
    for name in names:
        if lab.is_short and name in NOT_SHORT:
            continue
        of_arm = settings(lab, STUDENT, texts.student, ARMS[name][1] | own)
        steps = of_arm["train.steps"]
        of_arm["train.steps"] += min(more_steps, steps) if lab.is_short else more_steps
        runs += [Run(name, seed, of_arm) for seed in range(lab.seeds)]
    return runs


def read_by(teacher: Trained, lab: Lab, texts: Texts) -> tuple[Path, TeacherLosses]:
    """The file of the teacher's losses on the students' text, which has its name of the teacher."""
    opened = open_teacher(teacher.folder)
    place = lab.folder / f"losses-{opened.digest[:12]}-top{TOP}"
    data = student_config(lab, texts).data
    say(lab.console, cache_losses(opened, data, place, None, None, 4096, "f16", lab.console, TOP))
    return place, read_losses(place, "experiment")


def student_config(lab: Lab, texts: Texts) -> Config:
    return Run("student", 0, settings(lab, STUDENT, texts.student, {})).config(lab.folder)


def costs_of(teacher: Trained, lab: Lab, texts: Texts, losses: TeacherLosses) -> Costs:
    """A forward is a third of a training step's FLOPs; what windows overlap by is read twice."""
    config = student_config(lab, texts)
    t, of_teacher = config.train, teacher.config.train
    per_token = [flops_of(each) for each in (config, teacher.config)]
    reading = losses.record["reading"]
    twice = reading["context"] / (reading["context"] - reading["overlap"])
    return Costs(
        per_token[0] * t.batch_size * t.seq_len,
        per_token[1] / 3 * len(losses.loss) * twice,
        per_token[1] * of_teacher.batch_size * of_teacher.seq_len * of_teacher.steps,
    )


def flops_of(config: Config) -> int:
    with torch.device("meta"):
        return flops_per_token(LanguageModel(config), config)


def on_clean_text(trained: Trained, texts: Texts) -> float:
    """Bits per byte of all that was held out."""
    config, model, tokenizer = load_run(trained.folder)
    everything = config.model_copy(update={"train": config.train.model_copy(update={"eval_batches": 10**6})})
    return evaluate(model, texts.clean(tokenizer), everything)


@torch.no_grad()
def kept_by(runs: Sequence[Trained], texts: Texts) -> list[dict[str, float]]:
    """Of what each trained student would keep: which share of each kind of token, and how much of it is noise.

    The runs of one arm, which differ in their seed: the teacher's tokens are laid over theirs once.
    """
    data = prepare(runs[0].config)
    objective = Objective(runs[0].config, data, Ranks())
    kinds = torch.from_numpy(texts.kinds(data.train, runs[0].config.data))
    found = []
    for run in runs:
        objective.config = run.config
        found.append(_kept_by(run, data, objective, kinds))
    return found


def _kept_by(run: Trained, data: PreparedData, objective: Objective, kinds: Tensor) -> dict[str, float]:
    config, model, _ = load_run(run.folder)
    t = config.train
    kept, all_ = torch.zeros(4), torch.zeros(4)
    for batch in range(LOOKS):
        inputs, targets = data.train.batch(batch, t.batch_size, t.seq_len, t.seed)
        losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape)
        weights = torch.ones_like(losses)
        if config.objective.kind != "plain":
            weights, _ = objective.weights(losses, batch)
        kind = kinds[data.train.target_places(batch, t.batch_size, t.seq_len, t.seed)].flatten().long()
        kept += torch.bincount(kind, weights.flatten(), minlength=4)
        all_ += torch.bincount(kind, minlength=4)
    of_text, rate = kept[: NOISE + 1].sum(), kept / all_.clamp(min=1)
    return {
        "clean": rate[CLEAN].item(),
        "beside_noise": rate[BESIDE_NOISE].item(),
        "noise": rate[NOISE].item(),
        "noise_of_kept": (kept[NOISE] / of_text).item(),
    }


def covered_by(config: Config, losses: TeacherLosses) -> dict[str, float]:
    """Of the student's bytes, the share that each alignment's teacher tokens share, over the first documents."""
    data = prepare(config)
    lengths = data.train.token_bytes[data.train.tokens[:COVERED_TOKENS]]
    spans = torch.from_numpy(spans_of_lengths(lengths))
    teacher = torch.stack([losses.begins, losses.ends], dim=1)
    found = {}
    for kind in get_args(Alignment):
        shared, of_all = 0.0, 0
        over = Aligned(kind, strings=data.tokenizer.pieces).over(data.train, losses.begins, losses.ends)
        for tokens, of_teacher, ranges in over:
            if tokens.stop > len(spans) and of_all:
                break
            student = spans[tokens]
            ranges = ranges[: len(student)]
            sizes = student[:, 1] - student[:, 0]
            share = alignment_ios(student, teacher[of_teacher], ranges)
            shared += (share.nan_to_num() * sizes).sum().item()
            of_all += int(sizes.sum())
        found[kind] = shared / of_all
    return found


def text(
    trained: dict[str, list[Trained]],
    teacher: Trained,
    losses: TeacherLosses,
    costs: Costs,
    bits: dict[str, list[float]],
    kept: dict[str, list[dict[str, float]]],
    covered: dict[str, float],
) -> str:
    student = trained["plain"][0].config
    quality = [
        [
            ARMS[name][0],
            str(runs[0].config.train.steps),
            spread(bits[name], 4),
            f"{costs.step * runs[0].config.train.steps:.2e}",
            f"{costs.step * runs[0].config.train.steps + costs.reading * reads_teacher(name):.2e}",
        ]
        for name, runs in trained.items()
    ]
    columns = (
        "learned from",
        "steps",
        "bits per byte, clean text",
        "FLOPs of the student",
        "and of the reading",
    )
    chosen = [
        [ARMS[name][0], *(percent(rates, key) for key in ("clean", "beside_noise", "noise", "noise_of_kept"))]
        for name, rates in kept.items()
    ]
    rates = (
        "learned from",
        "kept of clean documents",
        "kept of clean tokens in noisy ones",
        "kept of noise",
        "noise in what is kept",
    )
    seeds = sparse.seeds_of(trained["plain"])
    return f"""
In three of ten documents of the students' text, three of ten characters are drawn anew. Students:
{student.model.num_layers} layers of {student.model.num_experts} experts, hidden size
{student.model.hidden_size}, vocabulary {student.model.vocab_size},
{student.train.batch_size * student.train.seq_len:,} tokens a step; {seeds}, mean [lowest, highest]. The teacher: hidden
size {teacher.config.model.hidden_size}, {teacher.config.model.num_experts} experts, vocabulary
{teacher.config.model.vocab_size}, trained on other, clean text for {teacher.config.train.steps} steps; on the
students' text it has {losses.bits_per_byte:.4f} bits per byte, noise and all. All is Python source.

{table(columns, quality)}

![Bits per byte on clean text](teacher-quality.png)

Equal steps, and so equal FLOPs of the student, in all rows but the last ones. These are the students without a teacher
with as many FLOPs as a guided one and the teacher's reading of the text
({costs.reading:.2e}) together, in a short form at most twice the steps. The teacher's
training, {costs.training:.2e} FLOPs, is counted nowhere. All students begin anew; the teacher is one. ULD
adds {student.objective.uld_weight:g} times the distance between the sorted probabilities of the student and the
teacher's {TOP} highest, tokens paired by their bytes, and leaves none out.

Of a student's token the teacher's that it is paired with cover, in the mean over bytes: by bytes
{percent_of(covered["span"])}, by edit distance {percent_of(covered["edit"])}, by {student.objective.chunks} chunks of
equal count in each document {percent_of(covered["chunk"])}, by position {percent_of(covered["index"])}.

{table(rates, chosen)}

![What is kept](teacher-kept.png)

What a trained student would keep of the first {LOOKS} batches of its training. A token counts as noise if one of its
characters was drawn. The teacher knows clean text alone: beside noise it does badly as well, so that clean tokens there
are left out with it.
"""


def percent_of(share: float) -> str:
    return f"{100 * share:.1f} %"


def percent(rates: Sequence[dict[str, float]], key: str) -> str:
    return spread([100 * each[key] for each in rates], 1, " %")


def quality_figure(bits: dict[str, list[float]]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 1 + 0.33 * len(bits)))
    for place, values in enumerate(bits.values()):
        axes.plot([np.mean(values)], [place], "o", color=f"C{place}")
        axes.plot(values, [place] * len(values), "|", color=f"C{place}", markersize=14)
    axes.set_xlabel("bits per byte on clean text that nobody has seen; a mark a seed")
    _name_rows(axes, list(bits))
    figure.tight_layout()
    return figure


def kept_figure(kept: dict[str, list[dict[str, float]]]) -> Figure:
    groups = {"clean": "clean documents", "beside_noise": "clean tokens of noisy documents", "noise": "noise"}
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(kept)))
    for offset, (key, label) in enumerate(groups.items()):
        values = [100 * np.mean([each[key] for each in rates]) for rates in kept.values()]
        axes.barh(np.arange(len(kept)) + 0.27 * (offset - 1), values, 0.25, label=label)
    axes.set_xlabel("kept, %")
    axes.legend(fontsize=8)
    _name_rows(axes, list(kept))
    figure.tight_layout()
    return figure


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [ARMS[name][0] for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
