"""Which addresses the Triton kernels read: descriptors or pointers, and places that 32 bits do not count."""

import mmap

import interpreted
import numpy as np
import torch
from support import assert_close, tolerance

from sigma_kernels.triton import product, tiles
from sigma_kernels.triton.grouped_gemm import multiply_rows
from sigma_kernels.triton.grouped_outer import outer_of_tokens
from sigma_kernels.triton.permute import permute
from sigma_kernels.triton.swiglu import gate_up


def test_which_weights_have_a_descriptor():
    """Whole multiples of 16 bytes apart, from such an address on, with one dimension contiguous."""
    tile = tiles.Tile(32, 64, 32, 4, 2)
    wide = torch.zeros(3, 48, 40)
    layouts = {"nk": wide, "kn": wide.transpose(1, 2), "": wide[:, :, 1:]}
    assert {layout: product.weight_operand(w, tile, w.dtype)[1] for layout, w in layouts.items()} == {
        x: x for x in layouts
    }
    by_row = torch.zeros(48, 3, 40).transpose(0, 1)
    others = (
        torch.zeros(3, 48, 41), wide[:, :, ::2], wide[:0], torch.zeros(3, 0, 40), wide[:1].expand(3, -1, -1), by_row,
        torch.zeros(5850).as_strided((3, 48, 40), (1950, 40, 1)),
    )  # fmt: skip
    assert [product.weight_operand(w, tile, w.dtype)[1] for w in others] == [""] * 7
    half_within = torch.zeros(3, 40, 36).transpose(1, 2)
    assert [product.weight_operand(half_within, tile, torch.float32, pair)[1] for pair in (False, True)] == [
        "kn",
        "",
    ]


def test_weights_whose_rows_are_far_apart(backend):
    """Defends: a place along K computed in 32 bits: a block's numbers lie within them, those of all K do not."""
    apart, K, N = 2_500_000, 1024, 16
    no_reserve = 0x4000  # Linux's: 10 GB, of which 4 MB are touched
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 4 * apart * K, flags=flags), dtype=torch.float32)
    w = memory.as_strided((1, N, K), (0, 1, apart))
    w.copy_(torch.randn(1, N, K))
    x, y = torch.randn(3, K), torch.empty(3, N)
    multiply_rows(x, w, torch.tensor([0, 3], dtype=torch.int32), y)
    assert_close(y, x.double() @ w[0].double().T, tolerance(torch.float32, K))


FAR = 2**31 // 64 + 5  # a row of 64 whose first element is beyond what 32 bits count


def test_rows_beyond_what_32_bits_count(backend):
    """Defends: an address computed in 32 bits, at sizes that no memory here has."""
    offsets, row_map = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([FAR], dtype=torch.int32)
    x, w = torch.randn(1, 64), torch.randn(1, 64, 64)
    y, hidden = torch.empty(1, 64), torch.empty(1, 32)
    far = 4 * 64 * FAR + 4 * np.arange(64)
    with interpreted.addresses_outside() as outside:
        multiply_rows(x, w, offsets, y, row_map)
    assert np.array_equal(np.concatenate(outside), y.data_ptr() + far)
    with interpreted.addresses_outside() as outside:
        gate_up(x, w, offsets, row_map, 1, None, hidden)
    assert set(np.concatenate(outside)) == set(x.data_ptr() + far)
    with interpreted.addresses_outside() as outside:
        permute(x, row_map, 1)
    assert np.array_equal(np.concatenate(outside), x.data_ptr() + far)
    with interpreted.addresses_outside() as outside:
        outer_of_tokens(w, x, x, offsets, False, top_k=1, a_map=row_map)
    assert set(np.concatenate(outside)) == set(x.data_ptr() + far)
