"""`sigma noise run`: measure, write, and say in a table what was seen."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sigma_train.console import say
from sigma_train.errors import Failure, WrongInput
from sigma_train.files import must_be_writable, must_take_files
from sigma_train.ranks import Ranks

from sigma_noise.measure import FIXED_TIME, agreed, measure, together
from sigma_noise.plan import Plan
from sigma_noise.trace import Series, Trace, rank_file
from sigma_noise.units import time_of
from sigma_noise.watch import causes

RANK_TIMEOUT_S = 300.0  # that a rank waits for another, beside what a measurement takes


@dataclass(frozen=True)
class Row:
    """Seconds of a quantum of fixed work, or chunks in one of fixed time; `rare` is the 99th percentile of the
    former and the first of the latter, where the worst is the least.
    """

    name: str
    rank: int
    quanta: int
    median: float
    best: float
    rare: float
    worst: float


def run_plan(plan: Plan, ranks: Ranks, out: Path) -> None:
    """On each rank its file, once all have measured; a collective.  The first one shows all.

    Raises: WrongInput for a plan or a folder that cannot be.
    """
    plan.check(ranks.size)
    agreed(ranks, partial(free_folder, out))
    run_id = ranks.first(secrets.token_hex(8))
    trace = measured(plan, ranks)
    trace = replace(trace, run={**trace.run, "id": run_id})
    write_together(trace, ranks, out)
    about = trace.ranks[ranks.rank]
    told = ranks.gathered((rows(trace, ranks.rank), said(trace, ranks.rank), about["warnings"]))
    if ranks.is_first:
        show(Console(), told, out)


def write_together(trace: Trace, ranks: Ranks, out: Path) -> None:
    """All ranks' files or none; a collective.  Raises: Failure on every rank where one could not be written."""
    together(ranks)  # so that a rank that failed leaves no others' files
    path = rank_file(out, ranks.rank)
    try:
        try:
            trace.write(path)
            wrong = ""
        except OSError as error:
            wrong = str(error)
        for rank, sentence in enumerate(ranks.gathered(wrong)):
            if sentence:
                raise Failure(f"rank {rank}: {sentence}" if ranks.size > 1 else sentence)
    except BaseException:  # a rank that was lost, or a signal, too
        path.unlink(missing_ok=True)
        raise


def measured(plan: Plan, ranks: Ranks) -> Trace:
    if plan.backend == "cpu":
        return measure(plan, ranks)
    from sigma_noise.cuda import measure as measure_gpu

    return measure_gpu(plan, ranks)


def free_folder(out: Path) -> None:
    """Raises: WrongInput for a folder that has a measurement or cannot be written, which an hour should not find."""
    with must_be_writable("--out", out):
        out.mkdir(parents=True, exist_ok=True)
    must_take_files("--out", out)
    if taken := sorted(out.glob("*.parquet")):
        raise WrongInput(f"--out {out} has a measurement already, {taken[0].name}; give each run its folder")


def rows(trace: Trace, rank: int) -> list[Row]:
    found = []
    for name, series in trace.of(rank, "quantum"):
        if len(series):
            values, least, most = series.seconds, 0.0, 1.0
            if is_fixed_time(name):
                values, least, most = series.value, 1.0, 0.0
            figures = np.quantile(values, [0.5, least, 0.99 if most else 0.01, most])
            found.append(Row(name, rank, len(series), *map(float, figures)))
    return found


def is_fixed_time(name: str) -> bool:
    return name.endswith(FIXED_TIME)


def said(trace: Trace, rank: int) -> list[str]:
    """Of what is no quantum: detours, and what took the lost time if counters were watched."""
    told = [f"rank {rank}: {name}: {found.sentence}" for name, found in causes(trace, rank)]
    about = trace.ranks[rank]["measured"].get("detour")
    if about is None:
        return told
    longest = longest_of(trace.get(rank, "event", "detour"))
    share = about["total_s"] / about["observed_s"]
    return [
        f"rank {rank}: {about['found']} detours above {time_of(about['threshold_s'])} took {share:.2%} of "
        f"{time_of(about['observed_s'])}{longest}",
        *told,
    ]


def longest_of(series: Series) -> str:
    return f", the longest {time_of(float(series.seconds.max()))}" if len(series) else ""


def show(console: Console, told: list[tuple[list[Row], list[str], list[str]]], out: Path) -> None:
    found = sorted((row for of_rank, _, _ in told for row in of_rank), key=lambda row: (row.name, row.rank))
    for title, columns, form, shown in (
        ("fixed work", ("least", "p99", "longest"), time_of, [r for r in found if not is_fixed_time(r.name)]),
        (
            "fixed time, chunks a quantum", ("most", "p1", "fewest"), "{:.0f}".format,
            [r for r in found if is_fixed_time(r.name)],
        ),
    ):  # fmt: skip
        if shown:
            console.print(table(title, columns, form, shown))
    for _, sentences, _ in told:
        for sentence in sentences:
            say(console, sentence)
    for rank, (_, _, warnings) in enumerate(told):
        for warning in warnings:
            say(console, f"warning: rank {rank}: {warning}", "yellow")
    files = f"{len(told)} files" if len(told) > 1 else "1 file"
    say(console, f"wrote {out} ({files})")


def table(title: str, columns: tuple[str, ...], form: Callable[[float], str], shown: list[Row]) -> Table:
    made = Table("kernel", "rank", "quanta", "median", *columns, title=title, title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"
    for row in shown:
        numbers = map(form, (row.median, row.best, row.rare, row.worst))
        made.add_row(row.name, str(row.rank), str(row.quanta), *numbers)
    return made
