"""`sigma bench`: the races of bench/, as a table and as a page of results."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sigma_train.files import write_text

import sigma_kernels as sk

# Settings of the process that change what memory costs everyone, so the page names those that are set.
ENVIRONMENT = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD",
               "SIGMA_ISA", "SIGMA_BACKEND")  # fmt: skip
COLUMNS = ("who", "median, ms", "fastest, ms", "rounds", "over ours", "GF/s", "GB/s of weights")


def run(group: str, quick: bool, rounds: int, threads: int | None, output: Path | None) -> int:
    """Race, print, write.  Returns the exit code: 0 done, 1 a candidate was wrong or failed, 2 no bench/ here."""
    console = Console()
    if not Path("bench/race.py").exists():
        console.print(
            "error: sigma bench runs in a clone of the repository; there is no bench/ here", style="red"
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "races.json"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "bench", "--benchmark-disable-gc", "-k", group]
        command += ["--rounds", str(rounds), "--race-json", str(target), "--benchmark-quiet"]
        command += ["--quick"] if quick else []
        command += ["--threads", str(threads)] if threads else []
        result = subprocess.run(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, check=False)
        races = json.loads(target.read_text()) if target.exists() else []
    if not races:
        return 1
    for race in races:
        console.print(rich_table(race))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        arguments = [group, *(["--quick"] if quick else []), "--rounds", str(rounds), "--output", str(output)]
        write_text(output, page(races, shlex.join(["sigma", "bench", *arguments]), threads))
        console.print(f"wrote {output}")
    return 0 if result.returncode == 0 else 1


def title(race: dict[str, Any]) -> str:
    return ", ".join(race[part] for part in ("group", "shape", "load", "memory") if race[part])


def lines(race: dict[str, Any]) -> list[tuple[str, ...]]:
    """The candidates' rows: ours, then the bounds, then the peers, fastest first."""
    ours = race["candidates"][0]["median_s"]
    rank = {"sigma": 0}
    ordered = sorted(
        race["candidates"], key=lambda c: (rank.get(c["name"], 1 if c["is_bound"] else 2), c["median_s"])
    )
    out = []
    for c in ordered:
        flops, moved = race["flops"], race["moved"]
        reads_only = c["name"] in ("read", "copy")
        out.append(
            (
                f"bound: {c['name']}" if c["is_bound"] else c["name"],
                f"{c['median_s'] * 1e3:.1f}",
                f"{c['min_s'] * 1e3:.1f}",
                str(c["rounds"]),
                f"{c['median_s'] / ours:.2f}",
                "" if reads_only or not flops else f"{flops / c['median_s'] / 1e9:.0f}",
                "" if c["name"] == "dense" or not moved else f"{moved / c['median_s'] / 1e9:.1f}",
            )
        )
    return out


def rich_table(race: dict[str, Any]) -> Table:
    table = Table(title=title(race), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "who" else "right")
    for row in lines(race):
        table.add_row(*row)
    return table


def page(races: list[dict[str, Any]], command: str, threads: int | None) -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    chosen = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    command = " ".join([*chosen, command])
    parts = [
        "# Results on a CPU",
        "",
        f"Made by `{command}` on {time.strftime('%Y-%m-%d')}: {cpu} ({platform.machine()}, ISA {sk._C.isa()}), "
        f"{threads or torch.get_num_threads()} threads, torch {torch.__version__}, sigma-kernels {sk.__version__}.",
        "Each table is one interleaved run. Bounds are the same FLOPs in one dense layer and the same bytes in one "
        "stream. Everyone's first result was checked before the clock started: layers against f64, training steps by "
        "their loss.",
    ]
    for race in races:
        parts += ["", f"## {title(race)}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        parts += ["| " + " | ".join(row) + " |" for row in lines(race)]
    return "\n".join(parts) + "\n"
