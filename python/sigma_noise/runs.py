"""Runs as numbers, for `sigma noise compare`: each run is a measurement, each metric one number of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sigma_train.errors import WrongInput

from sigma_noise import changes, detours
from sigma_noise.attribution import is_state
from sigma_noise.plain import plain
from sigma_noise.project import project
from sigma_noise.reading import read_quanta
from sigma_noise.trace import Trace, digests
from sigma_noise.windows import chosen, is_fixed_time, kernels

N = 2048
PLAN = ("quantum_s", "threads", "sizes", "backend")  # of what a run did: the same of all
Numbers = dict[str, list[float]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Quanta:
    """Fixed work of one rank: begin and length, seconds [n], and where its level changes, [0, ..., n]."""

    rank: int
    start_s: Floats
    seconds: Floats
    bounds: NDArray[np.int64]

    @property
    def own_tau_s(self) -> float:
        """By this rank's jitter in this run."""
        return detours.work_threshold(self.seconds, self.bounds)


class Threshold(NamedTuple):
    """Of detours, by the jitter of one rank in one run of a folder."""

    tau_s: float
    folder: Path
    run: str
    rank: int


@dataclass(frozen=True)
class Arm:
    """Runs of one folder: quanta by run and rank, what they measured, units that were slowed down, and the files of
    each run with their sha256.
    """

    folder: Path
    runs: list[list[Quanta]]
    plan: Mapping[str, Any]
    throttled: tuple[str, ...]
    files: Mapping[str, Mapping[str, str]]

    @property
    def threshold(self) -> Threshold:
        """Of the rank with most jitter, so that no rank's passes for detours, in the middle one of its runs, so that a
        single run cannot hide the detours of all others.
        """
        ranks = zip(*self.runs, strict=True)
        return max(
            median_high(
                Threshold(of.own_tau_s, self.folder, name, of.rank)
                for name, of in zip(self.files, rank, strict=True)
            )
            for rank in ranks
        )

    @property
    def has_detours(self) -> bool:
        """Above the own threshold of some rank in some run."""
        return any(
            len(detours.fixed_work(of.start_s, of.seconds, of.bounds).detours) > 0
            for run in self.runs
            for of in run
        )

    @property
    def samples(self) -> list[Floats]:
        """All times of each run."""
        return [np.concatenate([of.seconds for of in run]) for run in self.runs]

    def numbers(self, tau_s: float) -> Numbers:
        """For each metric a number a run.  A metric that some run cannot tell is left out."""
        found = [metrics_of(run, tau_s) for run in self.runs]
        names = [name for name in found[0] if all(name in one for one in found)]
        return {name: [one[name] for one in found] for name in names}


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
    """Each run is read once.  Raises: WrongInput for a folder without runs, or runs that did not measure the same."""
    runs, plans, throttled, files = [], [], [], {}
    for path in runs_of(folder):
        measured = read_quanta(path)
        name = fixed_work(measured, kernel, path)
        runs.append(quanta_of(measured, name, path))
        about = {"kernel": name, "ranks": len(measured.ranks)} | {k: measured.run.get(k) for k in PLAN}
        plans.append(plain(about))
        throttled += throttled_in(measured)
        files[path.name or path.resolve().name] = digests(path)
    if len(different := sorted({told(plan) for plan in plans})) > 1:
        raise WrongInput(f"{folder}: runs must measure the same, found {' and '.join(different[:2])}")
    return Arm(folder, runs, plans[0], tuple(throttled), files)


def told(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True)


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


def quanta_of(measured: Trace, name: str, path: Path) -> list[Quanta]:
    """Of each rank."""
    found = []
    for rank in measured.ranks:
        series = measured.get(rank, "quantum", name)
        if not len(series):
            raise WrongInput(f"{path}: rank {rank} has no quantum of {name}")
        seconds = np.maximum(series.seconds, 1e-9)
        found.append(Quanta(rank, series.since(int(series.start_ns[0])), seconds, changes.segments(seconds)))
    return found


def metrics_of(run: list[Quanta], tau_s: float) -> dict[str, float]:
    """Means over ranks of fixed work; S(2048) of windows of one quantum, by a tail, where it can be had."""
    of_rank: list[dict[str, float]] = []
    for of in run:
        noise = detours.fixed_work(of.start_s, of.seconds, of.bounds, tau_s)
        of_rank.append(
            {
                "median_s": float(np.median(of.seconds)),
                "p99_s": float(np.quantile(of.seconds, 0.99)),
                "noise_share": noise.share,
                "detours_per_s": noise.per_second,
            }
        )
    found = {key: float(np.mean([one[key] for one in of_rank])) for key in of_rank[0]}
    slowdown = project([of.seconds for of in run], (N,), model="gpd", resamples=2).slowdown[0]
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
