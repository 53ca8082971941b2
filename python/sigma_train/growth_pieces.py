"""What each tensor of a grown model is made of: pieces of the former's, so that none need be whole in memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from sigma_train.errors import WrongInput
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_names import Kind, Name, parse, unknown_experts
from sigma_train.growth_noise import Halves, noisy

Shape = Sequence[int]
MLP = {"experts": "mlp", "shared_experts": "mlp"}  # where they are no part of it


@dataclass(frozen=True)
class Growth:
    """Orthogonal growth: layers by a plan, and in each layer `experts` times as many experts (arXiv 2510.08008).

    With k grown like E, every expert's copies are chosen together, each with its share of the former weight, so that
    without noise a layer computes what it did: see docs/grow.md.

    Attributes:
        noise: on copies of experts and router rows alone, times the std of each.
        seed: of the noise.
        interleave: expert e becomes experts e*f .. e*f + f-1 instead of e, e + E, e + 2E, ...
        balance_bias: of copies; never with noise, as its own scale means nothing.
        score: of the router.  The probabilities of a softmax fall to 1/f, and so has a bias that is added to them.
        zero_outputs: what copied layers add to the residual stream begins at zero.
        divides_outputs: outputs of experts are divided by `experts`, where no setting can do that for gates.
        alternates: columns of fused gate and up take turns.
    Raises: WrongInput.
    """

    layers: LayerGrowthPlan
    experts: int = 1
    noise: float = 0.01
    seed: int = 0
    interleave: bool = False
    balance_bias: Literal["copy", "zero"] = "copy"
    score: Literal["softmax", "sigmoid"] = "softmax"
    zero_outputs: bool = False
    divides_outputs: bool = False
    alternates: bool = False

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise WrongInput(f"growth: experts must be at least 1, found {self.experts}")
        if not 0 <= self.noise < float("inf"):
            raise WrongInput(f"growth: noise must be a number of at least 0, found {self.noise}")
        if self.balance_bias not in ("copy", "zero"):
            raise WrongInput(f"growth: balance_bias must be 'copy' or 'zero', found {self.balance_bias!r}")

    def numbers(self, expert: int, num_experts: int) -> list[int]:
        """Of an expert and its copies, in the grown model."""
        f = self.experts
        return [expert * f + c if self.interleave else c * num_experts + expert for c in range(f)]

    def record(self) -> dict[str, Any]:
        """As JSON, for the history of what was grown."""
        return asdict(self) | {"layers": list(self.layers.sources)}


@dataclass(frozen=True)
class Piece:
    """`source`, or the row of one expert of it: as it is, scaled, with noise, or as many zeros.

    With `is_number` a row is one number, whatever the shape; with `parts` it is one of as many blocks of rows.
    """

    source: str
    row: int | None = None
    scale: float = 1.0
    noise: float = 0.0
    key: str = ""
    halves: Halves = ""
    is_number: bool = False
    parts: int = 0

    def of(self, x: Tensor) -> Tensor:
        """What becomes of what was read; memory of its own only where it changes.

        Raises: WrongInput if noise makes what is no finite number, or was none before.
        """
        if self.scale == 0:
            return x.new_zeros(x.shape)
        if self.noise:
            x = noisy(x, self.noise, self.key, self.halves)
            if not x.isfinite().all():  # nor is its std where one of the former's is not
                raise WrongInput(
                    f"growth: {self.source} with noise {self.noise:g} has numbers that are not finite"
                )
        return x if self.scale == 1 else x * self.scale


@dataclass(frozen=True)
class Grown:
    """A tensor: its pieces one after the other along the first dimension."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def grown_tensors(shapes: Mapping[str, Shape], growth: Growth) -> dict[str, Grown]:
    """Of each tensor of the grown model what it is made of, in the order of the tensors that are read.

    Raises: WrongInput for a tensor of experts that is not known by its name, or outputs to zero that are not found.
    """
    experts = expert_counts(shapes) if growth.experts > 1 else {}
    layouts = _layouts(shapes, growth)
    if growth.experts > 1 and (unknown := unknown_experts(shapes)):
        raise WrongInput(f"growth: {unknown[0]} is no tensor of experts whose layout is known")
    if growth.experts > 1 and all(parse(source).kind is Kind.OTHER for source in shapes):
        raise WrongInput("growth: the model has no experts, so experts must be 1")
    grown: dict[str, Grown] = {}
    for source, shape in shapes.items():
        name = parse(source)
        layers = _targets(name, growth)
        for number, layer in enumerate(layers):
            is_zero = growth.zero_outputs and name.is_output and number > 0
            has_rows = growth.experts > 1 and name.kind is not Kind.OTHER and len(shape) > 0
            if not has_rows:  # a count of steps is one of all experts
                piece = Piece(source, scale=0.0 if is_zero else 1.0)
                grown[name.at(layer, name.expert)] = Grown(tuple(shape), (piece,))
                continue
            E = experts.get(name.layer or 0, 0)
            if name.is_stacked and (not E or shape[0] % E):
                raise WrongInput(f"growth: {source} has {shape[0]} rows, which {E} experts cannot share")
            halves = layouts.get(name.layer, "rows") if name.matrix == "gate_up" else ""
            pieces = _of_experts(source, name, layer, E, is_zero, halves, growth)
            if name.kind is Kind.ONE_EXPERT:
                grown |= {name.at(layer, e): Grown(tuple(shape), (piece,)) for e, piece in pieces.items()}
            else:
                grown[name.at(layer)] = Grown(_whole(name, shape, growth.experts), tuple(pieces.values()))
    if growth.zero_outputs:
        _must_be_zeroed(grown, growth)
    return grown


