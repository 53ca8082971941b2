#!/usr/bin/env python3
"""Compile every .cu of csrc/cuda for three generations of GPUs and look at what came out.

No kernel may spill registers or take more static shared memory than a block has, and the instructions that a kernel
is written for must be there.  Needs nvcc and cuobjdump, from a CUDA toolkit or from
`pip install -r tests/simt/requirements.txt`; no GPU.  Exit code 3 where they are missing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = 48 << 10  # static, on all of them; what is dynamic is a static_assert of the source

VECTOR_LOAD, VECTOR_STORE = "LDG.E.128", "STG.E.128"
TENSOR_CORE = ("HMMA.16816.F32", "LDSM.16", "LDGSTS.E", "STG.E.128")
# File: part of a kernel's mangled name: opcodes that each such kernel must have.
WANTED = {
    "combine.cu": {
        "combine_kernelIfLi4E": (VECTOR_LOAD, VECTOR_STORE),
        "combine_kernelINS0_4Bf16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
        "combine_kernelINS0_3F16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
        "combine_backward_kernelIfLi4E": (VECTOR_LOAD, VECTOR_STORE),
        "combine_backward_kernelINS0_4Bf16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
        "combine_backward_kernelINS0_3F16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
    },
    "copy_rows.cu": {"copy_rows_kernelI5uint4E": (VECTOR_LOAD, VECTOR_STORE)},
    "dispatch.cu": {"pack_kernelI5uint4E": (VECTOR_LOAD, VECTOR_STORE)},
    "fixed_work.cu": {
        "arithmetic_kernel": ("FFMA", "CS2R"),
        "copying_kernel": (VECTOR_LOAD, VECTOR_STORE, "CS2R"),
    },
    "group.cu": {"place_slots_kernel": ("MATCH.ANY",)},
    "grouped_gemm.cu": {"grouped_gemm_kernel": TENSOR_CORE},
    "grouped_outer.cu": {"grouped_outer_kernel": TENSOR_CORE},
    "route.cu": {
        "route_kernelILi1ELb0E": (VECTOR_LOAD,),  # Lb1: with sums
        "route_kernelILi1ELb1E": (VECTOR_LOAD,),
        "route_kernel": (VECTOR_LOAD,),
        "add_partials_kernel": ("LDG.E", "DADD"),
    },
    "route_backward.cu": {
        "route_backward_kernelILi1ELb0E": (VECTOR_LOAD, VECTOR_STORE),
        "route_backward_kernelILi1ELb1E": (VECTOR_LOAD, VECTOR_STORE),
        "route_backward_kernel": (VECTOR_LOAD, VECTOR_STORE),
    },
    "swiglu.cu": {
        "swiglu_kernelINS0_4Bf16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
        "swiglu_kernelINS0_3F16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
        "swiglu_backward_kernelINS0_4Bf16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
        "swiglu_backward_kernelINS0_3F16ELi8E": (VECTOR_LOAD, VECTOR_STORE),
    },
}


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    spilled: int  # bytes, stores and loads
    shared: int  # bytes, static
    opcodes: frozenset[str]


def tool(name: str) -> str | None:
    """The path of a tool of CUDA: on PATH, or from a Python package."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    return shutil.which(name) or (str(packaged) if packaged.exists() else None)


def compiled(source: Path, architecture: int, nvcc: str, cuobjdump: str) -> list[Kernel]:
    """What ptxas says of each kernel, and the opcodes of its code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [nvcc, "-std=c++20", "-O3", f"-arch=sm_{architecture}", f"-I{ROOT}/csrc", "-Xptxas", "-v"]
        result = subprocess.run(
            [*command, "-cubin", "-o", str(cubin), str(source)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{source.name} for sm_{architecture}: {result.stderr}")
        code = subprocess.run(
            [cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    opcodes = {}
    for part in code.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        opcodes[name.strip()] = frozenset(
            re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body)
        )
    kernels = []
    for part in result.stderr.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(Kernel(name, registers, spilled, int(shared[1]) if shared else 0, opcodes[name]))
    return kernels


def faults(kernels: list[Kernel], wanted: dict[str, tuple[str, ...]]) -> list[str]:
    """What is wrong with the kernels of one source."""
    found = [f"{k.name} spills {k.spilled} bytes" for k in kernels if k.spilled]
    found += [f"{k.name} takes {k.shared} bytes of shared memory" for k in kernels if k.shared > SHARED_LIMIT]
    for part, opcodes in wanted.items():
        those = [k for k in kernels if part in k.name]
        if not those:
            found.append(f"no kernel is named {part}")
        for k in those:
            missing = [o for o in opcodes if not any(have.startswith(o) for have in k.opcodes)]
            found += [f"{k.name} lacks {o}" for o in missing]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="registers of every kernel")
    verbose = parser.parse_args().verbose
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    if not nvcc or not cuobjdump:
        missing = " and ".join(n for n, t in (("nvcc", nvcc), ("cuobjdump", cuobjdump)) if not t)
        print(f"NOT RUN: no {missing} here; pip install -r tests/simt/requirements.txt")
        return 3

    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    jobs = [(source, a) for source in sources for a in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(*job, nvcc, cuobjdump), jobs))
    passed = failed = 0
    for (source, architecture), kernels in zip(jobs, results, strict=True):
        found = faults(kernels, WANTED[source.name])
        passed, failed = passed + len(kernels), failed + len(found)
        most, spilled = max(k.registers for k in kernels), sum(k.spilled for k in kernels)
        print(
            f"{source.name:20} sm_{architecture:<4} {len(kernels):2} kernels, "
            f"{most:3} registers at most, {spilled} bytes spilled"
        )
        for k in kernels if verbose else ():
            print(f"    {k.registers:3} registers  {k.name}")
        for text in found:
            print(f"    wrong: {text}")

    # The gate itself: a kernel that spills and loads 4 bytes at once is caught at both.
    bad = faults(compiled(ROOT / "tests/simt/spills.cu", 80, nvcc, cuobjdump), {"spills": (VECTOR_LOAD,)})
    is_caught = len(bad) == 2 and "spills" in bad[0] and f"lacks {VECTOR_LOAD}" in bad[1]
    passed, failed = passed + is_caught, failed + (not is_caught)
    if not is_caught:
        print(f"wrong: the spilling kernel was not caught, found {bad}")
    print(f"cubins: {passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
