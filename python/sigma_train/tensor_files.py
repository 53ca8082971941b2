"""safetensors files read and written piece by piece, so that neither a file nor a tensor need be whole in memory.

A file is 8 bytes of the header's length, a JSON header of each tensor's dtype, shape and place, and the tensors one
after the other (https://huggingface.co/docs/safetensors).  The safetensors library maps whole files to read them, and
writes what it is given whole.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sigma_train.errors import WrongInput

BLOCK = 8 << 20  # bytes of one read
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.  Its bytes are begin..end - 1."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def rows(self) -> int:
        return self.shape[0]

    def row(self, row: int) -> "Stored":
        """The tensor of one index of the first dimension."""
        size = (self.end - self.begin) // self.rows
        begin = self.begin + row * size
        return Stored(self.path, self.dtype, self.shape[1:], begin, begin + size)

    def part(self, part: int, parts: int) -> "Stored":
        """Of `parts` blocks of as many rows each."""
        size = (self.end - self.begin) // parts
        begin = self.begin + part * size
        return Stored(self.path, self.dtype, (self.rows // parts, *self.shape[1:]), begin, begin + size)

    def number(self, at: int) -> "Stored":
        """One of its numbers."""
        size = DTYPES[self.dtype].itemsize
        return Stored(self.path, self.dtype, (), self.begin + at * size, self.begin + (at + 1) * size)

    def read(self, file: BinaryIO) -> Tensor:
        file.seek(self.begin)
        content = bytearray(file.read(self.end - self.begin))
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).view(self.shape)

    def blocks(self, file: BinaryIO) -> Iterator[bytes]:
        """The same as bytes, a few at a time."""
        file.seek(self.begin)
        for done in range(self.begin, self.end, BLOCK):
            yield file.read(min(BLOCK, self.end - done))


def stored_tensors(path: Path) -> dict[str, Stored]:
    """All of a file, in the order of their bytes.  Raises: WrongInput if it is damaged, or of a dtype unknown here."""
    try:
        found, size = _described(path), path.stat().st_size
        for name, x in found.items():
            if x.dtype not in DTYPES:
                raise WrongInput(f"{path}: {name} must be one of {', '.join(DTYPES)}, found {x.dtype!r}")
            if x.end - x.begin != size_of(x.dtype, x.shape):
                raise ValueError(f"{name} is {x.dtype} {list(x.shape)} in {x.end - x.begin} bytes")
            if not 0 <= x.begin <= x.end <= size:
                raise ValueError(f"{name} lies beyond its end")
    except WrongInput:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WrongInput(f"{path} is no sound safetensors file: {error}") from None
    return dict(sorted(found.items(), key=lambda item: item[1].begin))


def _described(path: Path) -> dict[str, Stored]:
    """What the header says, which may be anything."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError("its header lies beyond its end")
        header = json.loads(file.read(length))
    begin = 8 + length
    header.pop("__metadata__", None)
    return {
        name: Stored(path, x["dtype"], tuple(x["shape"]), *(begin + at for at in x["data_offsets"]))
        for name, x in header.items()
    }


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The begin of a file of tensors of such dtype and shape, whose bytes follow in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + size_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the library aligns it
    return len(text).to_bytes(8, "little") + text


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
