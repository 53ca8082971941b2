"""The page of `sigma bench --aot`: what every kernel takes on every target, and the time that paper allows it."""

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import triton
from sigma_train.files import write_text
from sigma_train.markdown import table
from torch import Tensor

import sigma_kernels as sk
from sigma_cli.aot import GPUS, PRODUCTS, Gpu, Verdict, distinct, judged
from sigma_cli.aot_launches import Launch, Shape, layer, others
from sigma_cli.bench import check_place

DTYPES = {"f32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Shape A at four loads: each asks for another row tile.  The layer's bounds are told for the second and the last.
SHAPES = [Shape(T, 96, 1, 1024, 512) for T in (512, 2048, 8192, 65536)]
TOLD = (SHAPES[1], SHAPES[3])
SEVERAL = Shape(8192, 96, 8, 1024, 512)
COLUMNS = ("kernel", "dtype", "tile", "warps", "registers", "spills", "shared, KiB", "matrix instructions",
           "loads by 16 bytes", "occupancy", "verdict")  # fmt: skip

Cell = tuple[str, str]


def launches(cell: Cell) -> list[Launch]:
    """All that differ, of one architecture and dtype."""
    architecture, name = cell
    gpu, dtype = GPUS[architecture], DTYPES[name]
    with multiplied_as(name):
        found = [call for s in (*SHAPES, SEVERAL) for call in layer(s, dtype, architecture, gpu.processors)]
        for shape in (SHAPES[1], SEVERAL):
            found += others(shape, dtype, architecture, gpu.processors)
    return distinct([call for call in found if name != "tf32" or call.bound.get("PRECISION") == "tf32"])


@contextmanager
def multiplied_as(dtype: str) -> Iterator[None]:
    """torch's setting for products of f32, for a while."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def by_block(calls: Sequence[Launch]) -> list[Launch]:
    """The first of each kernel and block size, whatever the forms of its arguments."""
    return list({(call.name, *sorted(call.options.items())): call for call in reversed(calls)}.values())[::-1]


@cache
def plan(quick: bool) -> list[tuple[Cell, Launch]]:
    """What `run` compiles, in the page's order."""
    cells = [(gpu, name) for gpu in GPUS for name in (["bf16"] if quick else DTYPES)]
    return [
        (cell, call) for cell in cells for call in (by_block(launches(cell)) if quick else launches(cell))
    ]


def judged_line(quick: bool, place: int) -> tuple[tuple[str, ...], bool]:
    """Of one of the plan: by its place, since a kernel cannot be sent to another process."""
    (architecture, name), call = plan(quick)[place]
    return line(judged(call, GPUS[architecture], DTYPES[name]), name)


def line(verdict: Verdict, dtype: str) -> tuple[tuple[str, ...], bool]:
    found, bound = verdict.resources, verdict.launch.bound
    block = [bound.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    text = (
        form(verdict.launch), dtype, " x ".join(map(str, block)) if None not in block else "", str(found.warps),
        str(found.registers), str(found.spills), f"{found.shared / 1024:.0f}", str(found.matrix),
        f"{found.share_by(16):.0%}", f"{found.occupancy(verdict.gpu):.0%}", ", ".join(verdict.wrong) or "good",
    )  # fmt: skip
    return text, not verdict.wrong


def form(launch: Launch) -> str:
    """The kernel's name, and which of its forms this is."""
    bound = launch.bound
    scaled, is_outer = bound.get("SCALED"), launch.name == "grouped_outer"
    marks = {
        "map": bound.get("row_map_ptr") is not None and launch.name == "grouped_gemm",
        "weights": bound.get("weights_ptr") is not None and launch.name != "swiglu_backward",
        "int8": bool(scaled) and bound["row_scale_ptr"] is None,
        f"fp8 by {scaled}": bool(scaled) and bound["row_scale_ptr"] is not None,
        "TMA": bool(bound.get("TMA")),
        "by token": bound.get("token_map_ptr") is not None,
        "a by token": bound.get("a_map_ptr") is not None,
        "b by token": bound.get("b_map_ptr") is not None,
        "in f32": is_outer and not bound["TMA"] and bound["out"].dtype != bound["a_ptr"].dtype,
        "adds": bound.get("ACCUMULATE", False),
        "columns contiguous": launch.name == "grouped_gemm" and bound["stride_n"] == 1,
    }
    told = [mark for mark, holds in marks.items() if holds]
    return f"`{launch.name}`" + (f" ({', '.join(told)})" if told else "")


def work(launch: Launch, shape: Shape) -> tuple[float, float, float]:
    """Bytes, FLOPs as scheduled and FLOPs that are wanted, under balanced load.

    Bytes: every tensor once.  Scheduled: rows rounded up to whole tiles.
    """
    bound = launch.bound
    operands = [getattr(x, "base", x) for x in launch.args]  # of a descriptor its tensor
    tensors = {id(x): x for x in operands if isinstance(x, Tensor)}
    moved = sum(x.numel() * x.itemsize for x in tensors.values())
    if launch.name == "grouped_outer":
        step, product = bound["BLOCK_K"], bound["M"] * bound["N"]
    elif launch.name == "grouped_gemm":
        step, product = bound["BLOCK_M"], bound["N"] * bound["K"]
    else:
        step, product = bound["BLOCK_M"], 2 * bound["I"] * bound["H"]  # gate and up
    padded = shape.E * math.ceil(shape.rows / step) * step
    return moved, 2.0 * padded * product, 2.0 * shape.T * shape.k * product


def bounds(gpu: Gpu, shape: Shape, dtype: torch.dtype) -> list[tuple[str, ...]]:
    """A line for each launch of the layer: what it moves and computes, the least time for either; then their sum."""
    out, total, wanted_total = [], 0.0, 0.0
    for launch in layer(shape, dtype, gpu.architecture, gpu.processors):
        if launch.name not in PRODUCTS:
            continue
        moved, flops, wanted = work(launch, shape)
        by_memory, by_flops = moved / gpu.bandwidth, flops / gpu.flops[dtype.itemsize]
        total, wanted_total = total + max(by_memory, by_flops), wanted_total + wanted
        out.append((form(launch), f"{moved / 1e6:.0f}", f"{flops / 1e9:.1f}", f"{wanted / flops:.0%}",
                    f"{by_memory * 1e6:.0f}", f"{by_flops * 1e6:.0f}"))  # fmt: skip
    peak = wanted_total / total / gpu.flops[dtype.itemsize]
    out.append(
        (
            "all",
            "",
            f"{wanted_total / 1e9:.1f} wanted",
            "",
            f"{total * 1e6:.0f} in all",
            f"{peak:.0%} of the peak",
        )
    )
    return out


def run(quick: bool, output: Path | None) -> int:
    """Compile all, or bf16 and one of each block size; write the page.  Returns 1 if a kernel is not as it must be."""
    check_place("--output", output)
    work_list = plan(quick)
    tables: dict[Cell, list[tuple[tuple[str, ...], bool]]] = {cell: [] for cell, _ in work_list}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        lines = pool.map(judged_line, [quick] * len(work_list), range(len(work_list)))
        for (cell, _), judgement in zip(work_list, lines, strict=True):
            tables[cell].append(judgement)
    if output:
        command = ["sigma", "bench", "--aot", *(["--quick"] if quick else []), "--output", str(output)]
        write_text(output, page(tables, command))
        print(f"wrote {output}")
    wrong = [(cell, text) for cell, table in tables.items() for text, is_good in table if not is_good]
    for (architecture, _), text in wrong:
        print(f"{architecture}: {text[0]} {text[1]} {text[2]}: {text[-1]}", file=sys.stderr)
    print(f"{sum(map(len, tables.values()))} kernels compiled, {len(wrong)} not as they must be")
    return 1 if wrong else 0


def page(tables: dict[Cell, list[tuple[tuple[str, ...], bool]]], command: Sequence[str]) -> str:
    parts = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Made by `{shlex.join(command)}` on {time.strftime('%Y-%m-%d')}: Triton {triton.__version__}, torch "
        f"{torch.__version__}, sigma-kernels {sk.__version__}. **No GPU was there: nothing on this page is a measured "
        "time.** The kernels are those that the layer's own launchers ask for on tensors without memory, for E=96, "
        "H=1024, I=512, k=1 and T = 512, 2,048, 8,192 and 65,536, and k=8 with T=8,192: sizes divisible by 16, without "
        "which loads are narrow.",
        "",
        "A kernel is good if it spills no register, or as few as were seen to pay on a GPU, its shared memory fits, "
        "its product runs on the matrix units (f32 on NVIDIA: on the scalar ones, as torch asks unless TF32 is "
        "allowed) and its operands are loaded by 4 bytes or more. Registers, spills and instructions are read from "
        "SASS or AMD's assembly. Occupancy: warps that registers and shared memory let a processor hold, of the most "
        "it can.",
    ]
    for architecture, gpu in GPUS.items():
        rows = [text for (found, _), cell in tables.items() if found == architecture for text, _ in cell]
        parts += ["", f"## {architecture}", "", *table(COLUMNS, rows)]
        parts += bound_tables(gpu)
    return "\n".join(parts) + "\n"


def bound_tables(gpu: Gpu) -> list[str]:
    """What paper allows the layer on this processor, in bf16."""
    parts = [
        "",
        f"Paper bounds, bf16, forward and backward, balanced: {gpu.name}, by its datasheet "
        f"{gpu.flops[2] / 1e12:.0f} TFLOP/s dense and {gpu.bandwidth / 1e12:.2f} TB/s. Every tensor is moved once.",
    ]
    for shape in TOLD:
        head = ("launch", "MB", "GFLOP scheduled", "of them wanted", "us by memory", "us by FLOPs")
        parts += ["", f"T={shape.T:,}, {shape.rows:.1f} rows an expert:", ""]
        parts += table(head, bounds(gpu, shape, torch.bfloat16))
    return parts
