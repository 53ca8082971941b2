"""The tables of `rtla osnoise top -q`, `rtla hwnoise` and `rtla osnoise hist`, as tools/tracing/rtla prints them.

They have no stamps, so time begins at 0.  Of `top` a CPU gives one quantum `osnoise_ftq` as long as its runtime, value
the microseconds without noise, and its counts as counters from 0; the longest noise is in the rank's facts.  Of `hist`
a CPU gives a counter `detours` over the duration, and the histogram in the rank's facts under `histogram`: `unit_ns`,
`edges` [n], the lower ends of buckets, `counts` [n], and `over`, `count`, `min`, `avg`, `max`.
"""

import re
from typing import Any, Protocol

from sigma_noise.formats.rows import Rows

TOP_HEAD = re.compile(
    r" *CPU Period +Runtime +Noise +% CPU Aval +Max Noise +Max Single +HW +NMI( +IRQ +Softirq +Thread)?"
)
TOP_ROW = re.compile(
    r" *(\d{1,6}) #(\d{1,9}) +(\d{1,18}) +(\d{1,18}) +(\d{1,3}\.\d{5}) +((?:\d{1,18} +)*\d{1,18})"
)
DURATION = re.compile(r"(?:# D|d)uration: +(\d+) (\d\d):(\d\d):(\d\d)(?: \| time is in us)?")
SUMMARY = ("over", "count", "min", "avg", "max")
NUMBER = re.compile(r"\d{1,18}(\.\d{1,9})?")
QUANTUM = "osnoise_ftq"  # of fixed time


class Table(Protocol):
    def add(self, line: str) -> bool:
        """Whether the line is of this table.  Raises ValueError if it is, and is damaged."""

    def rows_into(self, rows: Rows) -> dict[int, dict[str, Any]]:
        """The facts of each rank.  Raises ValueError if the table is not complete."""


def begun(line: str) -> "Table | None":
    """A fresh table, if this line is the first of one."""
    if found := TOP_HEAD.fullmatch(line.rstrip()):
        return _Top(counts=5 if found[1] else 2)
    return _Hist() if line.rstrip() == "# RTLA osnoise histogram" else None


def check_available(runtime_us: int, noise_us: int, percent: str) -> None:
    """Both tools print floor(1e7 * (runtime - noise) / runtime) / 1e5: columns that are others do not agree."""
    wanted = 10**7 * (runtime_us - noise_us) // max(runtime_us, 1)
    if not 0 <= noise_us <= runtime_us or wanted != int(percent.replace(".", "")):
        raise ValueError(
            f"noise {noise_us} us of {runtime_us} us is not {percent} % available; wrong columns?"
        )


def _unstamped(cpu: int) -> dict[str, Any]:
    return {"host": "unknown", "clock": {"name": "none", "identity": f"cpu {cpu}"}, "cpu": cpu}


class _Top:
    def __init__(self, counts: int) -> None:
        self._n = 2 + counts
        self._cpus: dict[int, tuple[int, int, int, list[int]]] = {}

    def add(self, line: str) -> bool:
        if not line.strip():
            return True
        found = TOP_ROW.fullmatch(line.rstrip())
        if not found:
            if re.match(r" *\d+ #", line):
                raise ValueError(
                    f"wanted CPU #PERIODS and {3 + self._n} numbers, found {line.strip()[:80]!r}"
                )
            return False
        cpu, periods, runtime, noise = (int(cell) for cell in found.groups()[:4])
        cells = [int(cell) for cell in found[6].split()]
        if len(cells) != self._n:
            raise ValueError(f"wanted {3 + self._n} numbers after #PERIODS, found {3 + len(cells)}")
        check_available(runtime, noise, found[5])
        self._cpus[cpu] = periods, runtime, noise, cells
        return True

    def rows_into(self, rows: Rows) -> dict[int, dict[str, Any]]:
        ranks = {}
        for cpu, (periods, runtime, noise, (max_noise, max_single, *counts)) in self._cpus.items():
            end = runtime * 1000
            rows.add((cpu, "quantum", QUANTUM), 0, end, float(runtime - noise))
            said = dict(zip(("hw", "nmi", "irq", "softirq", "thread"), counts, strict=False)) | {
                "noise_us": noise
            }
            for name, n in said.items():
                for at, value in ((0, 0.0), (end, float(n))):
                    rows.add((cpu, "counter", f"osnoise_{name}"), at, at, value)
            told = {"periods": periods, "max_noise_us": max_noise, "max_single_us": max_single}
            ranks[cpu] = {**_unstamped(cpu), "osnoise": told}
        return ranks


