"""Block sizes of the grouped GEMMs: few configurations, each for a reason, in a table; no search.

The key is (architecture, bytes of an element, mean rows of an expert); N and K only bound a block from above.  T is
never a key, nor is it in what Triton specialises kernels by: the next step has another T and would compile anew.

The mean alone decides, though counts differ.  Up to some 300 rows an expert's time is that of reading its weights, and
its tiles of the same columns run side by side and read them once from memory: many small tiles of a crowded expert cost
less there than a second launch, for the crowded alone, adds to every step (docs/log.md has both, balanced and skewed).

sm_90's 16-bit rows were measured on an H200; the others are reasoned and never ran.
"""

from dataclasses import dataclass
from functools import cache

import torch

# A product and a sum are rounded once, on every architecture; Triton's own default is about to change.
FUSION = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """A block of the result, `rows` x `columns`, summed over steps of `depth`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """The keywords of a launch that this tile decides."""
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages, **FUSION}

    def programs(self, R: int, E: int, N: int, device: torch.device) -> int:
        """Persistent programs, at most one for each tile that R rows of E experts can make: 0 where there is no row.

        More than a processor holds: the next begins when one ends, and tiles differ in what they cost.
        """
        most = (R // self.rows + min(E, R)) * cdiv(N, self.columns)
        return min(most, processors(device) * (3 if self.warps <= 4 else 2))


# Rows of an expert on average, up to: rows of the tile.
HEIGHTS = ((8, 16), (48, 32), (2**31, 128))

# Light tiles wait for memory: deep pipelines, few warps, three programs a processor.  Heavy ones wait for the matrix
# units: the largest block whose sums stay in registers, eight warps.
# (architecture, bytes of an element) -> {rows: (columns, depth, warps, stages)}
TABLE: dict[tuple[str, int], dict[int, tuple[int, int, int, int]]] = {
    ("sm_80", 2): {16: (128, 64, 4, 4), 32: (128, 32, 4, 4), 128: (128, 32, 8, 4)},
    ("sm_90", 2): {16: (128, 128, 4, 3), 32: (128, 64, 4, 4), 128: (256, 64, 8, 4)},
    ("sm_100", 2): {16: (128, 64, 4, 4), 32: (128, 64, 4, 4), 128: (256, 64, 8, 4)},
    ("gfx942", 2): {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 128: (128, 64, 8, 2)},
    ("gfx950", 2): {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 128: (128, 64, 8, 2)},
    ("sm_80", 4): {16: (64, 32, 4, 3), 32: (64, 16, 4, 4), 128: (64, 16, 8, 3)},
    ("sm_90", 4): {16: (64, 32, 4, 3), 32: (64, 16, 4, 4), 128: (64, 16, 8, 4)},
    ("sm_100", 4): {16: (64, 16, 4, 4), 32: (64, 16, 4, 4), 128: (64, 16, 8, 3)},
    ("gfx942", 4): {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 128: (64, 32, 8, 2)},
    ("gfx950", 4): {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 128: (64, 32, 8, 2)},
    # fp8: a step is at most one block of scales, 128.
    ("sm_90", 1): {16: (128, 128, 4, 4), 32: (128, 128, 8, 4), 128: (128, 128, 8, 4)},
    ("sm_100", 1): {16: (128, 128, 4, 4), 32: (128, 128, 8, 4), 128: (128, 128, 8, 4)},
    ("gfx942", 1): {16: (128, 64, 4, 2), 32: (128, 128, 4, 2), 128: (128, 128, 8, 2)},
    ("gfx950", 1): {16: (128, 128, 4, 2), 32: (128, 128, 4, 2), 128: (128, 128, 8, 2)},
    # The interpreter's time is per block, whatever its size.
    ("interpreter", 1): dict.fromkeys((16, 32, 128), (256, 128, 4, 2)),
    ("interpreter", 2): dict.fromkeys((16, 32, 128), (256, 128, 4, 2)),
    ("interpreter", 4): dict.fromkeys((16, 32, 128), (256, 128, 4, 2)),
}
# Gate and up of each column are two sums.  Beyond 64 columns they and the epilogue's addresses spill; here, a little,
# after the last step: 330 us where 64 columns took 373 (T=32,768 of Sigma-MoE-Tiny).
PAIRS = {("sm_90", 2, 128): 128}

# The weight gradient sums over an expert's rows: (architecture, bytes) -> rows of the result, columns, warps, stages.
OUTER: dict[tuple[str, int], tuple[int, int, int, int]] = {
    ("sm_80", 2): (128, 128, 8, 3),
    ("sm_90", 2): (128, 128, 4, 2),
    ("sm_100", 2): (128, 128, 8, 3),
    ("gfx942", 2): (128, 128, 4, 2),
    ("gfx950", 2): (128, 128, 4, 2),
    ("sm_80", 4): (64, 64, 4, 3),
    ("sm_90", 4): (64, 64, 4, 3),
    ("sm_100", 4): (64, 64, 4, 3),
    ("gfx942", 4): (64, 64, 4, 2),
    ("gfx950", 4): (64, 64, 4, 2),
    ("interpreter", 2): (256, 256, 4, 2),
    ("interpreter", 4): (256, 256, 4, 2),
}


def row_tile(
    N: int, K: int, R: int, E: int, dtype: torch.dtype, device: torch.device, is_pair: bool = False
) -> Tile:
    """That of a GEMM of R rows, grouped by E experts, with N columns summed over K, or N pairs of columns."""
    height = next(rows for most, rows in HEIGHTS if most * E >= R)
    return _row_tile(N, K, height, dtype, architecture(device), is_pair)


@cache
def _row_tile(N: int, K: int, height: int, dtype: torch.dtype, name: str, is_pair: bool) -> Tile:
    columns, depth, warps, stages = TABLE[name, dtype.itemsize][height]
    if is_pair:
        columns = min(columns // 2, PAIRS.get((name, dtype.itemsize, height), 64))
    shallowest = 32 if dtype.itemsize == 1 else 16
    return Tile(height, fitted(columns, N), fitted(depth, K, shallowest), warps, stages)


def outer_tile(
    A: int, B: int, R: int, E: int, dtype: torch.dtype, device: torch.device, adds_wider: bool = False
) -> Tile:
    """The weight gradient's tile: `depth` is in rows of an expert, as many as its mean has.

    adds_wider: to numbers of more bytes than the operands', which then lie in registers beside the sums.
    """
    rows, columns, warps, stages = OUTER[architecture(device), dtype.itemsize]
    columns = columns // 2 if adds_wider else columns
    depth = 32 if R <= 32 * E or dtype.itemsize == 4 else 64
    return Tile(fitted(rows, A), fitted(columns, B), depth, warps, stages)


def fitted(block: int, size: int, least: int = 16) -> int:
    """`block`, or less where that covers `size`; matrix units take no less than 16, and 32 of fp8's depth."""
    return max(least, min(block, power_of_2(size)))


