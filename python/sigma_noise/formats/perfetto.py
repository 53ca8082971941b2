"""Export as Chrome trace JSON, which ui.perfetto.dev and chrome://tracing load: a process a rank, a track a name.

Quanta and events are complete events ("X"), counters are "C"; stamps are microseconds with three decimals since the
first begin, which `baseTimeNanoseconds` holds as Kineto has it.  Slices that overlap without nesting are wrong on one
track of these viewers, so the rows of a name take as many tracks as overlap.  Reading it again gives the same trace,
but for values that are not finite: null, then NaN.
"""

import gzip
import heapq
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sigma_train.files import atomic_file

from sigma_noise.formats.chrome import HEAD, OURS
from sigma_noise.trace import Series, Trace

BLOCK = 4096  # events between writes


def write(trace: Trace, to: Path) -> None:
    """One file, whole or absent; packed if its name ends in .gz.  Raises OSError."""
    with atomic_file(to) as file:
        if to.suffix != ".gz":
            _write(trace, file)
            return
        with gzip.GzipFile(
            "", "wb", 6, file, mtime=0
        ) as packed:  # neither name nor time: same trace, same bytes
            _write(trace, packed)


def _write(trace: Trace, file: Any) -> None:
    head = {
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": trace.origin_ns,
        HEAD: {"run": trace.run, "ranks": {str(rank): facts for rank, facts in trace.ranks.items()}},
    }
    file.write(json.dumps(_finite(head), indent=1, allow_nan=False)[:-2].encode())
    file.write(b',\n "traceEvents": [\n')
    block: list[str] = []
    separator = b""
    for event in _events(trace):
        block.append(event)
        if len(block) == BLOCK:
            file.write(separator + ",\n".join(block).encode())
            separator = b",\n"
            block.clear()
    if block:
        file.write(separator + ",\n".join(block).encode())
    file.write(b"\n ]\n}\n")


def _events(trace: Trace) -> Iterator[str]:
    origin = trace.origin_ns
    tracks: dict[int, int] = {}  # how many each rank has; numbers from 1, as 0 is the idle thread to viewers
    for rank in sorted(trace.ranks.keys() | {r for r, _, _ in trace.rows}):
        host = trace.ranks.get(rank, {}).get("host")
        yield _told("process_name", rank, 0, f"rank {rank}" + (f" on {host}" if host else ""))
        tracks[rank] = 0
    for (rank, kind, name), series in sorted(trace.rows.items()):
        if kind == "counter":
            yield from _counters(rank, name, series, origin)
            continue
        lane = lanes(series) + tracks[rank] + 1
        for track in np.unique(lane).tolist():
            yield _told("thread_name", rank, track, name if kind == "quantum" else f"{kind}: {name}")
        tracks[rank] += len(np.unique(lane))
        begun = f'{{"ph":"X","cat":"{OURS}{kind}","name":{json.dumps(name)},"pid":{rank},"tid":'
        for start, end, value, track in zip(
            series.start_ns.tolist(),
            series.end_ns.tolist(),
            series.value.tolist(),
            lane.tolist(),
            strict=True,
        ):
            yield f'{begun}{track},"ts":{_us(start - origin)},"dur":{_us(end - start)},"args":{_args(value)}}}'


def _counters(rank: int, name: str, series: Series, origin: int) -> Iterator[str]:
    begun = f'{{"ph":"C","cat":"{OURS}counter","name":{json.dumps(name)},"pid":{rank},"ts":'
    for start, value in zip(series.start_ns.tolist(), series.value.tolist(), strict=True):
        yield f'{begun}{_us(start - origin)},"args":{_args(value)}}}'


def _told(what: str, rank: int, track: int, name: str) -> str:
    return json.dumps({"ph": "M", "name": what, "pid": rank, "tid": track, "args": {"name": name}})


def _us(ns: int) -> str:
    if ns < 0:
        return "-" + _us(-ns)
    return f"{ns // 1000}.{ns % 1000:03d}"


def _args(value: float) -> str:
    """A counter that is not finite has no value: viewers refuse null."""
    return f'{{"value":{value!r}}}' if math.isfinite(value) else "{}"


def _finite(tree: Any) -> Any:
    """JSON has no infinities and no NaN."""
    match tree:
        case float():
            return tree if math.isfinite(tree) else None
        case dict():
            return {key: _finite(each) for key, each in tree.items()}
        case list() | tuple():
            return [_finite(each) for each in tree]
    return tree


def lanes(series: Series) -> NDArray[np.int64]:
    """The lowest track from 0 that is free as each row begins; int64 [n]."""
    start, end = series.start_ns, series.end_ns
    lane = np.zeros(len(series), np.int64)
    if len(series) < 2 or np.all(start[1:] >= np.maximum.accumulate(end)[:-1]):
        return lane
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # until when, which
    for row, (begin, until) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane[row] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (until, int(lane[row])))
    return lane