def _targets(name: Name, growth: Growth) -> list[int | None]:
    if name.layer is None or name.is_beyond:
        return [name.layer]
    return list(growth.layers.targets(name.layer))


def _whole(name: Name, shape: Shape, f: int) -> tuple[int, ...]:
    """Ernie's bias of selection is [1, E], all others and all else begin with E."""
    if name.kind is Kind.BALANCE_BIAS:
        return (*shape[:-1], shape[-1] * f)
    return (shape[0] * f, *shape[1:])


def _layouts(shapes: Mapping[str, Shape], growth: Growth) -> dict[int | None, Halves]:
    """Of each layer with fused experts where gate and up lie: [E, 2I, H] beside [E, H, I], or both transposed."""
    found: dict[int | None, dict[str, Shape]] = {}
    for source, shape in shapes.items():
        name = parse(source)
        if name.kind is Kind.ALL_EXPERTS and len(shape) == 3:
            found.setdefault(name.layer, {})[name.matrix] = shape
    made: dict[int | None, Halves] = {}
    for layer, of in found.items():
        if {"gate_up", "down"} <= of.keys() and of["gate_up"][2] != of["down"][1]:
            made[layer] = "columns in turn" if growth.alternates else "columns"
    return made


def expert_counts(shapes: Mapping[str, Shape]) -> dict[int, int]:
    """Of each layer that has experts how many.  Raises: WrongInput for tensors that do not agree."""
    found: dict[int, dict[Kind, int]] = {}
    for source, shape in shapes.items():
        name = parse(source)
        if name.layer is None or name.kind is Kind.OTHER or not len(shape):
            continue
        rows = name.expert + 1 if name.kind is Kind.ONE_EXPERT else shape[0]
        if name.kind is Kind.BALANCE_BIAS:
            rows = math.prod(shape)
        if name.is_stacked:  # how many it has is told by the router alone
            continue
        of_layer = found.setdefault(name.layer, {})
        former = of_layer.get(name.kind, rows)
        if name.kind is not Kind.ONE_EXPERT and rows != former:
            raise WrongInput(f"growth: {source} is of {rows} experts, one beside it of {former}")
        of_layer[name.kind] = max(rows, former)
    for layer, counts in found.items():
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{n} in {kind.value}" for kind, n in counts.items())
            raise WrongInput(f"growth: tensors of layer {layer} disagree in the number of experts: {told}")
    return {layer: max(counts.values()) for layer, counts in found.items()}


def _of_experts(
    source: str, name: Name, layer: int | None, E: int, is_zero: bool, halves: Halves, growth: Growth
) -> dict[int, Piece]:
    """By the number of the grown expert, what it has of one tensor."""
    f, is_bias, is_of_one = growth.experts, name.kind is Kind.BALANCE_BIAS, name.kind is Kind.ONE_EXPERT
    is_divided = growth.score == "softmax" if is_bias else growth.divides_outputs and name.matrix == "down"
    where = f"mtp {layer}" if name.is_beyond else f"{layer}"
    whose = {
        number: (of, copy > 0)
        for of in ([name.expert] if is_of_one else range(E))
        for copy, number in enumerate(growth.numbers(of, E))
    }
    made = {}
    for e, (of, is_copy) in sorted(whose.items()):
        scale = 1 / f if is_divided else 1.0
        if is_zero or (is_bias and is_copy and growth.balance_bias == "zero"):
            scale = 0.0
        draws = is_copy and scale != 0 and not is_bias and name.is_weight
        made[e] = Piece(
            source,
            None if is_of_one else of,
            scale,
            growth.noise if draws else 0.0,
            # Of the grown model's numbers: in a second growth by the same seed no copy gets the noise of the first.
            f"{growth.seed} {where} {e} of {E * f} {name.matrix}".removesuffix(" gate_up") if draws else "",
            halves,
            is_bias,
            E if name.is_stacked else 0,
        )
    return made


def _must_be_zeroed(grown: Mapping[str, Grown], growth: Growth) -> None:
    """Raises: WrongInput if a copied layer adds anything to the residual stream but by what is zero."""
    found: dict[int, set[str]] = {}
    parts: dict[int, int] = {}
    for target, made in grown.items():
        name = parse(target)
        if name.layer is None:
            continue
        module = MLP.get(of := name.after.partition(".")[0], of)
        parts[name.layer] = 1 if module == "mixer" else parts.get(name.layer, 2)  # its attention and its MLP
        if all(piece.scale == 0 for piece in made.pieces):
            found.setdefault(name.layer, set()).add(module)
    for layer, is_copy in enumerate(growth.layers.copies):
        if is_copy and len(found.get(layer, ())) < parts.get(layer, 2):
            raise WrongInput(
                f"growth: zero_outputs wants the outputs of attention and MLP, not found in layer {layer}"
            )
