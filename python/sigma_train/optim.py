"""AdamW, the learning rate, and the gradient's norm."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from sigma_kernels.collectives import observed
from sigma_train.config import Config, OptimConfig
from sigma_train.model import LanguageModel


def make_optimizer(model: LanguageModel, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW in four groups: experts, routers, other matrices, and norms, which do not decay."""
    groups: dict[str, dict] = {
        "experts": {"scale": config.expert_lr_scale, "weight_decay": config.weight_decay},
        "routers": {"scale": config.router_lr_scale, "weight_decay": 0.0},
        "matrices": {"scale": 1.0, "weight_decay": config.weight_decay},
        "norms": {"scale": 1.0, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        kind = "experts" if ".experts." in name else "routers" if ".router." in name else "matrices"
        kind = "norms" if parameter.dim() == 1 else kind
        groups[kind].setdefault("params", []).append(parameter)
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


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def clip(model: LanguageModel, most: float) -> float:
    """The norm of all gradients, over all ranks, to which they are cut where it is above `most`.

    Where it is no number they stay as they are: cutting would spread it over all of them.
    """
    by_mesh = defaultdict(list)  # of experts and of the rest; None where they are no DTensors
    for p in model.parameters():
        if p.grad is not None:
            by_mesh[getattr(p.grad, "device_mesh", None)].append(p.grad)
    norms = [_total_norm(grads) for grads in by_mesh.values()]
    norm = (norms[0] if len(norms) == 1 else torch.stack(norms).norm()).item()
    factor = most / (norm + 1e-6) if math.isfinite(norm) else 1.0
    for grads in by_mesh.values() if factor < 1 else []:
        torch._foreach_mul_(grads, factor)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """Over all ranks, the bits of `torch.nn.utils.get_total_norm`, which computes and meets in one call."""
    norms = torch.stack(torch._foreach_norm(grads))
    if not hasattr(norms, "full_tensor"):
        return torch.linalg.vector_norm(norms)
    with observed("norm"):  # of a DTensor's parts the sum over ranks is here
        return torch.linalg.vector_norm(norms).full_tensor()
