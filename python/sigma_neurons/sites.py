"""Where the neurons of a model are: feed-forward layers of ours and of Hugging Face transformers, dense or of experts.

A neuron is one row of a gate projection with the column of the down projection that it feeds.  It is active where its
gate is above zero; SiLU, GELU and ReLU are positive exactly there.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from sigma_train.errors import WrongInput
from sigma_train.model import MLP
from torch import Tensor, nn

from sigma_kernels.nn import Experts, MoE

Kind = Literal["gate", "gate_up", "ours", "experts"]  # how `watch` sees the gates
PROBE = torch.linspace(-8, 8, 33)


@dataclass(frozen=True)
class Site:
    """A feed-forward layer of `experts` times `units` neurons; a dense one has one expert.  name: of its module."""

    name: str
    layer: int
    experts: int
    units: int
    kind: Kind

    @property
    def size(self) -> int:
        return self.experts * self.units


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every layer of gated neurons, in the order of the model's modules.

    Raises: WrongInput if there is none, or one is laid out or computed in a way that is not known.
    """
    sites = []
    for name, module in model.named_modules():
        kind = _kind(name, module)
        if kind is not None:
            sites.append(_site(name, module, kind))
    if not sites:
        raise WrongInput(f"neurons: {type(model).__name__} has no gated feed-forward layer that is known")
    return tuple(sites)


def down_weight(model: nn.Module, site: Site) -> Tensor:
    """[experts, H, units], a view of the parameter."""
    weight = model.get_submodule(site.name).down_proj
    weight = weight.weight if isinstance(weight, nn.Linear) else weight
    return weight.detach().view(site.experts, -1, site.units)


def _kind(name: str, module: nn.Module) -> Kind | None:
    if isinstance(module, Experts):
        return "ours"
    down = getattr(module, "down_proj", None)
    if isinstance(down, nn.Linear):
        return next((kind for kind in ("gate", "gate_up") if _is_linear(module, f"{kind}_proj")), None)
    up = getattr(module, "gate_up_proj", None)
    return "experts" if isinstance(down, Tensor) and isinstance(up, Tensor) and down.dim() == 3 else None


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear)


def _site(name: str, module: nn.Module, kind: Kind) -> Site:
    _check(name, module, kind)
    down = module.down_proj
    if isinstance(down, nn.Linear):
        experts, units = 1, down.in_features
    else:
        experts, _, units = down.shape
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return Site(name, int(number[1]) if number else 0, experts, units, kind)


def _check(name: str, module: nn.Module, kind: Kind) -> None:
    """Refuse what would be counted wrongly.  Flags are those of transformers' use_experts_implementation."""
    who = f"neurons: {name} ({type(module).__name__})"
    wanted = {"has_gate": True, "has_bias": False, "is_concatenated": True, "is_transposed": False}
    for flag, value in wanted.items():
        if kind == "experts" and getattr(module, flag, value) != value:
            raise WrongInput(f"{who} has {flag}={not value}, a layout that is not known")
    if kind == "ours" or isinstance(module, MLP):
        return
    if kind == "experts":
        E, H, I = module.down_proj.shape
        if module.gate_up_proj.shape != (E, 2 * I, H):
            raise WrongInput(
                f"{who} has gate_up_proj {list(module.gate_up_proj.shape)} beside down_proj {[E, H, I]}, "
                "a layout that is not known"
            )
    act = next((getattr(module, a) for a in ("act_fn", "activation_fn", "act") if hasattr(module, a)), None)
    if act is None or not torch.equal(act(PROBE) > 0, PROBE > 0):
        raise WrongInput(f"{who} has an activation that is not positive just where its input is")
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        raise WrongInput(f"{who} has a gate of its own, which is not known")


def check_not_spread(model: nn.Module) -> None:
    """Raises: WrongInput if experts are on several ranks."""
    for name, module in model.named_modules():
        if isinstance(module, MoE) and type(module) is not MoE:
            raise WrongInput(f"neurons: {name} is a {type(module).__name__}, whose experts may be elsewhere")
