"""The gated activation, defined."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """out[r, i] = silu(gate[r, i]) * up[r, i], the gate being the first half of the columns (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
