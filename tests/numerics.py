"""Errors of each kernel against f64, beside those of torch's own operations in the same dtype.

Both begin with the same numbers, rounded to the dtype; the truth is the reference of these in f64.
`python tests/numerics.py` prints the tables of docs/numerics.md.
"""

import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sigma_train.processor import processor_name
from support import value_and_grads
from torch import Tensor

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.ops.grouped_gemm import grouped_outer_

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
E = 8
TOKENS, TOP_K = 320, 2  # 80 rows an expert on average
SEEDS = 3
Function = Callable[..., Tensor]
Outputs = list[tuple[Tensor, Tensor, Tensor]]  # ours, torch's, the truth


@dataclass(frozen=True)
class Kernel:
    """`run` draws inputs of a dtype and a size; `outputs` names the results that it compares."""

    name: str
    outputs: Sequence[str]
    sizes: Sequence[tuple[int, ...]]
    run: Callable[..., Outputs]


class Error(NamedTuple):
    """Of all elements, by the root mean square of the truth.

    Not each by its own size: a sum that cancels to almost nothing has a relative error without a bound, whoever sums.
    """

    rms: float
    max: float


class Pair(NamedTuple):
    ours: Error
    torchs: Error

    @property
    def ratio(self) -> float:
        return self.ours.rms / self.torchs.rms

    @property
    def max_ratio(self) -> float:
        return self.ours.max / self.torchs.max


def draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype.is_floating_point else x


def compared(ours: Function, torchs: Function, exact: Function, inputs: Sequence[Tensor]) -> Outputs:
    """The value, and the gradients by all floating-point inputs of one random gradient of the value."""
    wide_inputs = [wide(x) for x in inputs]
    grad = draw(inputs[0].dtype, *exact(*wide_inputs).shape)
    results = (value_and_grads(f, inputs, grad) for f in (ours, torchs))
    return list(zip(*results, value_and_grads(exact, wide_inputs, grad.double()), strict=True))


def experts_rows() -> Tensor:
    """offsets [E+1] of experts of 40 to 200 rows."""
    return torch.cat([torch.zeros(1), torch.randint(40, 201, (E,)).cumsum(0)]).int()


def choices(top_k: int = TOP_K) -> Tensor:
    """[T, k] indices of which the last expert has about three times as many as the first."""
    return (torch.randn(TOKENS, E) + torch.linspace(-0.4, 0.4, E)).topk(top_k).indices


def grouped_gemm(dtype: torch.dtype, H: int, N: int) -> Outputs:
    offsets = experts_rows()
    counts = offsets.diff().tolist()

    def by_torch(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rows @ w.T for rows, w in zip(x.split(counts), weight.unbind(), strict=True)])

    return compared(
        lambda x, weight: sk.grouped_gemm(x, weight, offsets),
        by_torch,
        lambda x, weight: reference.grouped_gemm(x, weight, offsets),
        [draw(dtype, sum(counts), H), draw(dtype, E, N, H, scale=H**-0.5)],
    )


def accumulated(dtype: torch.dtype, H: int, N: int) -> Outputs:
    """A weight gradient that is added to a gradient of about its size."""
    offsets = experts_rows()
    counts = offsets.diff().tolist()
    a, b = draw(dtype, sum(counts), N), draw(dtype, sum(counts), H)
    before = draw(dtype, E, N, H, scale=sum(counts) ** 0.5 / E**0.5)
    ours, torchs = grouped_outer_(before.clone(), a, b, offsets, accumulate=True), before.clone()
    for grad, x, y in zip(torchs, a.split(counts), b.split(counts), strict=True):
        grad += x.T @ y
    return [(ours, torchs, before.double() + reference.grouped_outer(a.double(), b.double(), offsets))]


def moe_experts(dtype: torch.dtype, H: int, I: int) -> Outputs:
    """The reference is what one writes in torch; in a narrow dtype it rounds after every step."""
    weights = (torch.rand(TOKENS, TOP_K) + 0.1).to(dtype)
    gate_up, down = draw(dtype, E, 2 * I, H, scale=H**-0.5), draw(dtype, E, H, I, scale=I**-0.5)
    inputs = [draw(dtype, TOKENS, H), choices(), weights, gate_up, down]
    return compared(sk.moe_experts, reference.moe_experts, reference.moe_experts, inputs)


def route(score: str, normalize: bool, dtype: torch.dtype, experts: int, top_k: int) -> Outputs:
    logits = draw(dtype, 2000, experts, scale=2.0)
    indices = sk.route(logits, top_k).indices

    def by_torch(logits: Tensor) -> Tensor:
        p = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        p = p.gather(1, indices.long())
        return p / p.sum(-1, keepdim=True) if normalize else p

    return compared(
        lambda logits: sk.route(logits, top_k, score=score, normalize=normalize).weights,
        by_torch,
        lambda logits: reference.weights_of(logits, indices, score, normalize),
        [logits],
    )


def router_sums(dtype: torch.dtype, experts: int, top_k: int) -> Outputs:
    """Of 16 batches, as the square is one number for each."""
    logits = draw(dtype, 16, 300, experts, scale=2.0)

    def of_each(one: Function) -> Function:
        return lambda batches: torch.stack([one(logits) for logits in batches])

    probabilities = compared(
        of_each(lambda logits: sk.route_with_sums(logits, top_k)[1].probabilities),
        of_each(lambda logits: logits.softmax(-1).sum(0)),
        of_each(lambda logits: reference.router_sums(logits)[0]),
        [logits],
    )
    return probabilities + compared(
        of_each(lambda logits: sk.route_with_sums(logits, top_k)[1].square),
        of_each(lambda logits: logits.logsumexp(-1).square().sum()),
        of_each(lambda logits: reference.router_sums(logits)[1]),
        [logits],
    )


