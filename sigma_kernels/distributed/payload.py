"""How rows are written for the wire: as they are, in two bytes a number, or in one with a scale a block of columns."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Payload = Literal["same", "bf16", "int8", "fp8"]
BLOCK = 128  # columns that share a scale (DeepSeek-V3: arXiv 2412.19437, section 3.3.2)
LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}


def check_payload(op: str, payload: str) -> None:
    if payload not in get_args(Payload):
        raise ValueError(f"{op}: payload must be one of {', '.join(get_args(Payload))}, found {payload!r}")


def encode(x: Tensor, payload: Payload) -> Tensor:
    """x [R, H] as what travels: itself, or [R, bytes] uint8, since transports need not know the type.

    int8 and fp8 (e4m3) hold x / s, s = max |x| of a block / the type's largest number, f32 behind the numbers.
    """
    if payload == "same":
        return x.contiguous()
    if payload == "bf16":
        return x.bfloat16().contiguous().view(torch.uint8)
    R, H = x.shape
    B = blocks_of(H)
    blocks = F.pad(x.float(), (0, B * BLOCK - H)).view(R, B, BLOCK)
    scale = blocks.abs().amax(2, keepdim=True) / LARGEST[payload]
    whole = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)
    narrow = whole.round().to(torch.int8) if payload == "int8" else whole.to(torch.float8_e4m3fn)
    numbers = narrow.view(torch.uint8).reshape(R, B * BLOCK)[:, :H]
    return torch.cat([numbers, scale.view(R, B).view(torch.uint8)], 1)


def blocks_of(H: int) -> int:
    return -(-H // BLOCK)


def decode(sent: Tensor, payload: Payload, H: int, dtype: torch.dtype) -> Tensor:
    """What `encode` was given, [R, H], to the payload's rounding."""
    if payload == "same":
        return sent
    if payload == "bf16":
        return sent.view(torch.bfloat16).to(dtype)
    R, B, kind = sent.shape[0], blocks_of(H), torch.int8 if payload == "int8" else torch.float8_e4m3fn
    numbers = F.pad(sent[:, :H], (0, B * BLOCK - H)).view(kind).view(R, B, BLOCK)
    scale = sent[:, H:].contiguous().view(torch.float32)
    return (numbers.float() * scale[:, :, None]).view(R, B * BLOCK)[:, :H].to(dtype)
