"""Import of what Linux's osnoise tracer says, by tracefs or `rtla osnoise`; a CPU becomes a rank.

The tracer's lines (include/trace/events/osnoise.h of Linux):

| line | becomes |
|---|---|
| `sample_threshold: start S duration D ns interference I` | an event `detour`, value D in seconds |
| `irq_noise: NAME:VECTOR start S duration D ns`, `softirq_noise` | an event `irq:NAME`, `softirq:NAME`, value VECTOR |
| `thread_noise: NAME:PID start S duration D ns` | an event `thread:NAME`, value PID |
| `nmi_noise: start S duration D ns` | an event `nmi` |
| a period's sum: runtime, noise, available, max single, counts | quantum `osnoise_ftq`, value its quiet us; counters |

Durations of causes are net, without what interrupted them in turn, so end stamps are begin + net.  The tables of
`rtla osnoise top -q` and `hist` have no stamps: see `rtla_tables`.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sigma_train.errors import WrongInput

from sigma_noise.formats import rtla_tables
from sigma_noise.formats.rank_detours import DETOUR, facts
from sigma_noise.formats.rows import Rows, at
from sigma_noise.formats.text import lines
from sigma_noise.trace import Key, Series, Trace

THRESHOLD_S = 5e-6  # of the tracer, unless it was set, which its text does not say
COUNTS = ("hw", "nmi", "irq", "softirq", "thread")  # interferences, in the order of the tracer and of rtla

# TASK-PID (TGID) [CPU] FLAGS STAMP: REST; trace-cmd has no flags, and a task's name may hold anything
LINE = re.compile(r".*-\d+ +(?:\([ \d-]+\) +)?\[(\d{1,6})\] +(?:\S+ +)?(\d{1,12}\.\d{6,9}): +(.*)")
NOISE = re.compile(r"(irq|softirq|thread|nmi)_noise: *(.*)")
CAUSE = re.compile(r"(?:(\S.*):(-?\d+) )?start (\d{1,10})\.(\d{9}) duration (\d{1,18}) ns")
SAMPLE = re.compile(r"start (\d{1,10})\.(\d{9}) duration (\d{1,18}) ns interferences? (\d{1,18})")
PERIOD = re.compile(r"(\d{1,12}) +(\d{1,12}) +(\d{1,3}\.\d{5}) +(\d{1,12})((?: +\d{1,12}){5})")
LOST = re.compile(r"CPU:(\d+) \[LOST (\d+) EVENTS\]")
ANSI = re.compile(r"\x1b(?:\[[\d;]*[A-Za-z]|c)")


def read(path: Path) -> Trace:
    """Events, quanta and counters of each CPU that was traced, from the tracer's lines or a table.

    Raises: WrongInput if a line of osnoise is damaged, or there is none.
    """
    reader = _Reader(Rows())
    table: rtla_tables.Table | None = None
    for number, line in lines(path):
        line = ANSI.sub("", line)
        try:
            begun = rtla_tables.begun(line)
            if begun is not None:  # `top` without -q prints its table again and again: the last one counts
                table = begun
            elif table is None or not table.add(line):
                reader.add(line)
        except ValueError as error:
            raise at(path, f"line {number}", error) from None
    try:
        ranks = table.rows_into(reader.rows) if table is not None else {}
    except ValueError as error:
        raise at(path, "its last table", error) from None
    rows = reader.rows.series()
    if not rows:
        raise WrongInput(
            f"{path}: no line of the osnoise tracer and no row of a table of rtla osnoise is in it"
        )
    for cpu in {cpu for cpu, _, _ in rows}:
        of_tracer = {
            "host": "unknown",
            "clock": {"name": "of the tracer", "identity": path.name},
            "cpu": cpu,
            "lost_events": reader.lost[cpu],
        }
        ranks[cpu] = {**ranks.get(cpu, of_tracer), "measured": _measured(rows, cpu)}
    return Trace({}, dict(sorted(ranks.items())), rows)


def _measured(rows: Mapping[Key, Series], cpu: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if (quanta := rows.get((cpu, "quantum", rtla_tables.QUANTUM))) is not None:
        quantum_s = float(np.median(quanta.seconds))  # the runtime of a period, some us more or less
        found[rtla_tables.QUANTUM] = {"mode": "ftq", "kernel": "osnoise", "quantum_s": quantum_s}
    if (gaps := rows.get((cpu, "event", DETOUR))) is not None:  # else nobody knows what the loop missed
        own = [series for key, series in rows.items() if key[0] == cpu]
        window = min(int(s.start_ns[0]) for s in own), max(int(s.end_ns.max()) for s in own)
        found[DETOUR] = facts(window, gaps, THRESHOLD_S)
    return found


@dataclass
class _Reader:
    rows: Rows
    lost: Counter[int] = field(default_factory=Counter)
    _sums: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add(self, line: str) -> None:
        """A line of the tracer; what other tracers and events write is passed over."""
        if found := LOST.search(line):
            self.lost[int(found[1])] += int(found[2])
        if not (found := LINE.fullmatch(line)):
            if re.search(r"\b(sample_threshold|(irq|softirq|thread|nmi)_noise): ", line):
                raise ValueError(
                    f"wanted TASK-PID [CPU] STAMP: before an event of osnoise, found {line[:80]!r}"
                )
            return
        cpu, stamp, rest = int(found[1]), found[2], found[3]
        if noise := NOISE.fullmatch(rest):
            self._cause(cpu, noise[1], noise[2])
        elif rest.startswith("sample_threshold: "):
            self._sample(cpu, rest.removeprefix("sample_threshold: ").strip())
        elif period := PERIOD.fullmatch(rest.strip()):
            self._period(cpu, stamp, period)

    def _cause(self, cpu: int, kind: str, text: str) -> None:
        found = CAUSE.fullmatch(text.strip())
        if not found or (kind == "nmi") != (found[1] is None):
            raise ValueError(
                f"wanted {kind}_noise: NAME:NUMBER start S.NS duration D ns, found {text[:80]!r}"
            )
        begin = int(found[3]) * 10**9 + int(found[4])
        name = kind if kind == "nmi" else f"{kind}:{found[1].strip()}"
        self.rows.add((cpu, "event", name), begin, begin + int(found[5]), float(found[2] or 0))

    def _sample(self, cpu: int, text: str) -> None:
        found = SAMPLE.fullmatch(text)
        if not found:
            raise ValueError(
                f"wanted sample_threshold: start S.NS duration D ns interference I, found {text[:80]!r}"
            )
        begin = int(found[1]) * 10**9 + int(found[2])
        self.rows.add((cpu, "event", DETOUR), begin, begin + int(found[3]), int(found[3]) / 1e9)

    def _period(self, cpu: int, stamp: str, found: re.Match[str]) -> None:
        seconds, _, fraction = stamp.partition(".")
        end = int(seconds) * 10**9 + int(fraction.ljust(9, "0"))
        runtime_us, noise_us = int(found[1]), int(found[2])
        rtla_tables.check_available(runtime_us, noise_us, found[3])
        self.rows.add(
            (cpu, "quantum", rtla_tables.QUANTUM), end - runtime_us * 1000, end, float(runtime_us - noise_us)
        )
        said = dict(zip(COUNTS, map(int, found[5].split()), strict=True)) | {"noise_us": noise_us}
        for name, n in said.items():
            self._sums[cpu, name] += n
            self.rows.add((cpu, "counter", f"osnoise_{name}"), end, end, float(self._sums[cpu, name]))