def power_of_2(size: int) -> int:
    """The least that is not below size >= 1, as Triton's own, which takes microseconds."""
    return 1 << (size - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def lines(width: int, device: torch.device) -> int:
    """Lines of `width` elements, a power of two, for one program of a kernel without products."""
    return max(1, (32768 if architecture(device) == "interpreter" else 2048) // width)


@cache
def architecture(device: torch.device) -> str:
    """The table's name for the processor: the oldest of its kind, which the later ones run as well.

    From sm_120 on, the smaller Blackwell, a processor has the shared memory and matrix instructions of sm_89.
    """
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx950" if _gcn_name(device).startswith("gfx950") else "gfx942"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(properties.major, "sm_80")


def _gcn_name(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).gcnArchName


@cache
def processors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def has_tma(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights beside rows of this dtype are fetched through descriptors; the interpreter knows them too.

    Scalar units multiply f32 from registers, of which what a descriptor brings takes two to eight too many.
    """
    is_scalar = dtype == torch.float32 and precision(dtype, device) == "ieee"
    name = architecture(device)
    return name == "interpreter" or (name in ("sm_90", "sm_100") and not is_scalar)


def has_fp8(device: torch.device) -> bool:
    """Whether e4m3 is compiled and has block sizes; what takes the table of another has not."""
    name = architecture(device)
    is_other = device.type == "cuda" and torch.version.hip and name not in _gcn_name(device)
    return (name, 1) in TABLE and not is_other


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How f32 is multiplied, by torch's own setting; gfx950 has no TF32.  Of fp8, which e4m3 the matrix units have."""
    if dtype.itemsize == 1:
        return "fnuz" if architecture(device) == "gfx942" else "ieee"
    # fp32_precision: what every way of setting it ends in.  allow_tf32 raises where the newer ways were used.
    allows = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allows and architecture(device) != "gfx950" else "ieee"
