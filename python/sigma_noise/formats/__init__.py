"""The formats that `sigma noise import` reads and `sigma noise export` writes, in a table."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sigma_train.errors import WrongInput

from sigma_noise.formats import chrome, hdr, netgauge, perfetto, rtla, text
from sigma_noise.trace import Trace

RTLA = re.compile(
    r"^# RTLA osnoise histogram|^ *CPU Period +Runtime|^# tracer: (?:osnoise|timerlat)|"
    r"(?:sample_threshold|(?:irq|softirq|thread|nmi)_noise): .*start \d+\.\d+ duration \d+ ns",
    re.MULTILINE,
)
TSV = re.compile(
    r"^\d+(?:\.\d+)?\t\d|^# (?:Benchmark Method|Selfish Benchmark|Fixed \w+ Quantum)", re.MULTILINE
)


@dataclass(frozen=True)
class Format:
    """`read(path, **options)`, `write(trace, to, **options)`; `options` are the names of those that apply."""

    extensions: tuple[str, ...]
    looks: Callable[[str], object] | None = None  # of the first characters of a file
    read: Callable[..., Trace] | None = None
    read_options: tuple[str, ...] = ()
    write: Callable[..., None] | None = None
    write_options: tuple[str, ...] = ()


def _write_prometheus(
    trace: Trace, to: Path, threshold_s: float | None = None, per_rank: bool = False
) -> None:
    """The figures of `analyze`."""
    # Here: most measurements go elsewhere, and the client takes a while to load.
    from sigma_noise.analysis import Options, analyze
    from sigma_noise.formats import prometheus

    try:
        found = analyze(trace, Options(tau_s=threshold_s))
    except ValueError as error:
        raise WrongInput(f"no figures for Prometheus: {error}") from None
    prometheus.write(prometheus.figures(found), to, per_rank)


FORMATS = {
    "chrome": Format(
        (".json", ".json.gz"), lambda head: head.lstrip()[:1] in ("{", "["),
        chrome.read, ("rank", "events"), perfetto.write,
    ),
    "rtla": Format((".txt", ".log"), RTLA.search, rtla.read),
    "netgauge": Format(
        (".tsv",), TSV.search,
        netgauge.read, ("rank",), netgauge.write, ("rank", "name", "threshold_s"),
    ),
    "prometheus": Format((".prom",), write=_write_prometheus, write_options=("threshold_s", "per_rank")),
    "hdr": Format((".hdr", ".hlog"), write=hdr.write, write_options=("name", "interval_s")),
}  # fmt: skip


def told_by(path: Path, named: str | None, to_write: bool) -> Format:
    """The format that is named, else, of a file to read, that its content looks like, else that of its extension.

    Raises: WrongInput if there is none that can be read, or written.
    """
    can = {key: each for key, each in FORMATS.items() if (each.write if to_write else each.read) is not None}
    if named is not None:
        if named not in can:
            raise WrongInput(f"--format wants one of {', '.join(can)}, found {named!r}")
        return can[named]
    if not to_write:
        head = text.head(path)
        for each in can.values():
            if each.looks is not None and each.looks(head):
                return each
    for each in can.values():
        if path.name.endswith(each.extensions):
            return each
    what = "its name" if to_write else "its content and name"
    raise WrongInput(f"{path}: {what} tells no format; --format is one of {', '.join(can)}")
