"""What the activations, gradients and router of each layer are like, at an interval of steps.

No activation is kept: a hook reads a block's output once for its norm and once for its extremes, and leaves numbers.
The hooks are there in the steps that are looked at and in no other.  Ranks add up what they saw in two exchanges of one
small tensor each: one of sums, one of maxima.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_kernels.collectives import observed
from sigma_kernels.distributed.moe import local
from sigma_kernels.nn import MoE
from sigma_kernels.routing import RouterSums
from sigma_train.mesh import copies
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks

OUTPUTS = ("attention", "mlp", "residual")
ENTROPY_BLOCK = 1 << 18  # logits whose probabilities are held at once
Values = dict[str, Tensor]


class LayerStatistics:
    """Of a model on this rank; `row` is what all ranks have seen.

    Use: `with watching(step):` around forward and backward, `see_gradients()` in it once gradients are whole and not
    yet clipped, and `row` for each step that is learned from, so that experts without a token are known.
    """

    def __init__(self, model: LanguageModel, every: int) -> None:
        self.model, self.every = model, every
        self._is_watching = False
        self._forget()
        self._counts: Tensor | None = None  # [layers, E], of all ranks since the last row
        self._steps, self._last_step = 0, 0

    def is_due(self, step: int) -> bool:
        """step is counted from 1."""
        return self.every > 0 and step % self.every == 0

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Look at every forward in the block if the step is due."""
        if not self.is_due(step):
            yield
            return
        self._forget()
        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self.model.layers):
                modules = (block.get_submodule("self_attn"), block.get_submodule("mlp"), block)
                for name, module in zip(OUTPUTS, modules, strict=True):
                    stack.callback(module.register_forward_hook(self._hook(name, number)).remove)
            self._is_watching = True
            try:
                yield
            finally:
                self._is_watching = False

    def _hook(self, name: str, layer: int) -> Callable[[nn.Module, object, Tensor], None]:
        @torch.no_grad()
        def see(module: nn.Module, _: object, output: Tensor) -> None:
            square, largest = square_and_largest(output)
            bad = 0 if math.isfinite(square) else output.numel() - int(output.isfinite().sum())
            self._add(layer, largest, name, square=square, nonfinite=bad, count=output.numel())
            if isinstance(module, MoE) and module.last_logits is not None and module.last_sums is not None:
                self._see_router(layer, module.last_logits, module.last_sums)

        return see

    def _see_router(self, layer: int, logits: Tensor, sums: RouterSums) -> None:
        _, largest = square_and_largest(logits)
        entropy = entropy_sum(logits, sums.score)
        square = sums.square.item()
        self._add(layer, largest, "router", square=square, entropy=entropy, tokens=sums.tokens)
        if "router_p" not in self._sums:
            self._sums["router_p"] = self._zeros(logits.shape[1])
        self._sums["router_p"][layer] += sums.probabilities.detach()

    def see_gradients(self) -> None:
        """Norm and largest element of this rank's part of each layer's weight gradients, where the step is due."""
        if not self._is_watching:
            return
        for layer, block in enumerate(self.model.layers):
            for name, parameter in block.named_parameters():
                gradient = None if parameter.grad is None else local(parameter.grad)
                if gradient is not None and gradient.numel():  # a rank may hold no row of a small matrix
                    square, largest = square_and_largest(gradient)
                    square /= copies(parameter.grad)
                    self._add(layer, largest, f"{group_of(name, parameter)}_gradient", square=square)

    def _add(self, layer: int, largest: float, name: str, **sums: float) -> None:
        for what, value in sums.items():
            self._sums[f"{name}_{what}"][layer] += value
        self._largest[name][layer] = max(self._largest[name][layer].item(), largest)

    def _forget(self) -> None:
        """What the last step that was looked at has left; a value a layer of whatever is named first."""
        self._sums: Values = defaultdict(self._zeros)
        self._largest: Values = defaultdict(self._zeros)

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(len(self.model.layers), *sizes, dtype=torch.float64)

    def row(self, step: int, counts: list[Tensor], ranks: Ranks) -> dict[str, Any]:
        """{"layers": names to a value a layer} if the step is due, else {}; a collective.

        Args: step, counted from 1, that was learned from; counts [E] of each layer, over all ranks.
        """
        if not self.every:
            return {}
        if step <= self._last_step:  # the run has gone back
            self._counts, self._steps = None, 0
        self._last_step, self._steps = step, self._steps + 1
        if counts:
            now = torch.stack(counts)
            self._counts = now if self._counts is None else self._counts + now
        if not self.is_due(step):
            return {}
        sums = over_ranks(self._sums, dist.ReduceOp.SUM, ranks)
        largest = over_ranks(self._largest, dist.ReduceOp.MAX, ranks)
        values = outputs_and_gradients(sums, largest)
        if self._counts is not None:
            values |= of_routers(sums, largest["router"]) | of_loads(self._counts)
        steps, self._counts, self._steps = self._steps, None, 0
        return {"layers": {"steps": steps} | {name: as_json(x) for name, x in values.items()}}


