"""What `growth` trains: a small model, what grows from it at points of its training, and the grown shapes from scratch.

Beside them each small model is trained on without growth, as the grown ones are.

Everything is compared by FLOPs: extra are those of a run itself, total with what its weights had cost before.  The rate
is constant after its warm-up, so that a point is not one of a decay.  Grown runs and those from scratch see the same
text in the same order, and the small model another order, that of seed + 100.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sigma_train.checkpoint import place_of
from sigma_train.config import Config
from sigma_train.dataset import prepare
from sigma_train.evaluate import evaluate
from sigma_train.generate import load_run
from sigma_train.grow_run import Base, grow_run
from sigma_train.growth_config import grown_config
from sigma_train.growth_cost import mean_flops_per_token
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth
from sigma_train.plan_shapes import unfilled

from sigma_experiments.lab import SHORT, Lab, Run, Trained

BASE = {
    "model.vocab_size": 512,
    "model.hidden_size": 48,
    "model.head_dim": 24,
    "model.intermediate_size": 48,
    "model.num_layers": 4,
    "model.num_experts": 8,
    "model.top_k": 2,
    "router.normalize": True,
    "data.max_bytes": 20_000_000,
    "optim.lr": 3e-3,
    "optim.schedule": "wsd",
    "optim.min_lr_ratio": 1.0,
    "optim.warmup_steps": 20,
    "train.batch_size": 32,
    "train.eval_batches": 8,
}
KINDS = ("interposition", "stack")
OTHER_TEXT = 100  # added to the seed of the small model


@dataclass(frozen=True)
class Size:
    """Attributes: points: where it grows, in units of so many steps; look: steps of a deeper model between two
    validations; looks: how many of these it is trained for; noises: of wider ones.
    """

    unit: int
    points: tuple[int, ...]
    look: int
    looks: int
    noises: tuple[float, ...]

    @property
    def steps(self) -> int:
        return self.unit * self.points[-1]


# Ten units are 2.2 M tokens, 20 for each active parameter: one Chinchilla budget.
FULL, BRIEF = Size(54, (1, 3, 10), 30, 2, (0.0, 0.01, 0.5)), Size(1, (2,), 2, 2, (0.01,))


@dataclass(frozen=True)
class Arm:
    """A growth at a point, of each seed the same."""

    name: str
    target: str  # the shape that it becomes: "deep" or "wide", or "small" where nothing grows
    point: int
    growth: Growth


@dataclass(frozen=True)
class Curve:
    """One training.  begin: bits per byte of the weights that it began with; none: of scratch."""

    trained: Trained
    sunk: float
    begin: float | None = None

    @functools.cached_property
    def flops(self) -> list[float]:
        """Extra ones, at each validation."""
        steps = [step for step, _ in self.trained.validation]
        of_step = flops_per_step(self.trained.config)
        return [of_step * step for step in ([] if self.begin is None else [0]) + steps]

    @functools.cached_property
    def bits(self) -> list[float]:
        return ([] if self.begin is None else [self.begin]) + [bits for _, bits in self.trained.validation]

    @property
    def extra(self) -> float:
        return self.flops[-1]

    def at(self, flops: float) -> float:
        """Between two validations by a straight line."""
        return float(np.interp(flops, self.flops, self.bits))


def arms(size: Size, n: int) -> list[Arm]:
    deep = [
        Arm(f"{kind}-{point}", "deep", point, Growth(getattr(LayerGrowthPlan, kind)(n)))
        for kind in KINDS
        for point in size.points
    ]
    none, last = LayerGrowthPlan.none(n), size.points[-1]
    same = [Arm(same_as(point), "small", point, Growth(none)) for point in size.points]
    return (
        same + deep + [Arm(f"wide-{noise:g}", "wide", last, Growth(none, 2, noise)) for noise in size.noises]
    )


def same_as(point: int) -> str:
    """The arm that does not grow there."""
    return f"not-grown-{point}"


def chinchilla_flops(config: Config) -> tuple[int, float]:
    """N, its active parameters, and one Chinchilla budget of them, 6 N (20 N)."""
    n = unfilled(config).active_parameters()
    return n, 6.0 * n * 20 * n


def flops_per_step(config: Config) -> float:
    t = config.train
    return mean_flops_per_token(config, 1) * t.batch_size * t.seq_len


def train(lab: Lab, size: Size) -> tuple[dict[str, list[Curve]], list[Path]]:
    """Curves by arm, of each seed; and the last checkpoint of each small model."""
    shared = {**BASE, **(SHORT if lab.is_short else {})}
    kept = {"train.save_every": size.unit, "train.keep": size.points[-1]}
    length = {"train.steps": size.steps, "train.eval_every": size.look}
    bases = [Run("small", seed + OTHER_TEXT, {**shared, **kept, **length}) for seed in range(lab.seeds)]
    config = bases[0].config(lab.folder)
    chosen = arms(size, config.model.num_layers)
    lengths = {arm.target: _length(config, arm, size) for arm in chosen}
    shapes = {arm.target: shape(config, arm) for arm in chosen}
    scratch = [
        Run(f"scratch-{target}", seed, {**shared, **lengths[target].scratch, **shapes[target]})
        for target in lengths
        if target != "small"
        for seed in range(lab.seeds)
    ]
    trained = lab.train([*scratch, *bases])  # the longest first, so that no core waits for one at the end
    small = [trained[base] for base in bases]
    folders, sunk = {}, {}
    for seed, base in enumerate(small):
        for arm in chosen:
            begin = lab.folder / f"{arm.name}-seed{seed}.begin"
            _grow(checkpoint(base, arm.point * size.unit), arm, begin)
            own = lengths[arm.target].grown | shapes[arm.target] | {"train.init_from": str(begin)}
            run = Run(arm.name, seed, {**shared, **own})
            sunk[run] = flops_per_step(base.config) * arm.point * size.unit
            folders[run] = begin
    with lab.threads() as pool:
        begins = dict(zip(folders, pool.map(bits_of, folders.values()), strict=True))
    curves: dict[str, list[Curve]] = {"small": [Curve(each, 0.0) for each in small]}
    for run, each in (lab.train(list(folders)) | {run: trained[run] for run in scratch}).items():
        curves.setdefault(run.arm, []).append(Curve(each, sunk.get(run, 0.0), begins.get(run)))
    return curves, [checkpoint(base, size.steps) for base in small]


def checkpoint(base: Trained, step: int) -> Path:
    return place_of(base.folder / "checkpoints", step)


def bits_of(begin: Path) -> float:
    """Of validation, before a step is made."""
    config, model, _ = load_run(begin)
    return evaluate(model, prepare(config).val, config)


def shape(small: Config, arm: Arm) -> dict[str, Any]:
    model = grown_config(small, arm.growth).model
    return {f"model.{key}": getattr(model, key) for key in ("num_layers", "num_experts", "top_k")}


@dataclass(frozen=True)
class _Length:
    """Steps and looks, as settings."""

    grown: dict[str, int]
    scratch: dict[str, int]


def _length(small: Config, arm: Arm, size: Size) -> _Length:
    """Looks of the same FLOPs whatever the shape; from scratch to the total of the last point."""
    deep = Growth(LayerGrowthPlan.interposition(small.model.num_layers))
    price = flops_per_step(grown_config(small, arm.growth))
    look = round(size.look * flops_per_step(grown_config(small, deep)) / price)
    sunk = round(size.steps * flops_per_step(small) / price)
    return _Length(
        {"train.steps": size.looks * look, "train.eval_every": look},
        {"train.steps": size.looks * look + sunk, "train.eval_every": look},
    )


def _grow(source: Path, arm: Arm, begin: Path) -> None:
    """Once; the folder is whole or absent."""
    if not begin.exists():
        grow_run(Base.named(source), arm.growth, "reset", begin)
