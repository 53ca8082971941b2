"""One matrix product per expert: x @ W.T of a forward, x @ W of its input gradient, a.T @ b of its weight gradient."""

import bounds
import oracle
import peer_ops
import peers_gpu
import pytest
import shapes
import torch
from shapes import DTYPES, LOADS, A, short

import sigma_kernels as sk
from sigma_kernels.ops.grouped_gemm import grouped_outer_

SHAPES = [A, shapes.QWEN3_30B_A3B]
REASON = "no out=: it allocates its result at every call, see 'fresh'"


def problem(shape, load, dtype, device):
    """x [R, H], weight [E, 2I, H], g [R, 2I], index, offsets: the gate and up projection of the layer."""
    index = shapes.choices(shape, load, device)
    offsets = sk.group_by_expert(index, shape.E).offsets
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.R, shape.H, generator=generator).to(device, dtype)
    weight = torch.empty(shape.E, 2 * shape.I, shape.H).normal_(std=shape.H**-0.5, generator=generator)
    g = torch.randn(shape.R, 2 * shape.I, generator=generator).to(device, dtype)
    return x, weight.to(device, dtype), g, index, offsets


def by_expert(function, E, offsets):
    """Of each expert in f64, one after another."""
    return [function(e, slice(int(offsets[e]), int(offsets[e + 1]))) for e in range(E)]


def dense(a, b):
    def product(dtype):
        left, right = a.to(dtype), b.to(dtype)
        return lambda: left @ right

    return bounds.of_dtypes("dense", product, a.dtype)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("transposed", [True, False], ids=["x@W.T", "x@W"])
def test_grouped_gemm(race, device, transposed, dtype, shape, load):
    x, weight, g, index, offsets = problem(shape, load, dtype, device)
    rows = x if transposed else g
    turned = weight.transpose(1, 2) if transposed else weight
    want = torch.cat(
        by_expert(lambda e, part: rows[part].double() @ turned[e].double(), shape.E, offsets)
    ).to(dtype)
    rivals = peer_ops.PRODUCTS | ({"grouped_gemm": peers_gpu.gmm_product} if device.type == "cuda" else {})
    touched = index.unique()
    read = weight if len(touched) == shape.E else weight[touched]
    race(
        f"grouped_gemm/{'x@W.T' if transposed else 'x@W'}/{short(dtype)}",
        lambda: sk.grouped_gemm(rows, weight, offsets, transpose_weight=transposed),
        shape=shape,
        load=load,
        check=lambda who, got: oracle.assert_agrees(who, [got], [want], rows.shape[1]),
        limits={"padded_bmm": 2} if load == "zipf" else {},
        flops=4 * shape.R * shape.H * shape.I,
        moved=read.nbytes,
        index=index,
        **dense(rows, turned[0]),
        bound_read=bounds.read(read),
        **{n: lambda f=f: f(rows, turned, offsets) for n, f in rivals.items()},
    )


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("memory", ["fresh", "kept"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_grouped_outer(race, device, dtype, shape, memory, load):
    """Fresh: the result is allocated and released in the timed call.  Kept: it is written to memory that exists."""
    b, weight, a, index, offsets = problem(shape, load, dtype, device)
    want = torch.stack(
        by_expert(lambda e, p: (a[p].double().t() @ b[p].double()).to(dtype), shape.E, offsets)
    )
    out = weight.fill_(torch.nan)
    if memory == "kept":
        ours = lambda: grouped_outer_(out, a, b, offsets)  # noqa: E731
        rivals = {
            "loop_mm_out": lambda: peer_ops.loop_outer(a, b, offsets, out),
            "padded_bmm": lambda: peer_ops.padded_bmm_outer(a, b, offsets, out),
        }
    else:
        ours = lambda: torch.ops.sigma.grouped_outer(a, b, offsets)  # noqa: E731
        rivals = {
            "torch_grouped_mm": lambda: peer_ops.grouped_mm_outer(a, b, offsets),
            "loop_mm_out": lambda: peer_ops.loop_outer(a, b, offsets),
            "padded_bmm": lambda: peer_ops.padded_bmm_outer(a, b, offsets),
        }

    if device.type == "cuda":
        into = out if memory == "kept" else None
        rivals["grouped_gemm"] = lambda: peers_gpu.gmm_outer(a, b, offsets, into)

    def check(who, got):
        oracle.assert_agrees(who, [got], [want], shape.R // shape.E + 1)
        out.fill_(torch.nan)

    race(
        f"grouped_gemm/a.T@b/{short(dtype)}",
        ours,
        shape=shape,
        load=load,
        memory=memory,
        check=check,
        limits={"padded_bmm": 2} if load == "zipf" else {},
        missing={"torch_grouped_mm": REASON} if memory == "kept" else {},
        flops=4 * shape.R * shape.H * shape.I,
        moved=out.nbytes,
        index=index,
        **dense(a.t(), b),
        bound_write=lambda: out.zero_(),
        **rivals,
    )
