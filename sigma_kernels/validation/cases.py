"""What is computed to judge a device: each operation, forward and backward, at the size of a real layer.

An exact case answers with tensors whose every bit is known.  A close one answers with what exp has part in, beside the
definition in f64 and the bound that the dtype explains.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.routing import Routing
from sigma_kernels.validation.inputs import SMALL, Inputs

Outputs = dict[str, Tensor]
F32, F64 = torch.float32, torch.float64
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Comparison(NamedTuple):
    """A result and its definition; |got - want| <= bound * (typical size of want + |want|) is sought."""

    name: str
    got: Tensor
    want: Tensor
    bound: float


@dataclass(frozen=True)
class Exact:
    """An operation whose outputs have one digest each, and the rows of the table of backends that it calls.

    `define` is the same in plain torch; without one it is `run` on the reference.
    """

    op: str
    run: Callable[[Inputs], Outputs]
    rows: tuple[str, ...]
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16")
    define: Callable[[Inputs], Outputs] | None = None
    is_wide: bool = False  # whether numbers of f32 have more bits than those of narrow types


@dataclass(frozen=True)
class Close:
    """The same for what rounds; `turn` says which experts are looked at."""

    op: str
    compare: Callable[[Inputs, int], Iterator[Comparison]]
    rows: tuple[str, ...]
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16")


def gradients(out: Tensor, grad: Tensor, **leaves: Tensor) -> Outputs:
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def order(routing: Routing) -> Outputs:
    return {"counts": routing.counts, "offsets": routing.offsets, "row_map": routing.row_map}


def group_by_expert(inputs: Inputs) -> Outputs:
    return order(sk.group_by_expert(inputs.indices, inputs.size.E))


def route(inputs: Inputs) -> Outputs:
    routing = sk.route(inputs.logits, 2)
    return {"indices": routing.indices, **order(routing)}


def of_two(inputs: Inputs) -> Routing:
    return sk.group_by_expert(inputs.indices, inputs.size.E, inputs.factors)


def permute(inputs: Inputs) -> Outputs:
    x = leaf(inputs.tokens)
    out = sk.permute(x, of_two(inputs))
    return {"output": out.detach(), **gradients(out, inputs.rows, x=x)}


def unpermute(inputs: Inputs) -> Outputs:
    y, weights = leaf(inputs.rows), leaf(inputs.factors)
    out = sk.unpermute(y, of_two(inputs)._replace(weights=weights))
    return {"output": out.detach(), **gradients(out, inputs.tokens * SMALL, y=y, weights=weights)}


def grouped_gemm(inputs: Inputs) -> Outputs:
    """x @ weight.T, and the weight's gradient."""
    x, weight, _, grad = inputs.grouped
    weight = leaf(weight)
    out = sk.grouped_gemm(x, weight, inputs.offsets)
    return {"output": out.detach(), **gradients(out, grad, weight=weight)}


def grouped_gemm_defined(inputs: Inputs) -> Outputs:
    x, weight, _, grad = inputs.grouped
    return {
        "output": reference.grouped_gemm(x, weight, inputs.offsets),
        "gradient of weight": reference.grouped_outer(grad, x, inputs.offsets),
    }


def grouped_gemm_plain(inputs: Inputs) -> Outputs:
    """x @ weight."""
    x, _, weight, _ = inputs.grouped
    return {"output": sk.grouped_gemm(x, weight, inputs.offsets, transpose_weight=False)}


def moe_experts(inputs: Inputs) -> Outputs:
    """With what a backward needs, its gradients, and by the path of inference: the last has the output's digest."""
    index = inputs.indices[:, :1]
    gate_up, down = inputs.weights
    named = {"x": inputs.x, "weights": inputs.factors[:, :1], "gate_up_proj": gate_up, "down_proj": down}
    with torch.no_grad():
        alone = sk.moe_experts(inputs.x, index, inputs.factors[:, :1], gate_up, down)
    named = {name: leaf(x) for name, x in named.items()}
    x, weights, gate_up, down = named.values()
    out = sk.moe_experts(x, index, weights, gate_up, down)
    return {
        "output": out.detach(),
        "output without a gradient": alone,
        **gradients(out, inputs.grad, **named),
    }


def moe_experts_top_2(inputs: Inputs) -> Outputs:
    """Half of the tokens; in f32 alone, as GPUs round each slot of narrow types before they add."""
    half = inputs.size.T // 2
    x, weights = leaf(inputs.x[:half]), leaf(inputs.factors[:half])
    out = sk.moe_experts(x, inputs.indices[:half], weights, *inputs.weights)
    return {"output": out.detach(), **gradients(out, inputs.grad[:half], x=x, weights=weights)}


def layer_defined(inputs: Inputs, T: int, top_k: int) -> Outputs:
    """One expert after the other: autograd over all of them makes gradients of all weights for each."""
    x, grad = inputs.x[:T], inputs.grad[:T]
    index, factors = inputs.indices[:T, :top_k], inputs.factors[:T, :top_k]
    out = {
        "output": torch.zeros_like(x),
        "gradient of x": torch.zeros_like(x),
        "gradient of weights": torch.zeros_like(factors),
        "gradient of gate_up_proj": torch.zeros_like(inputs.weights[0]),
        "gradient of down_proj": torch.zeros_like(inputs.weights[1]),
    }
    for e in range(inputs.size.E):
        token, slot = torch.where(index == e)
        alone = [x[token], factors[token, slot, None], *(w[e : e + 1] for w in inputs.weights)]
        alone = [leaf(t) for t in alone]
        y = reference.moe_experts(alone[0], torch.zeros_like(alone[1], dtype=torch.long), *alone[1:])
        of_x, of_factors, of_gate_up, of_down = torch.autograd.grad(y, alone, grad[token])
        out["output"].index_add_(0, token, y.detach())
        out["gradient of x"].index_add_(0, token, of_x)
        out["gradient of weights"][token, slot] = of_factors[:, 0]
        out["gradient of gate_up_proj"][e] = of_gate_up[0]
        out["gradient of down_proj"][e] = of_down[0]
    return out


