"""The kernels that the loops time: what a step works on, values from a seed, and what came out."""

import mmap
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sigma_kernels import _C

LEAST_BLOCK = 64 << 20  # bytes of `copy`, where the last cache is smaller than half of it
CACHE_NAMES = ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")


@dataclass(frozen=True)
class Work:
    """A kernel with its memory.  `native.steps` is how often a quantum does it.

    `sizes`: bytes and slice of copy (one slice a step); R rows, E experts, N columns and K of the contraction,
    threads.  `tokens_of_expert`: the histogram of grouped, [E].
    """

    kernel: str
    sizes: Mapping[str, int]
    native: Any
    inputs: tuple[NDArray[Any], ...] = field(repr=False)
    output: NDArray[Any] | None = field(repr=False)
    tokens_of_expert: tuple[int, ...] = ()

    def checksum(self) -> int:
        """Of everything done so far: the state of spin, the CRC-32 of what others wrote."""
        return self.native.state if self.output is None else zlib.crc32(self.output)


def reserved(n: int, dtype: type = np.int64) -> NDArray[Any]:
    """Zeros [n] whose pages are there: the first touch of memory is a detour of its own."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    memory = mmap.mmap(-1, max(1, n) * np.dtype(dtype).itemsize, flags=flags)
    return np.frombuffer(memory, dtype, n)


def work(kernel: str, *, seed: int = 0, **sizes: int) -> Work:
    """A kernel of KERNELS, one step a quantum, with normal values from the seed.

    Values matter, since power depends on them: zeros would be another measurement.
    Raises: ValueError for a kernel or size that is not there, or a size below 1.
    """
    complete = checked_sizes(kernel, sizes)
    return KERNELS[kernel][0](np.random.default_rng(seed), complete)


def checked_sizes(kernel: str, sizes: Mapping[str, int], backend: str = "cpu") -> dict[str, int]:
    """Those given and the others as they are by default.  Raises: ValueError, by name."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, found {kernel!r}")
    defaults = KERNELS[kernel][1]() if backend == "cpu" else dict(GPU_SIZES[kernel])
    where = "" if backend == "cpu" else " on a GPU"
    for name, size in sizes.items():
        if name not in defaults:
            raise ValueError(f"{kernel} takes {', '.join(defaults) or 'no sizes'}{where}, found {name!r}")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} of {kernel} must be a whole number of at least 1, found {size!r}")
    complete = defaults | dict(sizes)
    if "slice" in complete and complete["slice"] > complete["bytes"]:
        raise ValueError(
            f"slice of copy must be at most bytes ({complete['bytes']}), found {complete['slice']}"
        )
    return complete


def _spin(rng: np.random.Generator, sizes: dict[str, int]) -> Work:
    return Work("spin", sizes, _C.noise.Spin(1, int(rng.integers(1 << 63))), (), None)


def _copy(rng: np.random.Generator, sizes: dict[str, int]) -> Work:
    slices = sizes["bytes"] // sizes["slice"]
    n = slices * sizes["slice"]
    source, target = reserved(n, np.uint8), reserved(n, np.uint8)
    values = rng.standard_normal(min(n, LEAST_BLOCK) // 4 + 1, np.float32).view(np.uint8)
    source[:] = np.resize(values, n)
    native = _C.noise.Copy(1, source.ctypes.data, target.ctypes.data, sizes["slice"], slices)
    return Work("copy", sizes, native, (source,), target)


def _gemm(rng: np.random.Generator, sizes: dict[str, int]) -> Work:
    return _product("gemm", rng, sizes, np.array([sizes["R"]]))


def _grouped(rng: np.random.Generator, sizes: dict[str, int]) -> Work:
    """Each row's expert is drawn once, all alike: a histogram that changed would be measured as noise."""
    E = sizes["E"]
    return _product("grouped", rng, sizes, rng.multinomial(sizes["R"], np.full(E, 1 / E)))


def _product(kernel: str, rng: np.random.Generator, sizes: dict[str, int], counts: NDArray[np.int64]) -> Work:
    R, N, K, E = sizes["R"], sizes["N"], sizes["K"], len(counts)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)  # [E + 1]
    x, weight = rng.standard_normal((R, K), np.float32), rng.standard_normal((E, N, K), np.float32)
    y = np.full((R, N), np.nan, np.float32)
    native = _C.noise.Product(
        1, E, N, K, offsets.ctypes.data, x.ctypes.data, weight.ctypes.data, y.ctypes.data, sizes["threads"]
    )
    return Work(kernel, sizes, native, (offsets, x, weight), y, tuple(counts.tolist()))


def _copy_sizes() -> dict[str, int]:
    """Twice the last cache, so that no slice is still in it when its turn comes again."""
    cache = max((os.sysconf(name) for name in CACHE_NAMES if name in os.sysconf_names), default=0)
    return {"bytes": max(LEAST_BLOCK, 2 * cache), "slice": 16 << 10}


Maker = Callable[[np.random.Generator, dict[str, int]], Work]
KERNELS: dict[str, tuple[Maker, Callable[[], dict[str, int]]]] = {
    "spin": (_spin, dict),
    "copy": (_copy, _copy_sizes),
    "gemm": (_gemm, lambda: {"R": 64, "N": 128, "K": 128, "threads": 1}),
    "grouped": (_grouped, lambda: {"R": 192, "E": 96, "N": 64, "K": 64, "threads": 1}),
}
GPU_SIZES: dict[str, dict[str, int]] = {
    "spin": {},
    "copy": {"bytes": 1 << 28},
    "gemm": {"R": 4096, "N": 4096, "K": 4096},
    "grouped": {"R": 8192, "E": 96, "N": 1024, "K": 1024},
}