def permute(dtype: torch.dtype, H: int, top_k: int) -> Outputs:
    """The gradient alone, a sum of k rows: the value is a copy."""
    routing = sk.group_by_expert(choices(top_k), E)
    token = routing.row_map.long() // top_k
    return compared(
        lambda x: sk.permute(x, routing),
        lambda x: x.index_select(0, token),
        lambda x: reference.permute(x, routing.row_map, top_k),
        [draw(dtype, TOKENS, H)],
    )[1:]


def unpermute(dtype: torch.dtype, H: int, top_k: int) -> Outputs:
    routing = sk.group_by_expert(choices(top_k), E)
    slot = routing.row_map.long()

    def by_torch(y: Tensor, weights: Tensor) -> Tensor:
        weighted = y * weights.flatten()[slot, None]
        return y.new_zeros(TOKENS, H).index_add(0, slot // top_k, weighted)

    return compared(
        lambda y, weights: sk.unpermute(y, routing._replace(weights=weights)),
        by_torch,
        lambda y, weights: reference.unpermute(y, routing.row_map, weights, top_k, TOKENS),
        [draw(dtype, len(slot), H), (torch.rand(TOKENS, top_k) + 0.1).to(dtype)],
    )


def of_route(score: str, normalize: bool) -> Callable[..., Outputs]:
    return lambda *args: route(score, normalize, *args)


PRODUCTS = [(512, 192), (333, 257), (1024, 65)]  # H and N
ROUTES = [(96, 4), (37, 2)]  # E and k
ROWS = [(512, 2), (333, 4), (1024, 2)]  # H and k
KERNELS = [
    Kernel("grouped_gemm", ("y", "grad x", "grad weight"), PRODUCTS, grouped_gemm),
    Kernel("grouped_gemm into .grad", ("grad weight",), PRODUCTS, accumulated),
    Kernel(
        "moe_experts",
        ("out", "grad x", "grad weights", "grad gate_up", "grad down"),
        [(512, 96), (257, 129)],
        moe_experts,
    ),
    Kernel("route, softmax", ("weights", "grad logits"), ROUTES, of_route("softmax", False)),
    Kernel("route, softmax normalised", ("weights", "grad logits"), ROUTES, of_route("softmax", True)),
    Kernel("route, sigmoid", ("weights", "grad logits"), ROUTES, of_route("sigmoid", False)),
    Kernel("route, sigmoid normalised", ("weights", "grad logits"), ROUTES, of_route("sigmoid", True)),
    Kernel(
        "route_with_sums",
        ("probabilities", "grad by probabilities", "square", "grad by square"),
        ROUTES,
        router_sums,
    ),
    Kernel("permute", ("grad x",), ROWS, permute),
    Kernel("unpermute", ("out", "grad y", "grad weights"), ROWS, unpermute),
]


def error_of(got: Tensor, want: Tensor) -> Error:
    error, size = got.double() - want, want.square().mean().sqrt()
    return Error((error.square().mean().sqrt() / size).item(), (error.abs().max() / size).item())


def over_seeds(errors: Sequence[Error]) -> Error:
    return Error(math.sqrt(sum(e.rms**2 for e in errors) / len(errors)), max(e.max for e in errors))


def measured(kernel: Kernel, dtype: torch.dtype, size: tuple[int, ...]) -> dict[str, Pair]:
    """The errors of each output over all seeds."""
    found: dict[str, list[Pair]] = {name: [] for name in kernel.outputs}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        for name, (ours, torchs, exact) in zip(kernel.outputs, kernel.run(dtype, *size), strict=True):
            found[name].append(Pair(error_of(ours, exact), error_of(torchs, exact)))
    return {name: Pair(*map(over_seeds, zip(*pairs, strict=True))) for name, pairs in found.items()}


def tables() -> Iterator[str]:
    """One row an output: of its sizes that with the largest ratio, for each dtype."""
    worst: dict[tuple[str, str], list[Pair]] = {}
    for kernel in KERNELS:
        for dtype in DTYPES.values():
            by_size = [measured(kernel, dtype, size) for size in kernel.sizes]
            for output in kernel.outputs:
                pair = max((found[output] for found in by_size), key=lambda pair: pair.ratio)
                worst.setdefault((kernel.name, output), []).append(pair)
    isa, of_torch = sk._C.isa(), torch.backends.cpu.get_cpu_capability()
    yield f"{datetime.date.today()}, {processor_name()}, ISA {isa}, torch {torch.__version__} with {of_torch}."
    for title, which in ("Root mean square", 0), ("Largest", 1):
        yield f"\n{title}:\n"
        yield "| kernel | result |" + "".join(f" {label} | torch | ratio |" for label in DTYPES)
        yield "|---|---|" + "---|---|---|" * len(DTYPES)
        for (name, output), pairs in worst.items():
            cells = (
                f" {p.ours[which]:.1e} | {p.torchs[which]:.1e} | {(p.ratio, p.max_ratio)[which]:.2f} |"
                for p in pairs
            )
            yield f"| {name} | {output} |" + "".join(cells)


if __name__ == "__main__":
    print("\n".join(tables()))
