"""What the activations, gradients and router of each layer are like, at an interval of steps.

No activation is kept: a hook reads a block's output once for its norm and once for its extremes, and leaves numbers.
The hooks are there in the steps that are looked at and in no other.  Ranks add up what they saw in two exchanges of one
small tensor each: one of sums, one of maxima.  What is made of it for routers is in `routing_statistics.py`.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sigma_kernels.collectives import observed
from sigma_kernels.distributed.moe import local
from sigma_kernels.nn import MoE
from sigma_kernels.routing import RouterSums
from sigma_train.config import Config
from sigma_train.dataset import PreparedData
from sigma_train.mesh import copies
from sigma_train.model import LanguageModel
from sigma_train.probe import Probe
from sigma_train.ranks import Ranks
from sigma_train.routing_statistics import (
    Values,
    of_limits,
    of_loads,
    of_routers,
    overruled,
    sharpness,
    top1_sums,
)

OUTPUTS = ("attention", "mlp", "residual")


class LayerStatistics:
    """Of a model on this rank; `row` is what all ranks have seen.

    Use: `with watching(step):` around forward and backward, `see_gradients()` in it once gradients are whole and not
    yet clipped, and `row` for each step that is learned from, so that experts without a token are known.
    """

    def __init__(self, model: LanguageModel, config: Config, data: PreparedData) -> None:
        self.model, self.every = model, config.guard.stats_every
        r = config.router
        self._temperature = r.top1_temperature if r.balance == "top1" else None
        self._text, self._probe = data.train, Probe(config, data.val)
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
                if module.router.expert_bias is not None:
                    chosen = module.last_routing.indices
                    self._sums["router_overruled"][layer] += overruled(module.last_logits, chosen)

        return see

    def _see_router(self, layer: int, logits: Tensor, sums: RouterSums) -> None:
        _, largest = square_and_largest(logits)
        seen = sharpness(logits, sums.score)
        square, tokens = sums.square.item(), sums.tokens
        self._add(
            layer, largest, "router", square=square, tokens=tokens, entropy=seen.entropy, top1=seen.top1
        )
        self._add_of_experts(layer, "router_p", sums.probabilities.detach())
        if self._temperature is not None:
            q, largest_q = top1_sums(logits, self._temperature)
            self._add_of_experts(layer, "top1_q", q)
            self._sums["top1_largest"][layer] += largest_q

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

    def _add_of_experts(self, layer: int, name: str, values: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = self._zeros(len(values))
        self._sums[name][layer] += values

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
        """{"layers": names to a value a layer} if the step is due; a collective.

        Args: step, counted from 1, that was learned from; counts [E] of each layer, over all ranks.
        """
        if not self.every:
            return {}
        if step <= self._last_step:  # the run has gone back
            self._counts, self._steps = None, 0
            self._probe.forget()
        self._last_step, self._steps = step, self._steps + 1
        now = torch.stack(counts) if counts else None
        if now is not None:
            self._counts = now if self._counts is None else self._counts + now
        # Once a run, in the row of its first step, which goes with the others where a run begins anew.
        told = {"commonest_token": self._text.commonest} if step == 1 and counts else {}
        if not self.is_due(step):
            return told
        sums = over_ranks(self._sums, dist.ReduceOp.SUM, ranks)
        largest = over_ranks(self._largest, dist.ReduceOp.MAX, ranks)
        values = outputs_and_gradients(sums, largest)
        if now is not None and self._counts is not None:
            tokens = self._steps * sums["router_tokens"][0].item()
            values |= of_routers(sums, largest["router"], now)
            values |= of_loads(self._counts) | of_limits(self._counts, tokens, self._text.commonest)
            values |= self._of_biases()
            values["routing_changes"] = self._probe.changes(self.model, ranks)
        steps, self._counts, self._steps = self._steps, None, 0
        return told | {"layers": {"steps": steps} | {name: as_json(x) for name, x in values.items()}}

    def _of_biases(self) -> Values:
        """How far apart those of a layer's experts are, where they have any."""
        biases = [moe.router.expert_bias for moe in self.model.moe_layers()]
        spread = [bias.amax() - bias.amin() for bias in biases if bias is not None]
        return {"bias_spread": torch.stack(spread)} if spread else {}


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


def as_json(x: Tensor) -> list[float | int | None]:
    """Six digits; None for what is no finite number, as JSON has none."""
    if not x.dtype.is_floating_point:
        return x.tolist()
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in x.tolist()]
