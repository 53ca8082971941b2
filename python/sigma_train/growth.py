"""Growth of a whole state in memory: layers by a plan, experts by copies, and what AdamW remembers of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sigma_train.errors import WrongInput
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_names import Kind, parse
from sigma_train.growth_pieces import Grown, Growth, grown_tensors

State = dict[str, Tensor]
HALVES = {"exp_avg": 1, "exp_avg_sq": 2}  # powers of a gradient that AdamW keeps means of


def grow(state: Mapping[str, Tensor], growth: Growth) -> State:
    """The grown weights by name, none of which shares memory with `state` or with another.

    Raises: WrongInput if the plan is of another number of layers, or as `grown_tensors`.
    """
    must_have_layers(state, growth.layers)
    made = grown_tensors({name: x.shape for name, x in state.items()}, growth)
    return {name: assembled(state, each) for name, each in made.items()}


def grow_depth(state: Mapping[str, Tensor], plan: LayerGrowthPlan, zero_outputs: bool = False) -> State:
    """new layer j = layer plan.sources[j].

    With `zero_outputs` the copies add nothing to the residual stream at first, so that the model computes what it did;
    without it does not.
    """
    return grow(state, Growth(plan, zero_outputs=zero_outputs))


def grow_experts(
    state: Mapping[str, Tensor],
    factor: int = 2,
    noise: float = 0.01,
    seed: int = 0,
    interleave: bool = False,
    balance_bias: Literal["copy", "zero"] = "copy",
    score: Literal["softmax", "sigmoid"] = "softmax",
) -> State:
    """`factor` times as many experts; arguments as of `Growth`.

    The caller has each token go to `factor` times as many experts, and divides the output by `factor` where scores are
    sigmoids that are not divided by their sum.
    """
    plan = LayerGrowthPlan.none(num_layers(state))
    return grow(state, Growth(plan, factor, noise, seed, interleave, balance_bias, score))


def grow_optimizer_state(
    state: Mapping[str, Tensor], growth: Growth, policy: Literal["reset", "inherit"]
) -> State:
    """What AdamW keeps, by "state.NAME.exp_avg": nothing, or what each new parameter's origin has.

    Without noise every copy of an expert, and the former one, gets 1/f of its gradient: so m * 1/f and v * 1/f^2, for
    router rows too; and AdamW then makes the step that it would have made.
    """
    if policy not in ("reset", "inherit"):
        raise WrongInput(f"growth: policy must be 'reset' or 'inherit', found {policy!r}")
    if policy == "reset":
        return {}
    made = grown_moments({name: x.shape for name, x in state.items()}, growth)
    return {name: assembled(state, each) for name, each in made.items()}


def grown_moments(shapes: Mapping[str, torch.Size], growth: Growth) -> dict[str, Grown]:
    """As `grown_tensors`, of the names "state.NAME.SLOT"."""
    plain = replace(growth, noise=0.0, zero_outputs=False)
    slots: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, shape in shapes.items():
        parameter, _, slot = name.removeprefix("state.").rpartition(".")
        slots[slot][parameter] = shape
    moments = {}
    for slot, parameters in slots.items():
        for name, each in grown_tensors(parameters, plain).items():
            share = growth.experts ** -HALVES.get(slot, 0) if parse(name).kind is not Kind.OTHER else 1.0
            pieces = tuple(
                replace(piece, source=f"state.{piece.source}.{slot}", scale=share) for piece in each.pieces
            )
            moments[f"state.{name}.{slot}"] = Grown(each.shape, pieces)
    return moments


def assembled(state: Mapping[str, Tensor], made: Grown) -> Tensor:
    """The tensor, in memory of its own."""
    first = made.pieces[0]
    out = state[first.source].new_empty(made.shape)
    places: Iterable[Tensor] = [out] if first.row is None else out
    if first.parts:
        places = out.chunk(len(made.pieces))
    for place, piece in zip(places, made.pieces, strict=True):
        x = state[piece.source]
        rows = x.chunk(piece.parts) if piece.parts else x
        place.copy_(piece.of(x if piece.row is None else rows[piece.row]))
    return out


def num_layers(names: Mapping[str, object]) -> int:
    """Raises: WrongInput if there are none."""
    layers = {layer for name in names if (layer := parse(name).layer) is not None}
    if not layers:
        raise WrongInput("growth: no tensor is named as one of a layer, as layers.0.self_attn.q_proj.weight")
    return max(layers) + 1


def must_have_layers(names: Mapping[str, object], plan: LayerGrowthPlan) -> None:
    if (n := num_layers(names)) != plan.num_layers:
        raise WrongInput(f"growth: the plan is of {plan.num_layers} layers, the model has {n}")
