"""`sigma bench --aot`: every Triton kernel compiled for GPUs that are not here, and judged by what was compiled."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from sigma_cli.aot_launches import Launch


@dataclass(frozen=True)
class Gpu:
    """A target of the compiler and what a datasheet says of the processor that stands for it.

    Peaks are dense, per second: `flops` by bytes of an element (bf16 and f32 by matrix units, f32 on NVIDIA by the
    scalar ones, as "ieee" asks), `bandwidth` in bytes.  `shared` is what a program may take, `shared_all` what those
    on one processor share.
    """

    name: str
    architecture: str
    target: GPUTarget
    processors: int
    flops: dict[int, float]
    bandwidth: float
    shared: int
    shared_all: int


KIB = 1024
GPUS = {
    gpu.architecture: gpu
    for gpu in (
        Gpu("A100 SXM 80 GB", "sm_80", GPUTarget("cuda", 80, 32), 108, {2: 312e12, 4: 19.5e12}, 2.039e12,
            163 * KIB, 164 * KIB),
        Gpu("H100 SXM", "sm_90", GPUTarget("cuda", 90, 32), 132, {2: 989e12, 4: 67e12}, 3.35e12, 227 * KIB, 228 * KIB),
        Gpu("B200", "sm_100", GPUTarget("cuda", 100, 32), 148, {2: 2250e12, 4: 75e12}, 8e12, 227 * KIB, 228 * KIB),
        Gpu("MI300X", "gfx942", GPUTarget("hip", "gfx942", 64), 304, {2: 1307e12, 4: 163.4e12}, 5.3e12, 64 * KIB,
            64 * KIB),
        Gpu("MI355X", "gfx950", GPUTarget("hip", "gfx950", 64), 256, {2: 2500e12, 4: 157.3e12}, 8e12, 160 * KIB,
            160 * KIB),
    )
}  # fmt: skip

# What multiplies: at 128 rows (and from 64 on for wgmma and tcgen05) and below, in SASS or in AMD's assembly.
HEAVY = {"sm_80": "HMMA", "sm_90": "[HQ]GMMA", "sm_100": "UTC\\w*MMA", "gfx942": "v_mfma", "gfx950": "v_mfma"}
LIGHT = {**HEAVY, "sm_90": "[HQ]G?MMA", "sm_100": "[HQ]MMA|UTC\\w*MMA"}
# What a lane loads, in bytes, by the end of the instruction's name; SASS without one is 4.
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
PRODUCTS = ("gate_up", "grouped_gemm", "grouped_outer")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, read from its code."""

    registers: int
    spills: int
    shared: int
    warps: int
    matrix: int
    tma: int
    loads: Counter[int]  # from global memory in the code, by bytes a lane

    def share_by(self, least: int, most: int = 16) -> float:
        """Of the bytes that its loads name, those that come so many at a time."""
        named = {size: size * count for size, count in self.loads.items()}
        return sum(n for size, n in named.items() if least <= size <= most) / max(1, sum(named.values()))

    def occupancy(self, gpu: Gpu) -> float:
        """Warps that one processor holds at once, of the most it can: limited by registers and shared memory."""
        if gpu.target.backend == "hip":  # 512 registers a lane, eight waves on each of four units
            waves = min(8, 512 // (-(-max(self.registers, 1) // 8) * 8))
            programs, most = waves * 4 // self.warps, 32
        else:
            per_warp = -(-self.registers * 32 // 256) * 256
            programs, most = 65536 // (per_warp * self.warps), 64
        if self.shared:
            reserved = KIB if gpu.target.backend == "cuda" else 0  # of each program, for the system
            programs = min(programs, gpu.shared_all // (self.shared + reserved))
        return min(programs * self.warps, most) / most


def read(kernel: CompiledKernel, gpu: Gpu, matrix: str) -> Resources:
    """Resources of a kernel, from the machine code that was made."""
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if gpu.target.backend == "hip":
        code = kernel.asm["amdgcn"]
        registers = field(code, "vgpr_count")
        spills = field(code, "vgpr_spill_count") + field(code, "sgpr_spill_count")
    else:
        usage, code = dump(kernel.asm["cubin"])
        registers = int(re.findall(r"REG:(\d+)", usage)[-1])
        spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return Resources(
        registers,
        spills,
        shared,
        warps,
        len(re.findall(rf"\b(?:{matrix})", code)),
        len(re.findall(r"\bUTMA(?:LDG|STG)", code)),
        loads(code, gpu),
    )


def loads(code: str, gpu: Gpu) -> Counter[int]:
    """Loads from global memory in the code, straight to shared memory too, by the bytes that a lane asks for."""
    if gpu.target.backend == "cuda":
        names = re.findall(r"\b(?:LDG|LDGSTS)\.(\S+)", code)
        return Counter(
            next((SASS_BYTES[part] for part in name.split(".") if part in SASS_BYTES), 4) for name in names
        )
    sizes = "|".join(sorted(AMD_BYTES, key=len, reverse=True))
    found = re.findall(rf"\b(?:global|buffer)_load_(?:lds_)?(?:[us])?({sizes})\b([^\n]*)", code)
    # gfx950 fills shared memory by 4 bytes a lane, of which 64 lanes together ask for whole lines.
    return Counter(16 if rest.endswith(" lds") else AMD_BYTES[size] for size, rest in found)


def field(code: str, name: str) -> int:
    found = re.findall(rf"\.{name}:\s+(\d+)", code)
    if not found:
        raise ValueError(f"the compiler's assembly has no .{name}")
    return int(found[-1])


def dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([cuobjdump(), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )


@cache
def cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


# Spills that a GPU was seen to pay for: what spills there was faster than what does not (docs/log.md).
MEASURED_SPILLS = {("sm_90", "gate_up", 128, 128): 40}


@dataclass(frozen=True)
class Verdict:
    """One kernel on one target: what it takes, and what is wrong with it."""

    launch: Launch
    gpu: Gpu
    dtype: torch.dtype
    resources: Resources
    wrong: tuple[str, ...]


def judged(launch: Launch, gpu: Gpu, dtype: torch.dtype) -> Verdict:
    """Compile and look: no spill but measured ones, shared memory fits, the matrix units are used, loads are wide."""
    rows = launch.bound.get("BLOCK_M", 0)
    is_product = launch.name in PRODUCTS
    is_tf32 = launch.bound.get("PRECISION") == "tf32"
    is_narrow = any(kind(x) == torch.float8_e4m3fn for x in launch.args) or dtype.itemsize == 2
    takes_matrix = is_product and (is_narrow or is_tf32 or gpu.target.backend == "hip")
    matrix = (HEAVY if rows >= 128 else LIGHT)[gpu.architecture]
    found = read(launch.compiled(gpu.target), gpu, matrix)
    wrong = []
    tile = tuple(launch.bound.get(name) for name in ("BLOCK_M", "BLOCK_N"))
    if found.spills > MEASURED_SPILLS.get((gpu.architecture, launch.name, *tile), 0):
        wrong.append(f"{found.spills} spills")
    if found.shared > gpu.shared:
        wrong.append(f"{found.shared} bytes of shared memory, {gpu.shared} are there")
    if takes_matrix and not found.matrix:
        wrong.append(f"no {matrix}")
    if launch.bound.get("TMA") and gpu.target.backend == "cuda" and not found.tma:
        wrong.append("no UTMALDG or UTMASTG")
    # Maps and weights of rows are 2 to 4 bytes; a weight of one byte is 4 by the tile, a TF32 that is transposed too,
    # and each step of fp8 by block reads scales of 4.
    if is_product and found.share_by(1, 2) > 0.1:
        wrong.append(f"{found.share_by(1, 2):.0%} of the bytes loaded by 1 or 2")
    least = 0.3 if launch.bound.get("SCALED") == "block" else 0.45
    if is_product and found.share_by(8) < least and not is_tf32:
        wrong.append(f"{found.share_by(8):.0%} of the bytes loaded by 8 or 16")
    if is_product and found.occupancy(gpu) == 0:
        wrong.append("does not fit on a processor")
    return Verdict(launch, gpu, dtype, found, tuple(wrong))


def distinct(launches: list[Launch]) -> list[Launch]:
    """One of each that compiles to other code: by kernel, types, keywords and what a size is divisible by."""
    seen: dict[tuple[object, ...], Launch] = {}
    for launch in launches:
        kinds = tuple(map(kind, launch.args))
        seen.setdefault((launch.name, kinds, tuple(sorted(launch.options.items()))), launch)
    return list(seen.values())


def kind(argument: object) -> object:
    """What the compiler knows of it."""
    match argument:
        case TensorDescriptor():
            return argument.base.dtype, *argument.block_shape
        case torch.Tensor():
            return argument.dtype
        case int():
            return argument == 1, argument % 16 == 0
    return argument
