"""The tables that `sigma doctor --validate` shows."""

from collections import defaultdict
from statistics import median

from rich.console import Console
from rich.table import Table

from sigma_cli.baseline import Baseline, key
from sigma_cli.pairs import LARGE, Matrix, Pairs, others, slowest
from sigma_kernels.validation.cases import CASES, DTYPES
from sigma_kernels.validation.rates import Rate
from sigma_kernels.validation.result import NOT_RUN, OK, SLOW, WRONG, Result

STYLE = {OK: "green", SLOW: "yellow", WRONG: "bold red", NOT_RUN: "dim"}
MOST_RANKS = 8  # of a matrix that is shown


def show(
    console: Console, results: list[Result], rates: list[Rate], known: Baseline | None, pairs: Pairs | None
) -> None:
    """Kernels by backend, then rates, memory and ranks; what is not ok stands below with its reason."""
    by_place: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.check == "kernels":
            by_place[result.where].append(result)
    for place, found in by_place.items():
        if not all(x.result == NOT_RUN for x in found):
            console.print(kernel_table(place, found))
    if rates:
        console.print(rate_table(rates, results, known))
    if pairs is not None:
        show_pairs(console, pairs)
    for x in results:
        is_said = x.result == OK if x.check in ("kernels", "rates") else False
        if not is_said and not (x.check == "rates" and x.result == NOT_RUN):
            console.print(
                f"[{STYLE[x.result]}]{x.result}[/]: {plain(str(x))}", highlight=False, soft_wrap=True
            )


def plain(text: str) -> str:
    return text.replace("[", "\\[")


def cell(found: Result | None) -> str:
    if found is None:
        return ""
    times = f" x {found.repetitions}" if found.repetitions > 1 else ""
    return f"[{STYLE[found.result]}]{found.result}{times}[/]"


def kernel_table(place: str, found: list[Result]) -> Table:
    table = Table("operation", *DTYPES, title=f"kernels: {place}", title_justify="left")
    by_name = {(x.name, x.dtype): x for x in found}
    for op in dict.fromkeys(case.op for case in CASES):
        cells = [by_name.get((op, dtype)) for dtype in DTYPES]
        if any(cells):
            table.add_row(op, *map(cell, cells))
    return table


def rate_table(rates: list[Rate], results: list[Result], known: Baseline | None) -> Table:
    judged = {(x.name, x.where): x for x in results if x.check == "rates"}
    columns = ["rate", "where", "best batch", "median", "spread", *(["baseline", ""] if known else [])]
    table = Table(*columns, title="rates", title_justify="left")
    for rate in rates:
        row = [
            rate.name, rate.device, f"{rate.best:.4g} {rate.unit}", f"{median(rate.values):.4g}",
            f"{rate.spread:.1%}",
        ]  # fmt: skip
        if known is not None:
            base = known.rates.get(key(rate))
            row += [f"{base.median:.4g}" if base else "", cell(judged.get((rate.name, rate.device)))]
        table.add_row(*row)
    return table


def show_pairs(console: Console, pairs: Pairs) -> None:
    latency, transfer = pairs.best(pairs.latency), pairs.best(pairs.transfer)
    bandwidth = [[8 * LARGE / t / 1e9 if t else 0.0 for t in row] for row in transfer]
    for title, matrix, form in (
        ("latency of an answer, us", [[1e6 * t for t in row] for row in latency], ".0f"),
        ("bandwidth of an answer of 4 MiB, GB/s", bandwidth, ".2f"),
    ):
        if len(matrix) <= MOST_RANKS:
            console.print(matrix_table(title, matrix, form))
    for what, times in (("latency", latency), ("bandwidth", transfer)):
        i, j = slowest(times)
        usual = median(times[a][b] for a in range(len(times)) for b in others(len(times), a))
        console.print(
            f"slowest pair by {what}: rank {i} asks rank {j}, {times[i][j] / usual:.1f} times the median",
            highlight=False,
        )


def matrix_table(title: str, matrix: Matrix, form: str) -> Table:
    P = len(matrix)
    table = Table("asks \\ answers", *map(str, range(P)), title=title, title_justify="left")
    for i, row in enumerate(matrix):
        table.add_row(str(i), *("" if i == j else format(value, form) for j, value in enumerate(row)))
    return table
