"""Runs as numbers, for `sigma noise compare`: each run is a measurement, each metric one number of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sigma_train.console import say
from sigma_train.errors import WrongInput
from sigma_train.files import must_be_writable, write_text

from sigma_noise import changes, detours
from sigma_noise.attribution import is_state
from sigma_noise.calibrate import calibrate, split
from sigma_noise.compare import MARGINS, Comparison, compare
from sigma_noise.plain import plain
from sigma_noise.project import project
from sigma_noise.reading import read_quanta
from sigma_noise.shape import Shape, shape
from sigma_noise.trace import Trace
from sigma_noise.windows import chosen, is_fixed_time, kernels

COMPARISONS = 200  # of A with A, in a calibration
N = 2048
PLAN = ("quantum_s", "threads", "sizes", "backend")  # of what a run did: the same of all
Numbers = dict[str, list[float]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """Runs of one folder: for each metric a number a run, the times of each, what they measured, and units that were
    slowed down.
    """

    folder: Path
    numbers: Numbers
    samples: list[Floats]
    plan: str
    throttled: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """The verdicts, and how much all times differ in shape, which decides nothing."""

    comparison: Comparison
    shape: Shape


def judged(
    base: Path,
    new: Path,
    kernel: str | None,
    metrics: Sequence[str] | None,
    margins: Sequence[str],
    calibration: Path | None,
    alpha: float,
    seed: int,
) -> Judged:
    """Raises: WrongInput for a folder without runs, a metric or margin that is none, or runs that differ in what
    they measured.
    """
    given = dict(map(as_margin, margins))
    if wrong := [name for name in metrics or () if name not in MARGINS]:
        raise WrongInput(f"--metric must be one of {', '.join(MARGINS)}, found {wrong[0]!r}")
    arms = [arm_of(base, kernel), arm_of(new, kernel)]
    own = [] if calibration is None else [arm_of(calibration, kernel)]
    for arm in (*arms, *own):
        if arm.plan != arms[0].plan:
            raise WrongInput(
                f"{arm.folder}: runs must measure what {base} has, {arms[0].plan}, found {arm.plan}"
            )
    try:
        for arm in own:
            pairs = split(
                arm.numbers, len(arm.numbers["median_s"]) // 2, COMPARISONS, np.random.default_rng(seed)
            )
            given = dict(calibrate(pairs, given).margins)
    except ValueError as error:
        raise WrongInput(f"--calibrate {calibration}: {error}") from None
    common = [name for name in arms[0].numbers if name in arms[1].numbers]
    throttled = sorted({unit for arm in arms for unit in arm.throttled})
    try:
        found = compare(
            *(arm.numbers for arm in arms),
            margins=given,
            metrics=metrics or common,
            alpha=alpha,
            throttled=throttled,
        )
    except ValueError as error:
        raise WrongInput(str(error)) from None
    return Judged(found, shape(arms[0].samples, arms[1].samples, seed=seed))


def as_margin(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        if name in MARGINS and 0 <= float(value) < float("inf"):
            return name, float(value)
    except ValueError:
        pass
    raise WrongInput(f"--margin must be like median_s=0.02, of {', '.join(MARGINS)}, found {text!r}")


def runs_of(folder: Path) -> list[Path]:
    """Folders of measurements in a folder; it may be one itself."""
    found = (
        sorted(path for path in folder.iterdir() if any(path.glob("*.parquet"))) if folder.is_dir() else []
    )
    if not found and folder.is_dir() and any(folder.glob("*.parquet")):
        found = [folder]
    if not found:
        raise WrongInput(f"{folder}: no runs here; each is a folder that `sigma noise run --out` made")
    return found


def arm_of(folder: Path, kernel: str | None) -> Arm:
    """Each run is read once.  A metric that some run cannot tell is left out."""
    numbers: list[dict[str, float]] = []
    plans, throttled, samples = [], [], []
    for path in runs_of(folder):
        measured = read_quanta(path)
        name = fixed_work(measured, kernel, path)
        rows = times_of(measured, name, path)
        numbers.append(metrics_of(rows))
        samples.append(np.concatenate([seconds for _, seconds in rows]))
        about = {"kernel": name, "ranks": len(measured.ranks)} | {k: measured.run.get(k) for k in PLAN}
        plans.append(json.dumps(plain(about), sort_keys=True))
        throttled += throttled_in(measured)
    if len(different := sorted(set(plans))) > 1:
        raise WrongInput(f"{folder}: runs must measure the same, found {' and '.join(different[:2])}")
    names = [name for name in numbers[0] if all(name in one for one in numbers)]
    by_name = {name: [one[name] for one in numbers] for name in names}
    return Arm(folder, by_name, samples, plans[0], tuple(throttled))


def fixed_work(measured: Trace, kernel: str | None, path: Path) -> str:
    """Raises: WrongInput for a kernel of fixed time, or none."""
    names = [name for name in kernels(measured) if not is_fixed_time(measured, name)]
    only = Trace(
        measured.run, measured.ranks, {key: s for key, s in measured.rows.items() if key[2] in names}
    )
    try:
        name = chosen(only, kernel)
    except ValueError:
        name = ""
    if not name:
        raise WrongInput(
            f"{path}: --kernel must be fixed work that was measured, of {', '.join(names) or 'none'}, found "
            f"{kernel or 'none'}"
        )
    return name


def times_of(measured: Trace, name: str, path: Path) -> list[tuple[Floats, Floats]]:
    """Begin and length of the quanta of each rank, seconds."""
    rows = []
    for rank in measured.ranks:
        series = measured.get(rank, "quantum", name)
        if not len(series):
            raise WrongInput(f"{path}: rank {rank} has no quantum of {name}")
        rows.append((series.since(int(series.start_ns[0])), np.maximum(series.seconds, 1e-9)))
    return rows


def metrics_of(rows: list[tuple[Floats, Floats]]) -> dict[str, float]:
    """Means over ranks of fixed work; S(2048) of windows of one quantum, by a tail, where it can be had."""
    of_rank: list[dict[str, float]] = []
    for start_s, seconds in rows:
        noise = detours.fixed_work(start_s, seconds, changes.segments(seconds))
        of_rank.append(
            {
                "median_s": float(np.median(seconds)),
                "p99_s": float(np.quantile(seconds, 0.99)),
                "noise_share": noise.share,
                "detours_per_s": noise.per_second,
            }
        )
    found = {key: float(np.mean([one[key] for one in of_rank])) for key in of_rank[0]}
    slowdown = project([seconds for _, seconds in rows], (N,), model="gpd", resamples=2).slowdown[0]
    if np.isfinite(slowdown):
        found["slowdown_2048"] = float(slowdown)
    return found


def throttled_in(measured: Trace) -> list[str]:
    """Reasons of accelerators to slow down that held while they were polled."""
    found = []
    for rank, about in measured.ranks.items():
        poller: dict[str, Any] = about.get("accelerators") or {}
        for name, series in measured.of(rank, "event"):
            is_of_device = any(name.startswith(f"{device} ") for device in poller.get("devices", ()))
            if is_of_device and len(series) and not is_state(name):
                found.append(f"{name} of rank {rank}")
    return found


def show(judged: Judged, json_file: Path | None) -> None:
    found, differ = judged.comparison, judged.shape
    console = Console()
    table = Table("metric", "new / base", "95 %", "margin", "p", "runs", "verdict")
    for m in found.metrics:
        table.add_row(
            m.name, f"{m.ratio:.4f}", f"{m.low:.4f} to {m.high:.4f}", f"{m.margin:.1%}", f"{m.p:.3g}",
            f"{m.runs[0]}, {m.runs[1]}", str(m.verdict),
        )  # fmt: skip
    console.print(table)
    told = (
        f"all times, which decide nothing: {differ.wasserstein_log:.2%} apart (Wasserstein-1 of their logarithms, "
        f"p {differ.p:.3g}), {differ.similarity:.3f} similar"
    )
    say(console, told)
    for reason in found.reasons:
        say(console, reason)
    say(console, f"verdict: {found.verdict}")
    if json_file is not None:
        verdict = {"schema_version": 1, "verdict": str(found.verdict), "exit": int(found.exit)}
        with must_be_writable("--json", json_file.parent):
            whole = verdict | plain(found) | {"shape": plain(differ)}
            write_text(json_file, json.dumps(whole, indent=1, allow_nan=False) + "\n")