class _Hist:
    def __init__(self) -> None:
        self._unit_ns, self._duration_ns = 0, -1
        self._cpus: list[int] = []
        self._edges: list[int] = []
        self._counts: list[list[int]] = []  # [edges][cpus]
        self._summary: dict[str, list[float]] = {}

    def add(self, line: str) -> bool:
        cells = line.split()
        if not cells:
            return True
        if line.startswith("# Time unit is "):
            self._unit_ns = {"(ns)": 1, "(us)": 1000}.get(cells[-1], 0)
            if not self._unit_ns:
                raise ValueError(f"wanted a time unit of (us) or (ns), found {cells[-1]!r}")
        elif found := DURATION.fullmatch(line.rstrip()):
            days, hours, minutes, seconds = (int(cell) for cell in found.groups())
            self._duration_ns = (((days * 24 + hours) * 60 + minutes) * 60 + seconds) * 10**9
        elif cells[0] == "Index":
            if self._cpus or not all(re.fullmatch(r"CPU-\d{3,6}", cell) for cell in cells[1:]):
                raise ValueError(f"wanted columns CPU-000 after Index, found {line[:80]!r}")
            self._cpus = [int(cell[4:]) for cell in cells[1:]]
        elif cells[0].rstrip(":") in SUMMARY:
            self._summary[cells[0].rstrip(":")] = [float(cell) for cell in self._numbers(cells)]
        elif cells[0].isdecimal():
            self._bucket(int(cells[0]), [int(cell) for cell in self._numbers(cells)])
        else:
            return False
        return True

    def _numbers(self, cells: list[str]) -> list[str]:
        """The cells after the first.  With no samples at all rtla prints a single 0 and no columns."""
        rest = cells[1:]
        if not all(NUMBER.fullmatch(cell) for cell in rest) or len(rest) != max(len(self._cpus), 1):
            raise ValueError(
                f"wanted {len(self._cpus)} numbers after {cells[0]}, found {' '.join(rest)[:80]}"
            )
        return rest

    def _bucket(self, edge: int, counts: list[int]) -> None:
        if self._edges and edge <= self._edges[-1]:
            raise ValueError(f"buckets must rise, found {edge} after {self._edges[-1]}")
        self._edges.append(edge)
        self._counts.append(counts)

    def rows_into(self, rows: Rows) -> dict[int, dict[str, Any]]:
        if not self._unit_ns or self._duration_ns < 0 or not self._cpus:
            raise ValueError("a histogram wants time unit, duration and columns of CPUs, which had samples")
        if self._summary.keys() != set(SUMMARY):
            raise ValueError(f"a histogram wants all of {', '.join(SUMMARY)}; is it cut short?")
        ranks = {}
        for column, cpu in enumerate(self._cpus):
            counts = [row[column] for row in self._counts]
            summary = {key: cells[column] for key, cells in self._summary.items()}
            if sum(counts) + summary["over"] != summary["count"]:
                raise ValueError(
                    f"the buckets of CPU {cpu} sum to {sum(counts)}, its count is {summary['count']:g}"
                )
            histogram = {"unit_ns": self._unit_ns, "edges": self._edges, "counts": counts, **summary}
            ranks[cpu] = {**_unstamped(cpu), "histogram": histogram}
            for at, n in ((0, 0.0), (self._duration_ns, summary["count"])):
                rows.add((cpu, "counter", "detours"), at, at, n)
        return ranks
