"""The gates of each layer as a model computes, and the routing of their rows.

Where our kernel runs, it hands out the gates that it computed, and nothing is computed twice.  Other implementations of
experts in transformers compute theirs in places that differ from release to release: there the gate rows are
multiplied once more, from the layer's own inputs, a third more of its products.  A gate that rounding alone keeps from
zero may then have the other sign.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sigma_kernels as sk
from sigma_kernels.nn import Experts
from sigma_kernels.routing import Routing
from sigma_neurons.sites import Site

Saw = Callable[[Tensor, Routing | None], None]  # gates [R, units]; of a dense layer, rows are tokens


def watch(model: nn.Module, site: Site, saw: Saw) -> Callable[[], None]:
    """Call `saw` at each forward of the layer, until the function that is returned is called."""
    module = model.get_submodule(site.name)
    if isinstance(module, Experts):
        return _replaced(module, "forward_routed", _observing(module, site, saw))
    if site.kind == "experts":
        if _runs_our_kernel(module):
            return _replaced(module, "forward", _observing_choice(module, site, saw))
        return module.register_forward_pre_hook(_recomputing(site, saw), with_kwargs=True).remove

    def after(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        saw(out.detach().reshape(-1, out.shape[-1])[:, : site.units], None)

    return module.get_submodule(f"{site.kind}_proj").register_forward_hook(after).remove


def _replaced(module: nn.Module, name: str, function: Callable[..., Tensor]) -> Callable[[], None]:
    """The module's own attribute stands before its class's method."""
    before = module.__dict__.get(name)
    setattr(module, name, function)

    def undo() -> None:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)

    return undo


def _observing(experts: Experts, site: Site, saw: Saw) -> Callable[..., Tensor]:
    def forward_routed(
        hidden_states: Tensor, routing: Routing, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        out, gate_up = experts.forward_observed(hidden_states, routing, compute_dtype)
        saw(gate_up[:, : site.units], routing)
        return out

    return forward_routed


def _observing_choice(module: Any, site: Site, saw: Saw) -> Callable[..., Tensor]:
    from sigma_kernels.integrations.transformers import experts_forward_observed

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out, routing, gate_up = experts_forward_observed(module, hidden_states, top_k_index, top_k_weights)
        saw(gate_up[:, : site.units], routing)
        return out

    return forward


def _runs_our_kernel(module: Any) -> bool:
    if getattr(getattr(module, "config", None), "_experts_implementation", None) != "sigma":
        return False
    from sigma_kernels.integrations.transformers import is_plain_swiglu

    return is_plain_swiglu(module)


def _recomputing(site: Site, saw: Saw) -> Callable[..., None]:
    @torch.no_grad()
    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        x = given["hidden_states"].reshape(-1, given["hidden_states"].shape[-1])
        routing = sk.group_by_expert(given["top_k_index"], site.experts)
        rows = sk.permute(x.to(module.gate_up_proj.dtype), routing)
        saw(sk.grouped_gemm(rows, module.gate_up_proj[:, : site.units], routing.offsets), routing)

    return before
