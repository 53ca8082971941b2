"""The router's decision: which experts, with what weight, in what order of rows."""

from typing import Any, Literal

import torch
from torch import Tensor

from sigma_kernels import _C, reference
from sigma_kernels.backends import Backend, register_table, select
from sigma_kernels.ops import cuda
from sigma_kernels.ops.library import (
    NATIVE,
    NO_SUMS,
    REFERENCE,
    address,
    check_device,
    check_float,
    check_index,
    check_shape,
    check_size,
    define,
    differentiable,
    once,
    rows,
    saturated,
)
from sigma_kernels.ops.triton_rows import triton_row
from sigma_kernels.routing import Routing, empty_order, empty_routing

Score = Literal["softmax", "sigmoid"]


def route(
    logits: Tensor,
    top_k: int = 1,
    *,
    score: Score = "softmax",
    normalize: bool = False,
    bias: Tensor | None = None,
) -> Routing:
    """Pick `top_k` experts for each token.

    p = score(logits); the chosen maximise p + bias; weights are p of the chosen, divided by their sum if `normalize`
    (Shazeer et al. 2017, arXiv 1701.06538; bias: Wang et al. 2024, arXiv 2408.15664).  The softmax runs over all
    experts before the choice, so that with top_k = 1 the weight still carries a gradient to the router; with
    `normalize` and top_k = 1 it is always 1 and carries none.

    Args:
        logits: [T, E] f32 (f64 on the reference backend); bf16 and f16 are computed in f32, weights rounded to them.
        top_k: experts per token, 1..E.
        score: "softmax" over the experts, or "sigmoid" of each.
        bias: [E], added for the choice only; not differentiated.
    Returns: Routing; indices best first, ties to the lower index, NaN last.
    Raises: TypeError for a dtype, ValueError for a shape, top_k or score.
    Cost: one read of the logits; no sort; no host synchronisation.
    """
    wide, bias = checked("route", logits, top_k, score, bias)
    # The operation answers with the weights first: opcheck adds all outputs onto the first, which must be a float.
    weights, indices, *order = _route(wide, top_k, score == "softmax", normalize, bias)
    return Routing(indices, weights.to(logits.dtype), *order)


def checked(
    op: str, logits: Tensor, top_k: int, score: str, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits and bias as the operations take them: f32 or f64, the bias without a gradient."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must be [T, E] with E > 0, found {list(logits.shape)}")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{op}: logits must be floating point, found {logits.dtype}")
    E = logits.shape[1]
    if not 1 <= top_k <= E:
        raise ValueError(f"{op}: top_k must lie in 1..{E} (E={E}), found {top_k}")
    check_score(op, score)
    if bias is not None:
        check_shape(op, "bias", bias, (E,))
        check_device(op, "bias", bias, "logits", logits)
        bias = bias.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits, bias


def check_score(op: str, score: str, name: str = "score") -> None:
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"{op}: {name} must be 'softmax' or 'sigmoid', found {score!r}")


def group_by_expert(indices: Tensor, num_experts: int, weights: Tensor | None = None) -> Routing:
    """The Routing of a choice made elsewhere.

    Args:
        indices: [T, k] int32 or int64, values in 0..num_experts-1.
        weights: [T, k] floating point; all one, f32, where not given.
    Raises: TypeError for a dtype, ValueError for a shape, a device or, on a CPU, an index out of range.
    """
    op = "group_by_expert"
    check_index(op, "indices", indices)
    if indices.dim() != 2 or indices.shape[1] == 0:
        raise ValueError(f"{op}: indices must be [T, k] with k > 0, found {list(indices.shape)}")
    check_size(op, "num_experts", num_experts)
    if weights is None:
        weights = indices.new_ones(indices.shape, dtype=torch.float32)
    else:
        check_float(op, weights=weights)
        check_shape(op, "weights", weights, tuple(indices.shape))
        check_device(op, "weights", weights, "indices", indices)
    narrow = saturated(indices)
    return Routing(narrow, weights, *torch.ops.sigma.group_by_expert(narrow, num_experts))


def check_choices(op: str, routing: Routing) -> None:
    """Weights are [T, k] where the indices lie and, on a CPU, these are in 0..E; E stands where a choice is absent.

    For what reads a routing by torch's own operations, before it does.
    """
    indices, E = routing.indices, routing.num_experts
    check_index(op, "routing.indices", indices)
    check_shape(op, "routing.indices", indices, ("T", "k"))
    check_shape(op, "routing.weights", routing.weights, tuple(indices.shape))
    check_device(op, "routing.weights", routing.weights, "routing.indices", indices)
    if indices.is_cpu and len(wrong := ((indices < 0) | (indices > E)).flatten().nonzero()):
        raise ValueError(f"{op}: {out_of_range(indices, E, int(wrong[0]))}")


def group_where_present(indices: Tensor, num_experts: int, weights: Tensor, rows: int) -> Routing:
    """The Routing of choices that are not all there: `num_experts` stands where there is none, and `rows` are."""
    counts, offsets, row_map = torch.ops.sigma.group_by_expert(indices, num_experts + 1)
    return Routing(indices, weights, counts[:-1], offsets[:-1], row_map[:rows])


