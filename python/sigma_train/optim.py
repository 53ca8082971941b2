"""AdamW, the f32 masters of bf16 parameters, and the learning rate."""

import math
from typing import Any

import torch
from torch import Tensor

from sigma_train.config import Config, OptimConfig
from sigma_train.model import LanguageModel


class Optimizer:
    """Fused AdamW on f32 weights; where train.dtype is bf16 it has the model multiply so and keeps the masters.

    Each micro-step: backward, `accumulate`.  Then `clip` and `step`, which drops the gradients.
    """

    def __init__(self, model: LanguageModel, config: Config) -> None:
        self._model = model
        self._masters = model.multiply_in_bf16() if config.train.dtype == "bf16" else {}
        self._scale: Tensor | float = 1.0
        self._sums_in_f32 = config.train.grad_accum > 1
        self.adamw = _adamw(model, self._masters, config.optim)

    def accumulate(self) -> None:
        """Of several micro-steps, add bf16 gradients up in f32; that of a single one is left as it is."""
        if self._sums_in_f32:
            for parameter, master in self._pairs():
                if parameter.grad is not None:
                    grad, parameter.grad = parameter.grad, None
                    master.grad = grad.float() if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a norm of at most `max_norm`; returns the norm they had, summed in f32."""
        tensors = [*self._model.parameters(), *self._masters.values()]
        grads = [t.grad for t in tensors if t.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).norm()
        self._scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g for g in grads if g.dtype == torch.float32], self._scale)
        return norm.item()

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        self.adamw.zero_grad()
        for parameter, master in self._pairs():
            if parameter.grad is not None:  # one at a time, so that only one is ever there in f32
                master.grad = parameter.grad.float().mul_(self._scale)
                parameter.grad = None
                self.adamw.step()
                master.grad = None
            parameter.copy_(master)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(self._model.get_parameter(name), master) for name, master in self._masters.items()]

    def weights(self) -> dict[str, Tensor]:
        """The model's state, f32 throughout."""
        return {**self._model.state_dict(), **self._masters}

    def state_dict(self) -> dict[str, Any]:
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["scale"]


def _adamw(model: LanguageModel, masters: dict[str, Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """Four groups: experts, routers, other matrices, and norms, which do not decay."""
    groups: dict[str, dict] = {
        "experts": {"scale": config.expert_lr_scale, "weight_decay": config.weight_decay},
        "routers": {"scale": config.router_lr_scale, "weight_decay": 0.0},
        "matrices": {"scale": 1.0, "weight_decay": config.weight_decay},
        "norms": {"scale": 1.0, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        kind = "experts" if ".experts." in name else "routers" if ".router." in name else "matrices"
        kind = "norms" if parameter.dim() == 1 else kind
        groups[kind].setdefault("params", []).append(masters.get(name, parameter))
    return torch.optim.AdamW(
        [group for group in groups.values() if "params" in group],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, config: Config) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then a cosine, or flat with a linear end (WSD)."""
    o, steps = config.optim, config.train.steps
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.schedule == "cosine":
        share = (step - o.warmup_steps) / max(1, steps - o.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    else:
        factor = min(1.0, (steps - step) / max(1.0, o.decay_fraction * steps))
    return o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * factor)
