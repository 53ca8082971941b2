"""Which disturbances this machine lets us see: stops of this process, by length and rate, found among its own noise.

A cell injects stops of one length at one rate for some seconds and measures detours meanwhile.  Recall is the share of
stops that detours of at least half their length overlap; precision the share of such detours that overlap a stop.  The
detection limit of a rate is the shortest length from which on both are at least `GOOD`.  The period is that of the
strongest train in these detours.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sigma_train.errors import Failure, WrongInput

from sigma_noise import periods
from sigma_noise.inject import Plan
from sigma_noise.inject_cli import BEGINS
from sigma_noise.loops import detours
from sigma_noise.plain import plain
from sigma_noise.spans import match
from sigma_noise.trace import Series, read

SCHEMA_VERSION = 1
GOOD = 0.95
LENGTHS_S = (0.2e-3, 1e-3, 5e-3, 20e-3)
RATES_HZ = (2.0, 5.0, 10.0)
EXTRA_S = 1.0  # of measuring beyond the injection, which takes a moment to begin


@dataclass(frozen=True)
class Cell:
    """Ratios are NaN where there was nothing to find; intervals are Wilson's, 95 %.  `period_error` is found / injected
    - 1, NaN where no period was found or detours are too few for one.
    """

    length_s: float
    rate_hz: float
    injected: int
    recall: float
    recall_low: float
    recall_high: float
    found: int
    precision: float
    mean_length_s: float
    period_error: float

    @property
    def is_good(self) -> bool:
        return self.recall >= GOOD and self.precision >= GOOD


def measure_cell(length_s: float, rate_hz: float, *, duration_s: float) -> Cell:
    """Inject and measure once.  Raises: Failure if the injector fails."""
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.parquet"
        options = ["--target", "proc", "--pid", str(os.getpid()), "--duration", f"{duration_s}s"]
        options += ["--length", f"{length_s}s", "--period", f"{1 / rate_hz}s"]
        with injecting(truth, *options):
            begin_ns = time.monotonic_ns()
            found, info = detours(duration_s=duration_s + EXTRA_S, threshold_s=min(length_s / 2, 1e-3))
        stops = since(read(truth).get(0, "event", "stop"), begin_ns)
    if info.lost:
        raise Failure(
            f"{info.lost} detours had no place in memory: this machine is too noisy for a self-test"
        )
    return judge(stops, found, length_s, rate_hz)


def judge(stops: Series, found: Series, length_s: float, rate_hz: float) -> Cell:
    """Compare a log with detours until its last stop ends; then the injector writes and ends, on this CPU maybe."""
    end_ns = stops.end_ns[-1] if len(stops) else np.iinfo(np.int64).max
    long = (found.seconds >= length_s / 2) & (found.start_ns < end_ns)
    result = match(stops, Series(found.start_ns[long], found.end_ns[long], found.value[long]))
    hits = int(result.is_found.sum())
    low, high = binomtest(hits, len(stops)).proportion_ci(method="wilson") if len(stops) else (np.nan, np.nan)
    lengths = result.length_s[result.is_found]
    return Cell(
        length_s=length_s,
        rate_hz=rate_hz,
        injected=len(stops),
        recall=result.recall,
        recall_low=float(low),
        recall_high=float(high),
        found=int(long.sum()),
        precision=result.precision,
        mean_length_s=float(lengths.mean()) if len(lengths) else float("nan"),
        period_error=period_error(stops, found.start_ns[long], rate_hz) if len(stops) else float("nan"),
    )


def period_error(stops: Series, found_ns: NDArray[np.int64], rate_hz: float) -> float:
    """Of detours from half a period before the first stop on; the strongest train may be another's."""
    begin_ns = int(stops.start_ns[0]) - round(0.5e9 / rate_hz)
    window_s = float(stops.end_ns[-1] - begin_ns) * 1e-9
    at_s = (found_ns[found_ns >= begin_ns] - begin_ns) * 1e-9
    low_hz, high_hz = periods.BLOCK_PERIODS / window_s, max(periods.MOST_HZ, 2 * rate_hz)
    if len(at_s) < periods.FEWEST_STAMPS or low_hz >= rate_hz:
        return float("nan")
    found = periods.find(at_s, window_s, low_hz=low_hz, high_hz=high_hz, most=1)
    return found[0].period_s * rate_hz - 1 if found else float("nan")


def since(series: Series, begin_ns: int) -> Series:
    """Without what began before the measurement did."""
    live = series.start_ns >= begin_ns
    return Series(series.start_ns[live], series.end_ns[live], series.value[live])


def curve(
    lengths_s: Sequence[float] = LENGTHS_S,
    rates_hz: Sequence[float] = RATES_HZ,
    *,
    duration_s: float = 4.0,
    seed: int = 0,
) -> list[Cell]:
    """All cells, in an order drawn from the seed, so that a noisy minute does not hit one length alone.

    Raises: WrongInput, before anything is injected, for stops that are none or would overlap; Failure.
    """
    check(lengths_s, rates_hz, duration_s)
    pairs = [(length, rate) for length in sorted(lengths_s) for rate in sorted(rates_hz)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    cells = {i: measure_cell(*pairs[i], duration_s=duration_s) for i in order.tolist()}
    return [cells[i] for i in range(len(pairs))]


def check(lengths_s: Sequence[float], rates_hz: Sequence[float], duration_s: float) -> None:
    """Raises: WrongInput, by the option."""
    for rate in rates_hz:
        if not 0 < rate < float("inf"):
            raise WrongInput(f"--rate must be stops a second above 0, found {rate:g}")
        for length in lengths_s:
            try:
                Plan(duration_s, length, 1 / rate)
            except ValueError as error:
                raise WrongInput(f"--length {length:g} s at --rate {rate:g}: {error}") from None


def limits(cells: Sequence[Cell]) -> dict[float, float | None]:
    """By rate, the shortest length from which on all are good; None where the longest is not."""
    found: dict[float, float | None] = {}
    for rate in sorted({c.rate_hz for c in cells}):
        found[rate] = None
        for cell in sorted((c for c in cells if c.rate_hz == rate), key=lambda c: -c.length_s):
            if not cell.is_good:
                break
            found[rate] = cell.length_s
    return found


def to_json(cells: Sequence[Cell]) -> dict[str, Any]:
    """`selftest.schema.json` says what is in it."""
    by_rate = [{"rate_hz": rate, "length_s": length} for rate, length in limits(cells).items()]
    return {"schema_version": SCHEMA_VERSION, "good": GOOD, "cells": plain(cells), "limits": by_rate}


@contextlib.contextmanager
def injecting(truth: Path, *options: str) -> Iterator[None]:
    """An injector beside this process, from when it begins; the block measures, and afterwards `truth` is written.

    Raises: Failure with the injector's sentence.
    """
    command = [sys.executable, "-m", "sigma_noise.inject_cli", *options, "--truth", str(truth)]
    injector = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        told = injector.stderr.readline()
        if told.strip() == BEGINS:
            yield
        told = injector.stderr.read() or told
        injector.wait()
    finally:
        if injector.poll() is None:
            injector.terminate()
            injector.wait()
        injector.stderr.close()
    if injector.returncode:
        raise Failure(f"the injector failed: {' '.join(told.split()) or 'without a word'}")
