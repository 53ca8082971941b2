"""One test is one race: we, the peers and the bounds take turns in random order within one run, so drift hits all.

pytest-benchmark times our calls; the others run in its setup hook, between our rounds.  At the end the medians are
printed and, with --write-results FILE, written with machine, versions and date.
"""

import platform
import random
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sigma_kernels as sk

RACES: dict[str, dict[str, float]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", default=None, help="markdown file for the table of medians")
    parser.addoption("--rounds", type=int, default=7)


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark) -> Callable[..., None]:
    def run(name: str, ours: Callable[[], object], **others: Callable[[], object]) -> None:
        times: dict[str, list[float]] = {other: [] for other in others}
        order = list(others)
        ours()
        for other in order:  # one untimed call each: caches, threads, lazy imports
            others[other]()

        def setup() -> None:
            random.shuffle(order)
            for other in order:
                start = time.perf_counter()
                others[other]()
                times[other].append(time.perf_counter() - start)

        benchmark.group = name
        benchmark.pedantic(ours, setup=setup, rounds=request.config.getoption("--rounds"), iterations=1)
        medians = {other: statistics.median(values) for other, values in times.items()}
        RACES[name] = {"sigma": statistics.median(benchmark.stats.stats.data), **medians}

    return run


def table() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    lines = [
        f"{cpu}, {platform.machine()}, ISA {sk._C.isa()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "",
    ]
    for name, medians in RACES.items():
        ours = medians["sigma"]
        lines += [f"## {name}", "", "| what | median, ms | over ours |", "|---|---|---|"]
        lines += [f"| {who} | {value * 1e3:.1f} | {value / ours:.2f} |" for who, value in medians.items()] + [
            ""
        ]
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not RACES:
        return
    terminalreporter.write_line(table())
    target = config.getoption("--write-results")
    if target:
        command = shlex.join(["pytest", *config.invocation_params.args])
        text = f"# Results on a CPU\n\nMade by `{command}`; medians of one interleaved run.\n\n{table()}"
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text)