def square_and_largest(x: Tensor) -> tuple[float, float]:
    """The sum of x^2 and the largest |x|, infinite where x holds NaN; each one pass and no copy.

    Norms of rows first: the sum over all of x in f32 is off by 5e-4 at 12.6 million elements, this one by 4e-11, and on
    two cores it takes 2.9 instead of 4.1 ms.  The norm of order infinity takes seven times as long as aminmax.
    """
    x = x.detach()
    wide = torch.promote_types(x.dtype, torch.float32)
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=wide).double()
    square = norms.square().sum().item()
    if math.isinf(square):  # of finite numbers above 1e19, perhaps
        square = torch.linalg.vector_norm(x, dtype=torch.float64).square().item()
    low, high = (end.item() for end in torch.aminmax(x))
    return square, math.inf if math.isnan(low) or math.isnan(high) else max(-low, high)


def entropy_sum(logits: Tensor, score: str) -> float:
    """sum_t H(p_t), p_t = softmax(logits[t]), or of a sigmoid's scores divided by their sum; logits [T, E]."""
    total, rows = 0.0, max(1, ENTROPY_BLOCK // logits.shape[1])
    for block in logits.detach().split(rows):
        log_p = (F.logsigmoid(block) if score == "sigmoid" else block).log_softmax(-1)
        total -= torch.dot(log_p.exp().flatten(), log_p.flatten()).item()
    return total


def group_of(name: str, parameter: Tensor) -> str:
    """Of a block's parameter: norms, attention, router, experts, or the dense mlp."""
    if parameter.dim() == 1:
        return "norms"
    module, part, *_ = name.split(".")
    if module == "self_attn":
        return "attention"
    return part if part in ("router", "experts") else "mlp"


def over_ranks(values: Values, how: Any, ranks: Ranks) -> Values:
    """Each tensor over all ranks, in one exchange."""
    if ranks.size == 1:
        return values
    names = sorted(values)
    flat = torch.cat([values[name].flatten() for name in names])
    with observed("layers"):
        dist.all_reduce(flat, how)
    parts = flat.split([values[name].numel() for name in names])
    return {name: part.view_as(values[name]) for name, part in zip(names, parts, strict=True)}


def outputs_and_gradients(sums: Values, largest: Values) -> Values:
    values: Values = {}
    for name in OUTPUTS:
        count = sums[f"{name}_count"]
        values[f"{name}_rms"] = (sums[f"{name}_square"] / count).sqrt()
        values[f"{name}_largest"] = largest[name]
        values[f"{name}_nonfinite"] = sums[f"{name}_nonfinite"] / count
    for name in largest:
        if name.endswith("_gradient"):
            values[f"{name}_norm"] = sums[f"{name}_square"].sqrt()
            values[f"{name}_largest"] = largest[name]
    return values


def of_routers(sums: Values, largest: Tensor) -> Values:
    """Entropies are shares of log E, which they reach where all experts are as probable."""
    tokens, p = sums["router_tokens"], sums["router_p"]
    uniform = math.log(p.shape[1])
    return {
        "router_logit_largest": largest,
        "router_logsumexp_rms": (sums["router_square"] / tokens).sqrt(),
        "router_entropy_of_mean": torch.special.entr(p / tokens[:, None]).sum(1) / uniform,
        "router_entropy": sums["router_entropy"] / tokens / uniform,
    }


def of_loads(counts: Tensor) -> Values:
    """How far the busiest and the idlest expert are from an even share, and how many are dead; counts [layers, E]."""
    share = counts.double() / counts.double().mean(1, keepdim=True)
    return {
        "load_most": share.amax(1) - 1,
        "load_least": share.amin(1) - 1,
        "experts_dead": (counts == 0).sum(1),
    }


def as_json(x: Tensor) -> list[float | int | None]:
    """Six digits; None for what is no finite number, as JSON has none."""
    if not x.dtype.is_floating_point:
        return x.tolist()
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in x.tolist()]
