"""Runs as numbers, for `sigma noise compare`: each run is a measurement, each metric one number of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sigma_train.errors import WrongInput
from sigma_train.files import must_be_writable, write_text

from sigma_noise import changes, detours, trace
from sigma_noise.as_json import plain
from sigma_noise.calibrate import calibrate, split
from sigma_noise.compare import MARGINS, Comparison, compare
from sigma_noise.project import project
from sigma_noise.trace import Trace

COMPARISONS = 200  # of A with A, in a calibration
N = 2048
Numbers = dict[str, list[float]]


def judged(
    base: Path,
    new: Path,
    kernel: str | None,
    metrics: Sequence[str] | None,
    margins: Sequence[str],
    calibration: Path | None,
    alpha: float,
    seed: int,
) -> Comparison:
    """Raises: WrongInput for a folder without runs, a metric or margin that is none, or runs that differ in what
    they measured.
    """
    given = dict(map(as_margin, margins))
    if wrong := [name for name in metrics or () if name not in MARGINS]:
        raise WrongInput(f"--metric must be one of {', '.join(MARGINS)}, found {wrong[0]!r}")
    arms = [numbers(runs_of(folder), kernel) for folder in (base, new)]
    throttled = sorted({unit for folder in (base, new) for unit in throttled_in(runs_of(folder))})
    if calibration is not None:
        own = numbers(runs_of(calibration), kernel)
        arm = len(own["median_s"]) // 2
        try:
            pairs = split(own, arm, COMPARISONS, np.random.default_rng(seed))
            given = dict(calibrate(pairs, given).margins)
        except ValueError as error:
            raise WrongInput(f"--calibrate {calibration}: {error}") from None
    common = [name for name in arms[0] if name in arms[1]]
    try:
        return compare(*arms, margins=given, metrics=metrics or common, alpha=alpha, throttled=throttled)
    except ValueError as error:
        raise WrongInput(str(error)) from None


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


def numbers(runs: Sequence[Path], kernel: str | None) -> Numbers:
    """For each metric a number a run.  A metric that some run cannot tell is left out."""
    found = [metrics_of(trace.read(run), kernel, run) for run in runs]
    asked = {json.dumps(plain(what), sort_keys=True) for _, what in found}
    if len(asked) > 1:
        raise WrongInput(f"{runs[0].parent}: runs must measure the same, found {len(asked)} different plans")
    names = [name for name in found[0][0] if all(name in one for one, _ in found)]
    return {name: [one[name] for one, _ in found] for name in names}


def metrics_of(
    measured: Trace, kernel: str | None, path: Path
) -> tuple[dict[str, float], Mapping[str, object]]:
    """Means over ranks of fixed work; S(2048) of windows of one quantum, by a tail, where it can be had."""
    names = [n for n in measured.names() if not n.endswith("_ftq") and n != "a2a"]
    asked = [n for n in (*measured.run.get("kernels", ()), *names) if n in names]
    name = kernel or next(iter(asked), None)
    if name not in names:
        raise WrongInput(
            f"{path}: no fixed work of {name or 'any kernel'} here, of {', '.join(names) or 'none'}"
        )
    of_rank: list[dict[str, float]] = []
    rows = []
    for rank in measured.ranks:
        series = measured.get(rank, "quantum", name)
        seconds = np.maximum(series.seconds, 1e-9)
        if not len(seconds):
            raise WrongInput(f"{path}: rank {rank} has no quantum of {name}")
        start_s = series.since(int(series.start_ns[0]))
        noise = detours.fixed_work(start_s, seconds, changes.segments(seconds))
        of_rank.append(
            {
                "median_s": float(np.median(seconds)),
                "p99_s": float(np.quantile(seconds, 0.99)),
                "noise_share": noise.share,
                "detours_per_s": noise.per_second,
            }
        )
        rows.append(seconds)
    found = {key: float(np.mean([one[key] for one in of_rank])) for key in of_rank[0]}
    slowdown = project(rows, (N,), model="gpd", resamples=2).slowdown[0]
    if np.isfinite(slowdown):
        found["slowdown_2048"] = float(slowdown)
    keys = ("quantum_s", "threads", "sizes", "backend")
    return found, {"kernel": name, "ranks": len(rows)} | {k: measured.run.get(k) for k in keys}


def throttled_in(runs: Sequence[Path]) -> list[str]:
    """Units of which an accelerator's poller told that they were slowed down."""
    found = []
    for run in runs:
        measured = trace.read(run)
        for rank in measured.ranks:
            found += [
                f"{name} of rank {rank}"
                for name, series in measured.of(rank, "event")
                if "thermal" in name or "hw slowdown" in name.lower()
                if len(series)
            ]
    return found


def show(found: Comparison, json_file: Path | None) -> None:
    console = Console()
    table = Table("metric", "new / base", "95 %", "margin", "p", "runs", "verdict")
    for m in found.metrics:
        table.add_row(
            m.name, f"{m.ratio:.4f}", f"{m.low:.4f} to {m.high:.4f}", f"{m.margin:.1%}", f"{m.p:.3g}",
            f"{m.runs[0]}, {m.runs[1]}", str(m.verdict),
        )  # fmt: skip
    console.print(table)
    for reason in found.reasons:
        console.print(reason, highlight=False, soft_wrap=True, markup=False)
    console.print(f"verdict: {found.verdict}", highlight=False)
    if json_file is not None:
        told = {"schema_version": 1, "verdict": str(found.verdict), "exit": int(found.exit), **plain(found)}
        with must_be_writable("--json", json_file.parent):
            write_text(json_file, json.dumps(told, indent=1, allow_nan=False) + "\n")