def _route_cpu(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None
) -> tuple[Tensor, ...]:
    out = empty_routing(logits, top_k)
    route_cpu(logits, top_k, softmax, normalize, bias, out)
    return out


def route_cpu(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None, out: tuple[Tensor, ...],
    sums: tuple[bool, int, int] = NO_SUMS,
) -> None:  # fmt: skip
    """Fill `empty_routing`, and what `sums` points to: of softmax or sigmoid, the probabilities and the square."""
    logits = rows(logits)
    bias = None if bias is None else bias.contiguous()
    weights, indices, counts, offsets, row_map = out
    _C.route(
        *logits.shape, top_k, logits.data_ptr(), logits.stride(0), address(bias), softmax, normalize,
        indices.data_ptr(), weights.data_ptr(), counts.data_ptr(), offsets.data_ptr(), row_map.data_ptr(),
        torch.get_num_threads(), *sums,
    )  # fmt: skip


def route_reference(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None
) -> tuple[Tensor, ...]:
    score = "softmax" if softmax else "sigmoid"
    routing = reference.route(logits, top_k, score=score, normalize=normalize, bias=bias)
    return routing.weights, routing.indices, *routing[2:]


def route_backward_cpu(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, softmax: bool, normalize: bool,
    sums: tuple[bool, int, int] = NO_SUMS,
) -> Tensor:  # fmt: skip
    """The gradient by the logits; of `sums` the gradients as well, where they point to any."""
    T, E = logits.shape
    logits, grad_weights = rows(logits), grad_weights.contiguous()
    grad_logits = logits.new_empty(T, E)
    _C.route_backward(
        T, E, indices.shape[1], logits.data_ptr(), logits.stride(0), softmax, normalize, indices.data_ptr(),
        grad_weights.data_ptr(), grad_logits.data_ptr(), torch.get_num_threads(), *sums,
    )  # fmt: skip
    return grad_logits


def route_backward_reference(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, softmax: bool, normalize: bool
) -> Tensor:
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        weights = reference.weights_of(leaf, indices, "softmax" if softmax else "sigmoid", normalize)
    return torch.autograd.grad(weights, leaf, grad_weights)[0]


def _group_cpu(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = indices.contiguous()
    out = empty_order(indices, num_experts)
    wrong = _C.group_by_expert(
        indices.data_ptr(),
        indices.numel(),
        num_experts,
        *(t.data_ptr() for t in out),
        torch.get_num_threads(),
    )
    if wrong >= 0:
        raise ValueError(out_of_range(indices, num_experts, wrong))
    return out


def _group_reference(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    wrong = ((indices < 0) | (indices >= num_experts)).reshape(-1).nonzero()
    if len(wrong):
        raise ValueError(out_of_range(indices, num_experts, int(wrong[0])))
    return reference.group_by_expert(indices, num_experts)


def out_of_range(indices: Tensor, num_experts: int, slot: int) -> str:
    found, token = int(indices.reshape(-1)[slot]), slot // indices.shape[1]
    limit = torch.iinfo(torch.int32)
    beyond = " or beyond" if found in (limit.min, limit.max) else ""
    return (
        f"expert indices must lie in 0..{num_experts - 1} (E={num_experts}), "
        f"found {found}{beyond} at token {token}"
    )


register_table("route", [
    triton_row("route", "route", NATIVE),
    cuda.row(cuda.route, NATIVE),
    Backend("cpu", _route_cpu, NATIVE, "cpu"),
    Backend("reference", route_reference, REFERENCE, by_name=True),
])  # fmt: skip
register_table("route_backward", [
    triton_row("route", "route_backward", NATIVE),
    cuda.row(cuda.route_backward, NATIVE),
    Backend("cpu", route_backward_cpu, NATIVE, "cpu"),
    Backend("reference", route_backward_reference, REFERENCE, by_name=True),
])  # fmt: skip
INDEX = (torch.int32,)
register_table("group_by_expert", [
    cuda.row(cuda.group_by_expert, INDEX),
    triton_row("group", "group_by_expert", INDEX),
    Backend("cpu", _group_cpu, INDEX, "cpu"),
    Backend("reference", _group_reference, INDEX, by_name=True),
])  # fmt: skip

define(
    "route(Tensor logits, int top_k, bool softmax, bool normalize, Tensor? bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda logits, *rest: select("route", logits)(logits, *rest),
    lambda logits, top_k, softmax, normalize, bias: empty_routing(logits, top_k),
)
define(
    "route_backward(Tensor grad_weights, Tensor logits, Tensor indices, bool softmax, bool normalize) -> Tensor",
    lambda grad, logits, *rest: select("route_backward", logits)(grad, logits, *rest),
    lambda grad, logits, *rest: logits.new_empty(logits.shape),
)
define(
    "group_by_expert(Tensor indices, int num_experts) -> (Tensor, Tensor, Tensor)",
    lambda indices, num_experts: select("group_by_expert", indices)(indices, num_experts),
    empty_order,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.softmax, ctx.normalize, _ = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, indices = ctx.saved_tensors
    with torch.no_grad():
        grad = torch.ops.sigma.route_backward(grad_weights, logits, indices, ctx.softmax, ctx.normalize)
    return once("route", grad, grad_weights, logits), None, None, None, None


_route = differentiable("route", _backward, _setup)
