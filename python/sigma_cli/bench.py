"""`sigma bench`: the races of bench/, as a table, a page of results with its pictures, and JSON."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sigma_train.console import say
from sigma_train.errors import Stopped, WrongInput
from sigma_train.files import atomic_file, must_be_writable, must_take_file, write_text
from sigma_train.markdown import table
from sigma_train.processor import processor_name

import sigma_kernels as sk
from sigma_cli import heeded
from sigma_cli.bounds import fastest_bounds

SCHEMA = 1
# Settings of the process that change what memory or threads cost everyone, so the page names those that are set.
ENVIRONMENT = ("MALLOC_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "SIGMA_ISA", "SIGMA_BACKEND", "OMP_", "KMP_", "GOMP_",
               "MKL_")  # fmt: skip
PACKAGES = ("transformers", "numpy", "ggml-python", "kt-kernel")
GPU_ENVIRONMENT = ("CUDA_", "HIP_", "TRITON_", "PYTORCH_", "NVIDIA_TF32_OVERRIDE")
PLACES = ("_HOME", "_DIR", "_PATH", "_VERSION")  # of these, where things lie changes no time
GPU_PACKAGES = ("triton", "megablocks", "grouped_gemm", "sonicmoe", "liger-kernel", "vllm")
SHARES = ("race", "ours, ms", "bound, ms", "of", "share", "best peer", "over ours")
STREAMS = ("read", "write", "read_write", "copy")  # bounds of bytes
COLUMNS = ("who", "median, ms", "fastest, ms", "slowest, ms", "rounds", "over ours")


def run(
    group: str,
    quick: bool,
    rounds: int,
    threads: int | None,
    output: Path | None,
    json_file: Path | None = None,
    extra: Sequence[str] = (),
    device: str = "cpu",
) -> int:
    """Race, print, write.  Returns the exit code: 0 done, 1 a candidate was wrong or failed, 2 no bench/ here."""
    console = Console()
    if not Path("bench/race.py").exists():
        say(console, "error: sigma bench runs in a clone of the repository; there is no bench/ here", "red")
        return 2
    if device == "cuda" and not torch.cuda.is_available():
        raise WrongInput(f"--device cuda: torch {torch.__version__} sees no GPU here")
    for option, path in (("--output", output), ("--json", json_file)):
        check_place(option, path)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "races.json"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "bench", "--benchmark-disable-gc", "-k", group]
        command += [
            "--rounds",
            str(rounds),
            "--race-json",
            str(target),
            "--benchmark-quiet",
            "--device",
            device,
        ]
        command += ["--quick"] if quick else []
        command += [*(["--threads", str(threads)] if threads else []), *extra]
        stopped = None
        try:
            code = subprocess.run(
                command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, check=False
            ).returncode
        except Stopped as error:  # the races that are over are written all the same
            heeded()
            stopped, code = error, 1
        found = json.loads(target.read_text()) if target.exists() else {"races": []}
    if not found["races"]:
        if stopped:
            raise stopped
        return 1
    arguments = [group, *(["--quick"] if quick else []), "--rounds", str(rounds)]
    arguments += ["--device", device] if device != "cpu" else []
    arguments += ["--threads", str(threads)] if threads else []
    document = {
        "schema": SCHEMA,
        "environment": environment(shlex.join(["sigma", "bench", *arguments]), threads, device),
        **found,
        **({"stopped": True} if stopped else {}),
    }
    for race in document["races"]:
        console.print(rich_table(race))
    if json_file is not None:
        write_text(json_file, json.dumps(document, indent=1) + "\n")
        say(console, f"wrote {json_file}")
    if output is not None:
        for path in write_page(document, output):
            say(console, f"wrote {path}")
    if stopped:
        raise stopped
    return 0 if code == 0 else 1


def check_place(option: str, path: Path | None) -> None:
    """Its folder is made.  Raises: WrongInput if no file can be made there."""
    if path is None:
        return
    with must_be_writable(option, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    must_take_file(option, path)


def write_page(document: dict[str, Any], output: Path) -> list[Path]:
    """The page, and beside it each picture that the races give enough points for."""
    from sigma_train.report import png

    from sigma_cli.bench_plots import pictures

    written = []
    for name, figure in pictures(document).items():
        path = output.with_name(f"{output.stem}-{name}.png")
        with atomic_file(path) as file:
            file.write(png(figure))
        written.append(path)
    write_text(output, page(document, [path.name for path in written]))
    return [output, *written]


def environment(command: str, threads: int | None, device: str = "cpu") -> dict[str, Any]:
    of_gpu = device != "cpu"
    prefixes = ENVIRONMENT + (GPU_ENVIRONMENT if of_gpu else ())
    packages = PACKAGES + (GPU_PACKAGES if of_gpu else ())
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "cpu": processor_name(),
        "machine": platform.machine(),
        "isa": sk._C.isa(),
        "threads": threads or torch.get_num_threads(),
        "thp": huge.read_text().split("[")[1].split("]")[0]
        if huge.exists()
        else "not offered by this system",
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(prefixes) and not name.endswith(PLACES)
        },
        "versions": {"torch": torch.__version__, "sigma-kernels": sk.__version__, **installed(packages)},
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    out = {}
    for name in packages:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def title(race: dict[str, Any]) -> str:
    return ", ".join(race[part] for part in ("group", "shape", "load", "memory") if race[part])


def flop_rate(race: dict[str, Any]) -> tuple[str, float, int]:
    """Unit of FLOPs per second, its size and decimals: of a GPU they are many."""
    fastest = min(c["median_s"] for c in race["candidates"] if "median_s" in c and multiplies(c))
    return ("TFLOP/s", 1e12, 1) if (race["flops"] or 0) / fastest >= 1e12 else ("GF/s", 1e9, 0)


def multiplies(candidate: dict[str, Any]) -> bool:
    return candidate["kind"] != "beside" and candidate["name"] not in STREAMS


def columns(race: dict[str, Any]) -> tuple[str, ...]:
    return (*COLUMNS, flop_rate(race)[0], "GB/s")


def lines(race: dict[str, Any]) -> list[tuple[str, ...]]:
    """The candidates' rows: ours, in other ways too, what is beside it, the bounds, the peers, fastest first."""
    ours = race["candidates"][0]["median_s"]
    _, unit, decimals = flop_rate(race)
    rank = {"ours": 0, "variant": 1, "beside": 2, "bound": 3, "peer": 4}
    ordered = sorted(race["candidates"], key=lambda c: (rank[c["kind"]], c.get("median_s", float("inf"))))
    out = []
    for c in ordered:
        who = c["name"] if c["kind"] in ("ours", "variant", "peer") else f"{c['kind']}: {c['name']}"
        if "reason" in c:
            out.append((who, c["reason"], *[""] * len(COLUMNS)))
            continue
        flops, moved = race["flops"], c.get("moved", race["moved"])
        has_flops = flops and multiplies(c)
        has_moved = moved and c["kind"] != "beside" and not c["name"].startswith("dense")
        out.append(
            (
                who,
                milliseconds(c["median_s"]),
                milliseconds(c["min_s"]),
                milliseconds(c["max_s"]),
                str(c["rounds"]),
                f"{c['median_s'] / ours:.2f}",
                f"{flops / c['median_s'] / unit:.{decimals}f}" if has_flops else "",
                f"{moved / c['median_s'] / 1e9:.1f}" if has_moved else "",
            )
        )
    return out


