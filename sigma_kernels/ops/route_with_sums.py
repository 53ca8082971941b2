"""The router's decision and, from the same pass over its scores, what balance losses read of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigma_kernels import reference
from sigma_kernels.backends import Backend, register_table, select
from sigma_kernels.ops import cuda
from sigma_kernels.ops.library import NATIVE, REFERENCE, define, differentiable, once
from sigma_kernels.ops.route import (
    Score,
    check_score,
    checked,
    route_backward_cpu,
    route_backward_reference,
    route_cpu,
    route_reference,
)
from sigma_kernels.ops.triton_rows import triton_row
from sigma_kernels.routing import RouterSums, Routing, empty_routing


def route_with_sums(
    logits: Tensor,
    top_k: int = 1,
    *,
    score: Score = "softmax",
    normalize: bool = False,
    bias: Tensor | None = None,
    balance_score: Score = "softmax",
) -> tuple[Routing, RouterSums]:
    """`route`, and over all tokens the sums of the router's probabilities and of its squared log-sum-exps.

    sums.probabilities[e] = sum_t q[t, e],  sums.square = sum_t (log sum_e exp logits[t, e])^2.  q is softmax(logits),
    or for balance_score = "sigmoid" the sigmoids divided by their sum.  `sk.nn.load_balancing_loss` and
    `sk.nn.router_z_loss` take the sums in place of the logits.  One backward pass over the logits then gives the
    gradient of the weights and of both losses; apart they would make and add three gradients of the logits' size.

    Args, Raises: as `route`; ValueError for a balance_score.
    Returns: the Routing of `route`, bit for bit, and RouterSums in f32 (f64 for logits in f64); the same bits at any
        number of threads.
    """
    check_score("route_with_sums", balance_score, "balance_score")
    wide, bias = checked("route_with_sums", logits, top_k, score, bias)
    weights, probabilities, square, *rest = _route_with_sums(
        wide, top_k, score == "softmax", normalize, bias, balance_score == "softmax"
    )
    indices, *order = rest
    return (
        Routing(indices, weights.to(logits.dtype), *order),
        RouterSums(probabilities, square, logits.shape[0], balance_score),
    )


def _outputs(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    weights, *order = empty_routing(logits, top_k)
    return weights, logits.new_empty(logits.shape[1]), logits.new_empty(()), *order


def _fused(route: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """A row of kernels that sum in the pass that chooses."""

    def run(
        logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None, sums_softmax: bool
    ) -> tuple[Tensor, ...]:
        out = weights, probabilities, square, *order = _outputs(logits, top_k)
        sums = sums_softmax, probabilities.data_ptr(), square.data_ptr()
        route(logits, top_k, softmax, normalize, bias, (weights, *order), sums)
        return out

    return run


def _fused_backward(route_backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        grad_weights: Tensor, grad_probabilities: Tensor, grad_square: Tensor, logits: Tensor, indices: Tensor,
        softmax: bool, normalize: bool, sums_softmax: bool,
    ) -> Tensor:  # fmt: skip
        grad_probabilities = grad_probabilities.contiguous()  # .sum() sends stride 0
        sums = sums_softmax, grad_probabilities.data_ptr(), grad_square.data_ptr()
        return route_backward(grad_weights, logits, indices, softmax, normalize, sums)

    return run


def _reference(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None, sums_softmax: bool
) -> tuple[Tensor, ...]:
    weights, *order = route_reference(logits, top_k, softmax, normalize, bias)
    return weights, *reference.router_sums(logits, "softmax" if sums_softmax else "sigmoid"), *order


def _backward_reference(
    grad_weights: Tensor, grad_probabilities: Tensor, grad_square: Tensor, logits: Tensor, indices: Tensor,
    softmax: bool, normalize: bool, sums_softmax: bool,
) -> Tensor:  # fmt: skip
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        sums = reference.router_sums(leaf, "softmax" if sums_softmax else "sigmoid")
    (of_sums,) = torch.autograd.grad(sums, leaf, (grad_probabilities, grad_square))
    return of_sums + route_backward_reference(grad_weights, logits, indices, softmax, normalize)


register_table("route_with_sums", [
    triton_row("router_sums", "route_with_sums", NATIVE),
    cuda.row(_fused(cuda.route_into), NATIVE),
    Backend("cpu", _fused(route_cpu), NATIVE, "cpu"),
    Backend("reference", _reference, REFERENCE, by_name=True),
])  # fmt: skip
register_table("route_with_sums_backward", [
    triton_row("router_sums", "route_with_sums_backward", NATIVE),
    cuda.row(_fused_backward(cuda.route_backward), NATIVE),
    Backend("cpu", _fused_backward(route_backward_cpu), NATIVE, "cpu"),
    Backend("reference", _backward_reference, REFERENCE, by_name=True),
])  # fmt: skip

define(
    "route_with_sums(Tensor logits, int top_k, bool softmax, bool normalize, Tensor? bias, bool sums_softmax)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda logits, *rest: select("route_with_sums", logits)(logits, *rest),
    lambda logits, top_k, *rest: _outputs(logits, top_k),
)
define(
    "route_with_sums_backward(Tensor grad_weights, Tensor grad_probabilities, Tensor grad_square, Tensor logits,"
    " Tensor indices, bool softmax, bool normalize, bool sums_softmax) -> Tensor",
    lambda *args: select("route_with_sums_backward", args[3])(*args),
    lambda *args: args[3].new_empty(args[3].shape),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, *softmax_normalize, _, sums_softmax = inputs
    ctx.flags = (*softmax_normalize, sums_softmax)
    ctx.save_for_backward(logits, output[3])
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    logits, indices = ctx.saved_tensors
    with torch.no_grad():
        grad = torch.ops.sigma.route_with_sums_backward(*grads[:3], logits, indices, *ctx.flags)
    return once("route_with_sums", grad, *grads[:3], logits), None, None, None, None, None


_route_with_sums = differentiable("route_with_sums", _backward, _setup)
