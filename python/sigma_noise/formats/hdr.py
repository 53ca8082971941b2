"""Export as an HDR histogram log (V2 encoding): what took how long in each interval, for HdrHistogram's own tools.

A log holds a histogram an interval, and its users (HistogramLogProcessor, HistogramLogAnalyzer, hdr-plot) sum them over
any span and derive percentiles.  A table of percentiles allows neither, so the log is what is written, by the library
`hdrhistogram`, which is not a dependency: without it there is no log, and a sentence says so.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sigma_train.errors import Failure, WrongInput
from sigma_train.files import atomic_file

from sigma_noise.formats.rank_detours import DETOUR, is_fixed_time, of
from sigma_noise.trace import Trace

# To an hour, as most logs, so that they can be summed.
LOWEST_NS, HIGHEST_NS, DIGITS = 1, 3_600_000_000_000, 3


def write(trace: Trace, to: Path, name: str | None = None, interval_s: float = 1.0) -> None:
    """A line for each rank, name, and interval in which any of it began; values in ns.

    Of quanta of fixed work what each took; of a loop that measured detours, and of quanta of fixed time, which all last
    the same, the lengths of detours.  A line is tagged `rank0.spin`; its maximum is in ms, as the format has it; its
    times count from the first begin of all, which `StartTime` and `BaseTime` hold in seconds of the trace's clock.

    Raises: WrongInput if there is nothing to write or `interval_s` is not positive; Failure without the library;
            OSError.
    """
    try:
        import hdrh.histogram as hdr
    except ModuleNotFoundError:
        raise Failure(
            "an HDR log wants the library hdrhistogram; pip install hdrhistogram brings it"
        ) from None
    if not 0 < interval_s < float("inf"):
        raise WrongInput(f"--interval must be positive, found {interval_s}")
    pieces = [
        piece
        for rank, own in _series(trace)
        if name in (None, own)
        for piece in _intervals(f"rank{rank}.{own}", *_lengths(trace, rank, own), trace.origin_ns, interval_s)
    ]
    if not pieces:
        raise WrongInput(f"no quanta or detours{f' called {name!r}' if name else ''} are in this measurement")
    longest = max(int(took.max()) for _, _, took in pieces)
    highest = max(HIGHEST_NS, 2 ** longest.bit_length())
    with atomic_file(to) as file:
        file.write(_head(trace).encode())
        for begin_s, tag, took in sorted(pieces, key=lambda piece: piece[:2]):
            histogram = hdr.HdrHistogram(LOWEST_NS, highest, DIGITS)
            for value, count in zip(*(a.tolist() for a in np.unique(took, return_counts=True)), strict=True):
                histogram.record_value(value, count)
            line = f"Tag={tag},{begin_s:.6f},{interval_s:.6f},{took.max() / 1e6:.3f},{histogram.encode().decode()}\n"
            file.write(line.encode())


def _head(trace: Trace) -> str:
    origin = f"{trace.origin_ns / 1e9:.3f}"
    return (
        "#[Durations in ns, exported by sigma noise]\n#[Histogram log format version 1.3]\n"
        f"#[StartTime: {origin} (seconds since epoch), of the trace's clock]\n"
        f"#[BaseTime: {origin} (seconds since epoch)]\n"
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"\n'
    )


def _series(trace: Trace) -> Iterator[tuple[int, str]]:
    """Ranks, and the names of what they have lengths of."""
    for rank, about in trace.ranks.items():
        yield from ((rank, name) for name, quanta in trace.of(rank, "quantum") if len(quanta))
        if DETOUR in about.get("measured", {}):
            yield rank, DETOUR


def _lengths(trace: Trace, rank: int, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Begins and lengths, ns."""
    if name == DETOUR or is_fixed_time(trace, name):
        detours = of(trace, rank, name)
        return detours.start_ns, detours.length_ns
    quanta = trace.get(rank, "quantum", name)
    return quanta.start_ns, quanta.end_ns - quanta.start_ns


def _intervals(
    tag: str, start_ns: NDArray[np.int64], took: NDArray[np.int64], origin_ns: int, interval_s: float
) -> list[tuple[float, str, NDArray[np.int64]]]:
    """Begin of each interval in s, tag without what would end one, lengths in ns of what began in it."""
    tag = "".join("_" if c.isspace() or c in ',"#=' else c for c in tag)
    number = np.floor((start_ns - origin_ns) * 1e-9 / interval_s).astype(np.int64)
    cuts = np.flatnonzero(np.diff(number)) + 1
    pieces = zip(np.split(number, cuts), np.split(took, cuts), strict=True)
    return [(float(numbers[0] * interval_s), tag, lengths) for numbers, lengths in pieces]