def moe_experts_defined(inputs: Inputs) -> Outputs:
    out = layer_defined(inputs, inputs.size.T, 1)
    return {**out, "output without a gradient": out["output"]}


def top_2_defined(inputs: Inputs) -> Outputs:
    out = layer_defined(inputs, inputs.size.T // 2, 2)
    return {name: out[name] for name in ("output", "gradient of x", "gradient of weights")}


def moe_experts_int8(inputs: Inputs) -> Outputs:
    (gate_up, down), (of_gate_up, of_down) = inputs.weights_int8, inputs.scales
    index, factors = inputs.indices[:, :1], inputs.factors[:, :1]
    with torch.no_grad():
        out = sk.moe_experts_int8(inputs.x, index, factors, gate_up, of_gate_up, down, of_down)
    return {"output": out}


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """Of a sum of `depth` products in f32; narrow types round their result alone, and on a GPU what lies between."""
    return 8 * torch.finfo(dtype).eps * (max(1, depth) ** 0.5 if dtype == F32 else 1.0)


def router(inputs: Inputs, turn: int) -> Iterator[Comparison]:
    """Weights, sums of the balance losses and the gradient of all three."""
    del turn
    T, E = inputs.logits.shape
    results = []
    for dtype in (inputs.dtype, F64):
        logits = leaf(inputs.logits.to(dtype))
        if dtype == F64:
            weights = reference.route(logits, 2).weights
            probabilities, square = reference.router_sums(logits)
        else:
            routing, sums = sk.route_with_sums(logits, 2)
            weights, probabilities, square = routing.weights, sums.probabilities, sums.square
        loss = (weights.to(probabilities.dtype) * inputs.factors.to(probabilities.dtype)).sum()
        loss = loss + (probabilities * probabilities).sum() / T**2 + square / T
        (grad,) = torch.autograd.grad(loss, logits)
        results.append((weights.detach(), probabilities.detach(), square.detach()[None], grad))
    bounds = (tolerance(inputs.dtype, E), tolerance(F32, T), tolerance(F32, T), tolerance(inputs.dtype, E))
    names = ("weights", "sum of probabilities", "sum of squares", "gradient of logits")
    for name, got, want, bound in zip(names, *results, bounds, strict=True):
        yield Comparison(name, got, want, bound)


def moe_experts_soft(inputs: Inputs, turn: int) -> Iterator[Comparison]:
    """The layer where silu bends; two experts are computed again, others at each turn."""
    index, factors = inputs.indices[:, :1], inputs.factors[:, :1]
    named = {"x": inputs.soft, "weights": factors, "gate_up_proj": inputs.weights[0]}
    x, weights, gate_up, down = (leaf(t) for t in (*named.values(), inputs.weights[1]))
    out = sk.moe_experts(x, index, weights, gate_up, down)
    grads = torch.autograd.grad(out, [x, weights, gate_up, down], inputs.soft_grad)
    bound = tolerance(inputs.dtype, max(inputs.size.H, inputs.size.I))
    names = ("output", "gradient of x", "gradient of weights", "gradient of gate_up", "gradient of down")
    for e in ((2 * turn) % inputs.size.E, (2 * turn + 1) % inputs.size.E):
        of_e = (index[:, 0] == e).nonzero()[:, 0]
        if not len(of_e):
            continue
        alone = [leaf(t.double()) for t in (x[of_e], weights[of_e], gate_up[e : e + 1], down[e : e + 1])]
        want = reference.moe_experts(alone[0], torch.zeros_like(index[of_e]), *alone[1:])
        want_grads = torch.autograd.grad(want, alone, inputs.soft_grad[of_e].double())
        got = (out.detach()[of_e], grads[0][of_e], grads[1][of_e], grads[2][e : e + 1], grads[3][e : e + 1])
        for name, g, w in zip(names, got, (want.detach(), *want_grads), strict=True):
            yield Comparison(f"{name} of expert {e}", g, w, bound)


LAYER = ("group_by_expert", "moe_experts", "moe_experts_backward")
EXACT = (
    Exact("group_by_expert", group_by_expert, ("group_by_expert",), ("f32",)),
    Exact("route", route, ("route",)),
    Exact("permute", permute, ("permute", "unpermute")),
    Exact("unpermute", unpermute, ("unpermute", "unpermute_backward")),
    Exact("grouped_gemm", grouped_gemm, ("grouped_gemm", "grouped_outer"), define=grouped_gemm_defined,
          is_wide=True),
    Exact("grouped_gemm, plain", grouped_gemm_plain, ("grouped_gemm",), is_wide=True),
    Exact("moe_experts", moe_experts, (*LAYER, "moe_experts_inference"), define=moe_experts_defined),
    Exact("moe_experts, top 2", moe_experts_top_2, LAYER, ("f32",), top_2_defined),
    Exact("moe_experts_int8", moe_experts_int8, ("moe_experts_inference",)),
)  # fmt: skip
CLOSE = (
    Close("route_with_sums", router, ("route_with_sums", "route_with_sums_backward")),
    Close("moe_experts, soft", moe_experts_soft, LAYER),
)
CASES: tuple[Exact | Close, ...] = (*EXACT, *CLOSE)