def shares(races: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of each race that has bounds: ours, the bound that lies highest, our share of it, and the best peer."""
    out = []
    for race in races:
        ours, *others = (c for c in race["candidates"] if "median_s" in c)
        if not (bounds := fastest_bounds(race)):
            continue
        bound = max(bounds.values(), key=lambda c: c["median_s"])
        peers = sorted((c["median_s"], c["name"]) for c in others if c["kind"] == "peer")
        best = (peers[0][1], f"{peers[0][0] / ours['median_s']:.2f}") if peers else ("", "")
        out.append((title(race), milliseconds(ours["median_s"]), milliseconds(bound["median_s"]), bound["name"],
                    f"{bound['median_s'] / ours['median_s']:.0%}", *best))  # fmt: skip
    return out


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{1 if seconds >= 0.01 else 3 if seconds >= 2e-5 else 5}f}"


def remarks(race: dict[str, Any]) -> str:
    """What else a reader of the table must know: load, calls a turn, shares."""
    parts = []
    if rows := race.get("rows"):
        skew = rows["most"] / rows["mean"]
        parts.append(f"Rows per expert: {rows['mean']:.4g} on average, {rows['most']} at most (skew {skew:.2f}), "
                     f"{rows['idle']} experts idle.")  # fmt: skip
    if race.get("calls", 1) > 1:
        parts.append(f"{race['calls']} calls a turn; times are of one.")
    for c in race["candidates"]:
        if c["kind"] == "beside":
            share = race["candidates"][0]["median_s"] / c["median_s"]
            parts.append(f"Ours takes {share:.1%} of the time of the {c['name']} beside it.")
    if note := race.get("note"):
        parts.append(f"{note[0].upper()}{note[1:]}.")
    return " ".join(parts)


def rich_table(race: dict[str, Any]) -> Table:
    table = Table(title=title(race), title_justify="left", caption=remarks(race), caption_justify="left")
    for column in columns(race):
        table.add_column(column, justify="left" if column == "who" else "right")
    for row in lines(race):
        table.add_row(*row)
    return table


def named(gpu: dict[str, Any]) -> str:
    clocks = "".join(f", {name} {value}" for name, value in gpu["clocks"].items())
    return (f"{gpu['name']} ({gpu['architecture']}, {gpu['multiprocessors']} multiprocessors, "
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['peak_bytes'] / 2**30:.1f} GiB of it used at most{clocks}), "
            f"driver {gpu['driver']}, {gpu['runtime']}")  # fmt: skip


def timing(gpu: dict[str, Any]) -> str:
    return ("Times are the device's: a turn is calls queued one behind another, each between two events, and before "
            f"each a write of {gpu['flush_bytes'] / 2**20:.0f} MiB flushes L2 outside of its time. Launches are queued "
            "ahead, so that gaps between them count only of those who make the host wait for the device.")  # fmt: skip


def page(document: dict[str, Any], plots: Sequence[str] = ()) -> str:
    about = document["environment"]
    variables = [f"{name}={value}" for name, value in about["variables"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    peak = document.get("peak_bytes")
    gpu = document.get("device")
    parts = [
        f"# Results on a {'GPU' if gpu else 'CPU'}",
        "",
        f"Made by `{' '.join([*variables, about['command']])}` on {about['date']}: "
        f"{named(gpu) + ', host ' if gpu else ''}{about['cpu']} ({about['machine']}, "
        f"ISA {about['isa']}), {about['threads']} threads, huge pages: {about['thp']}, {versions}"
        + (f", {peak / 2**30:.1f} GiB of memory at most." if peak else "."),
        *(
            ["The run was stopped; the races that it did not come to are missing."]
            if "stopped" in document
            else []
        ),
        "OpenMP's and malloc's settings are the defaults but for those in the command.",
        *(["", timing(gpu)] if gpu else []),
        "",
        "Each table is one interleaved run. Bounds are the same FLOPs in one dense product or layer and the same bytes "
        "in one stream. Everyone's first result was checked before the clock started: layers and products against f64, "
        "choices of experts and copies exactly, training steps by their loss and the gradient of a layer's experts. "
        "`fresh`: gradients are allocated, filled and released in the timed call, where `sigma` gets memory again that "
        "it has kept and `sigma_nothing_kept` has given it back; `kept`: they go to memory that exists. GB/s: of "
        "weights, or of what is read and written where there are none.",
    ]
    for name in plots:
        kind = Path(name).stem.rsplit("-", 1)[-1]
        parts += ["", f"![{kind}]({name})"]
    if rows := shares(document["races"]):
        parts += ["", "## Shares of the bounds", "", "The bound is the higher of a race's bounds, measured in its "
                  "turns: no kernel that needs both takes less. One that was measured in f32 too is the faster of the "
                  "two.", "", *table(SHARES, rows)]  # fmt: skip
    for race in document["races"]:
        parts += ["", f"## {title(race)}", "", *table(columns(race), lines(race))]
        if text := remarks(race):
            parts += ["", text]
    return "\n".join(parts) + "\n"
