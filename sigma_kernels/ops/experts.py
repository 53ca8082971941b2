"""The expert layer: gate and up projection, SwiGLU, down projection and weighted sum in one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sigma_kernels import reference
from sigma_kernels.backends import Backend, register_table, select
from sigma_kernels.ops import cuda, experts_cpu, experts_cuda
from sigma_kernels.ops.library import (
    REFERENCE,
    STORED,
    as_weights,
    check_device,
    check_experts,
    check_float,
    check_offsets,
    check_routing,
    check_shape,
    define,
    is_recorded,
    once,
    risen,
    saturated,
    saved_dtype,
    slots,
)
from sigma_kernels.ops.triton_rows import triton_row
from sigma_kernels.routing import Routing


def moe_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str = "silu",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Send each token through its experts and sum what they answer.

    out[t] = sum_j w[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])), e = index[t, j]
    (SwiGLU: Shazeer 2020, arXiv 2002.05202; weights lie as in Hugging Face transformers).

    Args:
        hidden_states: [T, H]; this and the others f32, or all bf16 or f16, which is summed in f32.  On a CPU the
            result alone is rounded, or with bf16 products also what lies between the projections; a GPU rounds that in
            both, before SwiGLU too.
        top_k_index: [T, k] int32 or int64, in 0..E-1; an expert may be named twice.
        top_k_weights: [T, k].
        gate_up_proj: [E, 2I, H], gate rows first, then up.
        down_proj: [E, H, I].
        activation: "silu".
        compute_dtype: bf16 or f16 beside gate_up_proj and down_proj in f32.  All four are rounded to it for this call,
            whichever of the three dtypes the other two have; gradients of the projections come in f32 as they were
            summed (backend "cuda": rounded on the way).
    Returns: [T, H].  Gradients for all four float inputs, once differentiable; same bits at any thread count.  Under
        torch.autocast inputs are computed on in the dtype of the weights, and the result has that of hidden_states.
    Raises: TypeError for a dtype, ValueError for a shape, an activation or, on a CPU, an index out of range.
    """
    op, dtype = "moe_experts", hidden_states.dtype
    floats = {"hidden_states": hidden_states, "top_k_weights": top_k_weights}
    hidden_states, top_k_weights = _operands(floats, gate_up_proj, down_proj, compute_dtype)
    E, _, _ = check_experts(op, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    if activation != "silu":
        raise ValueError(f"{op}: activation must be 'silu', found {activation!r}")
    copies = _copies(gate_up_proj, down_proj, hidden_states.dtype)
    if is_recorded(hidden_states, top_k_weights, gate_up_proj, down_proj):
        _, offsets, row_map = torch.ops.sigma.group_by_expert(saturated(top_k_index), E)
        out, _ = _Experts.apply(
            hidden_states, top_k_weights, offsets, row_map, gate_up_proj, down_proj, *copies
        )
    else:
        proj = copies or (gate_up_proj, down_proj)
        out = inference(hidden_states, top_k_index, top_k_weights, *proj, None, None)
    return out if out.dtype == dtype else out.to(dtype)


def experts_of_routing(
    hidden_states: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """moe_experts for a Routing, whose order of rows need not be found again."""
    return _of_routing(hidden_states, routing, gate_up_proj, down_proj, compute_dtype, saves=False)[0]


def experts_and_gate_up(
    hidden_states: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, and what SwiGLU was applied to: [R, 2I], gates, then ups, rows in expert order; it has no gradient."""
    return _of_routing(hidden_states, routing, gate_up_proj, down_proj, compute_dtype, saves=True)


def _of_routing(
    hidden_states: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    compute_dtype: torch.dtype | None,
    saves: bool,
) -> tuple[Tensor, Tensor]:
    op, dtype = "moe_experts", hidden_states.dtype
    floats = {"hidden_states": hidden_states, "routing.weights": routing.weights}
    hidden_states, weights = _operands(floats, gate_up_proj, down_proj, compute_dtype)
    T, k = check_routing(op, routing, "hidden_states", hidden_states)
    check_shape(op, "routing.weights", weights, (T, k))
    check_shape(op, "down_proj", down_proj, ("E", "H", "I"))
    E, H, I = down_proj.shape
    check_offsets(op, "routing.offsets", routing.offsets, E, "hidden_states", hidden_states)
    check_shape(op, "hidden_states", hidden_states, (T, H))
    check_shape(op, "gate_up_proj", gate_up_proj, (E, 2 * I, H))
    inputs = hidden_states, weights, routing.offsets, routing.row_map
    copies = _copies(gate_up_proj, down_proj, hidden_states.dtype)
    if is_recorded(hidden_states, weights, gate_up_proj, down_proj):
        out, gate_up = _Experts.apply(*inputs, gate_up_proj, down_proj, *copies)
    else:
        proj = copies or (gate_up_proj, down_proj)
        out, gate_up = torch.ops.sigma.moe_experts(*inputs, *proj, saves=saves)
    return out if out.dtype == dtype else out.to(dtype), gate_up


def computed_in(
    op: str, gate_up_proj: Tensor, down_proj: Tensor, compute_dtype: torch.dtype | None
) -> torch.dtype:
    """compute_dtype, or the projections' own where none is given.  Raises: TypeError if they cannot compute in it."""
    if compute_dtype is None:
        return down_proj.dtype
    check_float(op, gate_up_proj=gate_up_proj, down_proj=down_proj)
    is_narrower = down_proj.dtype == torch.float32 and compute_dtype in STORED
    if not is_narrower and compute_dtype != down_proj.dtype:
        raise TypeError(
            f"{op}: compute_dtype must be torch.bfloat16 or torch.float16 beside weights in torch.float32, or their "
            f"dtype, found {compute_dtype!r} beside {down_proj.dtype}"
        )
    return compute_dtype


def _operands(
    floats: dict[str, Tensor], gate_up_proj: Tensor, down_proj: Tensor, compute_dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """These in the dtype that is computed in, where one was asked for or autocast is on; of all, dtypes and devices are
    checked."""
    op, dtype = "moe_experts", computed_in("moe_experts", gate_up_proj, down_proj, compute_dtype)
    if compute_dtype is None:
        floats = {name: as_weights(x, down_proj) for name, x in floats.items()}
    else:
        floats = {name: x.to(dtype) if x.dtype in STORED else x for name, x in floats.items()}
    if dtype == down_proj.dtype:
        check_float(op, **floats, gate_up_proj=gate_up_proj, down_proj=down_proj)
    for name, x in floats.items():
        if x.dtype != dtype:
            raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, found {x.dtype}")
        check_device(op, name, x, "down_proj", down_proj)
    return tuple(floats.values())


def _copies(gate_up_proj: Tensor, down_proj: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The two in this dtype, for autograd constants; nothing where they have it."""
    if dtype == down_proj.dtype:
        return ()
    return gate_up_proj.detach().to(dtype), down_proj.detach().to(dtype)


class _Experts(torch.autograd.Function):
    """Of two weights, or of four: two that get gradients, and what they are rounded to, which is multiplied."""

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.sigma.moe_experts(*inputs[:4], *inputs[-2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.accumulates = not torch.compiler.is_compiling() and _accumulates.get()
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x_needed, _, _, _, gate_up_needed, down_needed, *of_copies = ctx.needs_input_grad
        none = [None] * len(of_copies)
        if grad_out is None:
            return (None,) * 6 + (*none,)
        *inputs, before_swiglu = ctx.saved_tensors  # once: activation checkpointing gives them out one time
        parameters, saved = inputs[4:6], (*inputs[:4], *inputs[-2:], before_swiglu)
        if ctx.accumulates and not torch.is_grad_enabled():
            wanted = [
                p if n else None for p, n in zip(parameters, (gate_up_needed, down_needed), strict=True)
            ]
            into = [None if p is None else _place(p) for p in wanted]
            if all(p is None or place is not None for p, place in zip(wanted, into, strict=True)):
                grad_x, grad_weights = torch.ops.sigma.moe_experts_backward_(
                    *into, grad_out, *saved, x_needed
                )
                return grad_x if x_needed else None, grad_weights, None, None, None, None, *none
        with torch.no_grad():
            grad_x, grad_weights, grad_gate_up, grad_down = torch.ops.sigma.moe_experts_backward(
                grad_out, *saved, [x_needed, gate_up_needed, down_needed], parameters[0].dtype
            )
        sources = (grad_out, *inputs[:2], *parameters)
        return (
            once("moe_experts", grad_x, *sources) if x_needed else None,
            once("moe_experts", grad_weights, *sources),
            None,
            None,
            once("moe_experts", grad_gate_up, *sources) if gate_up_needed else None,
            once("moe_experts", grad_down, *sources) if down_needed else None,
            *none,
        )


_accumulates: ContextVar[bool] = ContextVar("accumulate_grad", default=False)


@contextmanager
def accumulate_grad() -> Iterator[None]:
    """Layers that run forward inside add their experts' weight gradients straight into the parameters' `.grad`.

    Autograd makes a gradient and then adds it: 604 MB more to write and to read again for 96 experts of H=1024, I=512
    in f32.  Inside, a backward adds where the gradient is computed, wherever both parameters have a `.grad` already;
    where not, as in the first of several backwards and in compiled graphs, it does what autograd does.

    It goes around autograd, hence by choice: hooks on these parameters do not run, torch.autograd.grad adds to `.grad`
    as well, and wrappers that reduce gradients as they appear (DDP, FSDP) see nothing.
    """
    token = _accumulates.set(True)
    try:
        yield
    finally:
        _accumulates.reset(token)


def _place(parameter: Tensor) -> Tensor | None:
    """Where the parameter's gradient can be added to, if there is such a place."""
    if not parameter.is_leaf or parameter.grad is None:
        return None
    grad = parameter.grad
    fits = grad.dtype == parameter.dtype and grad.layout == torch.strided and grad.is_contiguous()
    return grad if fits and grad.device == parameter.device else None


def _reference_from_rows(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    saves: bool = True,
) -> tuple[Tensor, Tensor]:
    tokens, top_k = weights.shape
    gate_up = reference.grouped_gemm(reference.permute(x, row_map, top_k), gate_up_proj, offsets)
    y = reference.grouped_gemm(reference.swiglu(gate_up), down_proj, offsets)
    return reference.unpermute(y, row_map, weights, top_k, tokens), gate_up[: None if saves else 0]


def _inference_reference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
) -> Tensor:
    def whole(weight: Tensor, scale: Tensor | None) -> Tensor:
        return weight if scale is None else weight.to(x.dtype) * scale[..., None]

    _, offsets, row_map = torch.ops.sigma.group_by_expert(saturated(index), down_proj.shape[0])
    proj = whole(gate_up_proj, gate_up_scale), whole(down_proj, down_scale)
    return _reference_from_rows(x, weights, offsets, row_map, *proj)[0]


def _backward_reference(
    grad_out: Tensor, *saved: Any, into: tuple[Tensor | None, Tensor | None] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, _gate_up, needed, _grad_dtype = saved  # that of its inputs, which are as wide as any
    with torch.enable_grad():
        x, weights, gate_up_proj, down_proj = leaves = [
            inputs[i].detach().requires_grad_() for i in (0, 1, 4, 5)
        ]
        out, _ = _reference_from_rows(x, weights, inputs[2], inputs[3], gate_up_proj, down_proj)
    grad_x, grad_weights, *grad_proj = torch.autograd.grad(out, leaves, grad_out)
    for place, grad in zip(into or (), grad_proj, strict=into is not None):
        if place is not None:
            place.add_(grad)
    keep = (grad_x, *grad_proj)
    grad_x, grad_gate_up, grad_down = (g if n else g.new_empty(0) for g, n in zip(keep, needed, strict=True))
    return grad_x, grad_weights, grad_gate_up, grad_down


register_table("moe_experts", [
    triton_row("experts", "forward", STORED),
    cuda.row(experts_cuda.forward, cuda.TENSOR_CORE),
    Backend("cpu", experts_cpu.forward, STORED, "cpu"),
    Backend("reference", _reference_from_rows, REFERENCE, by_name=True),
])  # fmt: skip
register_table("moe_experts_inference", [
    triton_row("experts", "inference", STORED),
    cuda.row(experts_cuda.inference, cuda.TENSOR_CORE),
    Backend("cpu", experts_cpu.inference, STORED, "cpu"),
    Backend("reference", _inference_reference, REFERENCE, by_name=True),
])  # fmt: skip
register_table("moe_experts_backward", [
    triton_row("experts", "backward", STORED),
    cuda.row(experts_cuda.backward, cuda.TENSOR_CORE),
    Backend("cpu", experts_cpu.backward, STORED, "cpu"),
    Backend("reference", _backward_reference, REFERENCE, by_name=True),
])  # fmt: skip


def _order(weights: Tensor, offsets: Tensor, row_map: Tensor) -> tuple[Tensor, Tensor]:
    op = "moe_experts"
    risen_offsets = risen(op, "routing.offsets", offsets, "routing.row_map", row_map)
    return risen_offsets, slots(op, row_map, weights.numel())


_INPUTS = "Tensor x, Tensor weights, Tensor offsets, Tensor row_map, Tensor gate_up_proj, Tensor down_proj"
define(
    f"moe_experts({_INPUTS}, bool saves=True) -> (Tensor, Tensor)",
    lambda x, weights, offsets, row_map, *rest: select("moe_experts", x)(
        x, weights, *_order(weights, offsets, row_map), *rest
    ),
    lambda x, weights, offsets, row_map, gate_up, down, saves=True: (
        x.new_empty(x.shape),
        x.new_empty(
            row_map.shape[0] if saves else 0,
            gate_up.shape[1],
            dtype=saved_dtype(x),
        ),
    ),
)
inference = define(
    "moe_experts_inference(Tensor x, Tensor index, Tensor weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_scale, Tensor? down_scale) -> Tensor",
    lambda x, *rest: select("moe_experts_inference", x)(x, *rest),
    lambda x, *rest: x.new_empty(x.shape),
)
define(
    f"moe_experts_backward(Tensor grad_out, {_INPUTS}, Tensor gate_up, bool[] needed, ScalarType grad_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_out, x, weights, offsets, row_map, *rest: select("moe_experts_backward", x)(
        grad_out, x, weights, *_order(weights, offsets, row_map), *rest
    ),
    lambda grad_out, x, weights, offsets, row_map, gate_up_proj, down_proj, gate_up, needed, grad_dtype: (
        x.new_empty(x.shape if needed[0] else 0),
        weights.new_empty(weights.shape),
        x.new_empty(gate_up_proj.shape if needed[1] else 0, dtype=grad_dtype),
        x.new_empty(down_proj.shape if needed[2] else 0, dtype=grad_dtype),
    ),
)


def _backward_into(
    of_gate_up: Tensor | None, of_down: Tensor | None, grad_out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *inputs, gate_up_proj, down_proj, gate_up, x_needed = rest
    x, weights, offsets, row_map = inputs
    grad_x, grad_weights, _, _ = select("moe_experts_backward", x)(
        grad_out, x, weights, *_order(weights, offsets, row_map), gate_up_proj, down_proj, gate_up,
        [x_needed, False, False], gate_up_proj.dtype, into=(of_gate_up, of_down),
    )  # fmt: skip
    return grad_x, grad_weights


define(
    "moe_experts_backward_(Tensor(a!)? of_gate_up, Tensor(b!)? of_down, "
    f"Tensor grad_out, {_INPUTS}, Tensor gate_up, bool x_needed) -> (Tensor, Tensor)",
    _backward_into,
    lambda of_gate_up, of_down, grad_out, x, weights, *rest: (
        x.new_empty(x.shape if rest[-1] else 0),
        weights.new_empty(weights.shape),
    ),
)
