"""Detours as netgauge's selfish benchmark leaves them and LogGOPSim reads them: `start<TAB>duration` in ns, after `#`.

What the sources of both say (github.com/spcl): netgauge writes two decimals, starts count from its first detour, and
durations lack the shortest gap.  LogGOPSim rounds to ns, takes the last start for the length of the trace, pushes its
last row twice where the file ends in a newline, and never ends at a line of 1,024 characters.  So what is written here
has integers, short lines, a last row of duration 0 at the end of the window, and no newline after it.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from sigma_train.errors import WrongInput
from sigma_train.files import atomic_file

from sigma_noise.formats.rank_detours import DETOUR, Detours, facts, of
from sigma_noise.formats.rows import Rows, at
from sigma_noise.formats.text import lines
from sigma_noise.trace import EMPTY, Trace

NUMBER = re.compile(r"\d{1,18}(\.\d{0,9})?")
FACT = re.compile(r"# (rank|host|threshold_s|least_gap_s): (\S.{0,199})")
MINIMUM = re.compile(r"# Minimal cycle length \[ns\]: *([\d.]+)")
PERCENT = re.compile(r"# Threshold: \[% minimal cycle length\]: *(\d{1,9})")
NO_DETOURS = re.compile(r"# Fixed (Work|Time) Quantum Benchmark")
BLOCK = 4096


def write(
    trace: Trace, to: Path, rank: int | None = None, name: str | None = None, threshold_s: float | None = None
) -> None:
    """The detours of one rank and name.

    Raises: WrongInput as `rank_detours.of`; OSError.
    """
    detours = of(trace, rank, name, threshold_s)
    with atomic_file(to) as file:
        file.write(_head(detours, trace).encode())
        starts, took = detours.start_ns - detours.window_ns[0], detours.length_ns
        for first in range(0, len(detours), BLOCK):
            rows = zip(
                starts[first : first + BLOCK].tolist(), took[first : first + BLOCK].tolist(), strict=True
            )
            file.write("".join(f"{start}\t{length}\n" for start, length in rows).encode())
        file.write(f"{detours.window_ns[1] - detours.window_ns[0]}\t0".encode())


def _head(detours: Detours, trace: Trace) -> str:
    known: dict[str, object] = {
        "rank": detours.rank,
        "host": trace.ranks.get(detours.rank, {}).get("host", "unknown"),
        "name": detours.name,
        "threshold_s": detours.threshold_s,
        "least_gap_s": detours.least_gap_s,
    }
    told = (f"# {key}: {' '.join(str(fact).split())[:200]}\n" for key, fact in known.items())
    return "".join(["# Noise trace of sigma noise for LogGOPSim\n", *told, "# start [ns]\tduration [ns]\n"])


@dataclass
class _Learnt:
    rank: int = 0
    host: str = "unknown"
    threshold_s: float | None = None
    least_gap_ns: int = 0
    minimum_ns: float | None = None


def read(path: Path, rank: int | None = None) -> Trace:
    """Events called `detour`, value their length in seconds; stamps count from the begin of the window.

    rank:   else that of a `# rank: ` line, else 0.
    Raises: WrongInput if a line is no detour, or starts do not rise.
    """
    learnt, rows = _Learnt(), Rows()
    before, last, window_end = -1, (0, 0), 0
    for number, line in lines(path):
        try:
            if line.startswith("#"):
                _learn(learnt, line)
            elif line.strip():
                start, took = _row(line)
                if start <= before:
                    raise ValueError(f"starts must rise, found {start} ns after {before}")
                if took:
                    end = start + took + learnt.least_gap_ns  # durations lack the least gap
                    rows.add((0, "event", DETOUR), start, end, took / 1e9)
                    window_end = max(window_end, end)
                before, last = start, (start, took)
        except ValueError as error:
            raise at(path, f"line {number}", error) from None
    if before < 0:
        raise WrongInput(f"{path}: no detour is in it, not even one of duration 0 that ends the window")
    if not last[1]:
        window_end = last[0]
    rank = learnt.rank if rank is None else rank
    found = {(rank, kind, name): series for (_, kind, name), series in rows.series().items()}
    gaps = found.get((rank, "event", DETOUR), EMPTY)
    told = {
        "host": learnt.host,
        "clock": {"name": "from the begin of the window", "identity": path.name},
        "measured": {DETOUR: facts((0, window_end), gaps, learnt.threshold_s, learnt.least_gap_ns / 1e9)},
    }
    return Trace({}, {rank: told}, found)


def _row(line: str) -> tuple[int, int]:
    cells = line.rstrip().split("\t")
    if len(cells) != 2 or not all(NUMBER.fullmatch(cell) for cell in cells):
        raise ValueError(f"wanted start<TAB>duration, ns that are not negative, found {line[:60]!r}")
    start, took = (int(Decimal(cell).to_integral_value()) for cell in cells)
    return start, took


def _learn(learnt: _Learnt, line: str) -> None:
    if NO_DETOURS.match(line):
        raise ValueError(
            "netgauge measured fixed quanta, which have no stamps; its method selfish has detours"
        )
    if found := FACT.fullmatch(line.rstrip()):
        match found[1], found[2]:
            case "rank", text:
                if not re.fullmatch(r"\d{1,9}", text):
                    raise ValueError(f"the rank must be a number, found {text[:40]!r}")
                learnt.rank = int(text)
            case "threshold_s", text:
                learnt.threshold_s = _positive(text)
            case "least_gap_s", text:
                learnt.least_gap_ns = round(_positive(text) * 1e9)
            case "host", text:
                learnt.host = text
    elif found := MINIMUM.match(line):
        learnt.minimum_ns = _positive(found[1])
        learnt.least_gap_ns = round(learnt.minimum_ns)
    elif (found := PERCENT.match(line)) and learnt.minimum_ns is not None:
        learnt.threshold_s = learnt.minimum_ns * int(found[1]) / 100 / 1e9


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"wanted a number that is not negative, found {text[:40]!r}")
    return value
