"""Import of Chrome trace JSON, above all torch.profiler's (Kineto): chosen events become quanta, exact to the ns.

Complete events (`"ph": "X"`) have `ts` and `dur` in microseconds (Trace Event Format, Google 2016); Kineto's count from
`baseTimeNanoseconds`, which is of the wall clock, and have three decimals.  They are read from their text: as f64 a
`ts` of 4.9e12 us keeps a ns, but one of the epoch (1.8e15 us) does not.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from sigma_train.errors import WrongInput

from sigma_noise.formats.json_stream import Number, members
from sigma_noise.formats.rows import Rows, at, in_file
from sigma_noise.formats.text import opened
from sigma_noise.trace import Key, Series, Trace

OURS = "sigma."  # before the kind, in the categories of what `perfetto.write` wrote
HEAD = "sigma_noise"
KEPT = (HEAD, "baseTimeNanoseconds", "distributedInfo", "host_name")  # of the head, which may hold megabytes
MOST_US = 10**16  # 317 years
MAX_CATEGORIES = 1000


@dataclass(frozen=True)
class Choice:
    """Events of a category and name, both globs without regard to case, become quanta called `called`."""

    category: str
    name: str
    called: str = "{name}"


DEFAULT = (
    Choice("user_annotation", "ProfilerStep#*", "step"),
    Choice("gpu_user_annotation", "ProfilerStep#*", "gpu:step"),
    Choice("user_annotation", "*"),  # gloo:all_reduce and nccl:all_reduce are among them
    Choice("gpu_user_annotation", "*", "gpu:{name}"),  # the same spans again, as its streams saw them
    Choice("kernel", "*"),  # ncclDevKernel_... are among them
)


def choice(text: str) -> Choice:
    """`CATEGORY/NAME` or `CATEGORY/NAME=CALLED`, as the command line has it.

    Raises: WrongInput if there is no slash.
    """
    pattern, _, called = text.partition("=")
    category, slash, name = pattern.partition("/")
    if not (category and slash and name):
        raise WrongInput(f"--events wants CATEGORY/NAME, such as 'cpu_op/aten::mm', found {text!r}")
    return Choice(category, name, called or "{name}")


def read(path: Path, rank: int | None = None, events: Sequence[str] = ()) -> Trace:
    """The quanta of a trace; of one that `export` wrote, everything.

    rank:   else that of `distributedInfo`, else 0.
    events: what to take, as `choice` reads it; else `DEFAULT`.
    Raises: WrongInput if it is not such a trace, or no event is chosen.
    Cost:   24 bytes an event that is chosen, and what `json_stream` holds.
    """
    reader = _Reader([choice(text) for text in events], path.name)
    with opened(path) as file, in_file(path):
        for name, value in members(file, "traceEvents"):
            if name is not None:
                reader.head |= {name: value} if name in KEPT else {}
                continue
            try:
                reader.add(value)
            except ValueError as error:
                raise at(path, f"event {reader.seen}{_called(value)}", error) from None
            reader.seen += 1
        return reader.trace(rank)


def _called(event: Any) -> str:
    name = event.get("name") if isinstance(event, dict) else None
    return f" ({str(name)[:60]!r})" if name else ""


class _Reader:
    def __init__(self, choices: Sequence[Choice], file: str) -> None:
        self._choices, self._file = choices, file
        self.head: dict[str, Any] = {}
        self.seen = 0
        self._foreign, self._ours = Rows(), Rows()
        self._categories: Counter[str] = Counter()
        self._call = lru_cache(maxsize=4096)(lambda category, name: _call(choices or DEFAULT, category, name))

    def add(self, event: Any) -> None:
        if not isinstance(event, dict):
            raise ValueError(f"an event must be an object, found {str(event)[:40]!r}")
        phase, category, name = event.get("ph"), str(event.get("cat", "")), str(event.get("name", ""))
        if category.startswith(OURS):
            self._add_ours(event, category.removeprefix(OURS), name)
        elif phase == "X":
            if len(self._categories) < MAX_CATEGORIES or category in self._categories:
                self._categories[category] += 1
            called = self._call(category, name)
            if called is not None:
                start = nanoseconds(event, "ts")
                self._foreign.add((0, "quantum", called), start, start + nanoseconds(event, "dur"), 1.0)

    def _add_ours(self, event: dict[str, Any], kind: str, name: str) -> None:
        rank, args = event.get("pid"), event.get("args")
        if not isinstance(rank, int) or isinstance(rank, bool) or not isinstance(args, dict):
            raise ValueError("pid must be a rank and args an object")
        if kind not in ("quantum", "counter", "event"):
            raise ValueError(
                f"a category of ours must be of a quantum, counter or event, found {kind[:40]!r}"
            )
        start = nanoseconds(event, "ts")
        took = 0 if kind == "counter" else nanoseconds(event, "dur")
        self._ours.add((rank, kind, name), start, start + took, _number(args.get("value")))

    def trace(self, rank: int | None) -> Trace:
        base = self.head.get("baseTimeNanoseconds", 0)
        if not isinstance(base, int) or abs(base) >= 2**62:
            raise ValueError(f"baseTimeNanoseconds must be an integer of ns, found {str(base)[:40]!r}")
        if len(self._ours) or HEAD in self.head:
            if rank is not None or self._choices:
                raise ValueError(
                    "--rank and --events are for foreign traces, this is one of `sigma noise export`"
                )
            head = self.head.get(HEAD)
            head = head if isinstance(head, dict) else {}
            rows = {key: _moved(series, base) for key, series in self._ours.series().items()}
            told = _by_number(head.get("ranks"))
            run = head.get("run")
            return Trace(
                run if isinstance(run, dict) else {}, {r: told.get(r, {}) for r in _ranks(rows, told)}, rows
            )
        if not len(self._foreign):
            raise ValueError(self._nothing())
        rank = self._rank() if rank is None else rank
        rows = {(rank, kind, name): _moved(s, base) for (_, kind, name), s in self._foreign.series().items()}
        return Trace({}, {rank: self._facts(base, rows)}, rows)

    def _rank(self) -> int:
        info = self.head.get("distributedInfo")
        rank = info.get("rank", 0) if isinstance(info, dict) else 0
        if not isinstance(rank, int) or not 0 <= rank < 2**31:
            raise ValueError(f"distributedInfo.rank must be a rank, found {str(rank)[:40]!r}")
        return rank

    def _facts(self, base: int, rows: Mapping[Key, Series]) -> dict[str, Any]:
        """Ranks of one host share its wall clock; of an unknown host, nothing is known to be shared.

        Events of one name count as the same work, which takes as long as the shortest of them.
        """
        host = str(self.head.get("host_name", "unknown"))
        shared = base and host != "unknown"
        name = "CLOCK_REALTIME" if base else "unknown"
        measured = {
            name: {"mode": "fwq", "quantum_s": float(s.seconds.min())} for (_, _, name), s in rows.items()
        }
        return {
            "host": host,
            "clock": {"name": name, "identity": host if shared else self._file},
            "measured": measured,
        }

    def _nothing(self) -> str:
        if not self.seen:
            return "it has no events"
        if not self._categories:
            return f'none of its {self.seen} events is complete ("ph": "X")'
        found = ", ".join(f"{category or '(none)'} ({n})" for category, n in self._categories.most_common(8))
        return f"no event is chosen; choose by --events CATEGORY/NAME among the categories {found}"


def _call(choices: Iterable[Choice], category: str, name: str) -> str | None:
    """What the quanta of an event are called, or None if it becomes none.  A category may be a list with commas."""
    for each in choices:
        is_of_category = any(_fits(part.strip(), each.category) for part in category.split(","))
        if is_of_category and _fits(name, each.name):
            return each.called.replace("{name}", name)
    return None


def _fits(text: str, glob: str) -> bool:
    return fnmatchcase(text.lower(), glob.lower())


def nanoseconds(event: dict[str, Any], key: str) -> int:
    """Exactly; halves of a ns go to the even one.  Raises: ValueError if it is no finite number of microseconds."""
    us = event.get(key)
    if isinstance(us, int) and not isinstance(us, bool) and abs(us) < MOST_US:
        return us * 1000
    if isinstance(us, Number):
        exact = Decimal(us)
        if exact.is_finite() and abs(exact) < MOST_US:
            return int((exact * 1000).to_integral_value())
    raise ValueError(f"{key} must be a number of microseconds, found {str(us)[:40]!r}")


def _number(value: Any) -> float:
    """NaN for null, which is how JSON writes what is not finite."""
    if value is None:
        return float("nan")
    if isinstance(value, Number) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64
    ):
        return float(value)
    raise ValueError(f"args.value must be a number, found {str(value)[:40]!r}")


def _moved(series: Series, base_ns: int) -> Series:
    if len(series) and not (
        -(2**63) <= int(series.start_ns[0]) + base_ns <= int(series.end_ns.max()) + base_ns < 2**63
    ):
        raise ValueError(f"stamps with baseTimeNanoseconds {base_ns} do not fit 64 bits")
    return Series(series.start_ns + base_ns, series.end_ns + base_ns, series.value)


def _by_number(ranks: Any) -> dict[int, dict[str, Any]]:
    if not isinstance(ranks, dict):
        return {}
    return {
        int(rank): dict(facts)
        for rank, facts in ranks.items()
        if rank.isdecimal() and isinstance(facts, dict)
    }


def _ranks(rows: Iterable[tuple[int, str, str]], told: Iterable[int]) -> list[int]:
    return sorted({rank for rank, _, _ in rows} | set(told))
