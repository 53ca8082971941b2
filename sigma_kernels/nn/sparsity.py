"""How many experts a token goes to, layer by layer, over the length of a training run."""

from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple, Self

Point = int | float  # of a run: an integer is a step, a float in 0..1 a share of the steps


class Phase(NamedTuple):
    """From `begin` on, layer l has top_k[l] experts a token.

    With a `ramp_end` k goes there from the phase before by steps of one: those of a layer are spread evenly from
    `begin` to `ramp_end`, where the last is taken.  Without it k switches at `begin`.
    """

    begin: Point
    top_k: tuple[int, ...]
    ramp_end: Point | None = None


@dataclass(frozen=True)
class SparsitySchedule:
    """top_k(step) of each layer, by phases: progressive sparsification (Sigma-MoE-Tiny, arXiv 2512.16248).

        SparsitySchedule([(0, [4, 2, 1]), (0.9, [1, 1, 1])], steps=10_000)

    A value: equal where the fields are, and `to_dict` gives what JSON and TOML hold.  A share becomes the nearest step.

    Args:
        phases: each a Phase, a (begin, top_k) or (begin, top_k, ramp_end), or a mapping with these keys; the first
            begins at 0, and each after the end of the one before's ramp or at it.
        steps: the length of the run, of which floats are shares.
        num_experts: the bound of k where it is known; looked at, not kept.
    Raises: TypeError or ValueError that names the argument.
    """

    phases: tuple[Phase, ...]
    steps: int | None = None
    num_experts: InitVar[int | None] = None

    def __post_init__(self, num_experts: int | None) -> None:
        if self.steps is not None:
            check_integer("SparsitySchedule", "steps", self.steps, 1)
        phases = tuple(
            _phase(f"phases[{i}]", given, num_experts)
            for i, given in enumerate(_listed("phases", self.phases))
        )
        if not phases:
            raise ValueError("SparsitySchedule: phases must not be empty")
        object.__setattr__(self, "phases", phases)
        ended = -1
        for i, (phase, (begin, end)) in enumerate(zip(phases, self._in_steps(), strict=True)):
            name = f"SparsitySchedule: phases[{i}]"
            if len(phase.top_k) != self.num_layers:
                raise ValueError(
                    f"{name}.top_k must have {self.num_layers} entries, one a layer as in phases[0], "
                    f"found {len(phase.top_k)}"
                )
            if i == 0 and (begin, end) != (0, 0):
                raise ValueError(
                    f"{name} must begin at step 0 without a ramp, found {begin} and ramp_end {end}"
                )
            if i > 0 and begin < ended:
                raise ValueError(f"{name}.begin must be at least step {ended}, found step {begin}")
            if end < begin:
                raise ValueError(f"{name}.ramp_end must not come before step {begin}, found step {end}")
            ended = max(end, begin + 1)

    @property
    def num_layers(self) -> int:
        return len(self.phases[0].top_k)

    def top_k(self, step: int) -> tuple[int, ...]:
        """k of each layer at this step, the first being 0; the last phase does not end.

        Raises: TypeError for a step that is no integer, ValueError for one below 0.
        """
        check_integer("SparsitySchedule.top_k", "step", step, 0)
        now = self.phases[0].top_k
        for phase, (begin, end) in zip(self.phases, self._in_steps(), strict=True):
            if step >= end:
                now = phase.top_k
            elif step >= begin:
                now = tuple(
                    a + (1 if b > a else -1) * (abs(b - a) * (step - begin) // (end - begin))
                    for a, b in zip(now, phase.top_k, strict=True)
                )
        return now

    def to_dict(self) -> dict[str, Any]:
        """{"phases": [{"begin", "top_k", "ramp_end"}, ...], "steps"}, without what is None."""
        phases = [_given({**phase._asdict(), "top_k": list(phase.top_k)}) for phase in self.phases]
        return _given({"phases": phases, "steps": self.steps})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, num_experts: int | None = None) -> Self:
        """Of what `to_dict` gave.  Raises: as the constructor, and ValueError for a key too many or too few."""
        _check_keys("data", data, {"phases"}, {"steps"})
        return cls(data["phases"], data.get("steps"), num_experts)

    @classmethod
    def sigma_moe_tiny(cls, num_layers: int, switch: Point, steps: int | None = None) -> Self:
        """8, 8, 6, 6, 4, 4, 2, 2 experts in the first eight layers and 1 in the others; from `switch` on 1 in all.

        The model has 56 layers of 96 experts.  Its authors publish the kind of schedule and 0.65 B active parameters
        before the switch, 0.5 B after it.  The list is recalled and fits these sizes; when they switched is not known.
        """
        check_integer("SparsitySchedule.sigma_moe_tiny", "num_layers", num_layers, 1)
        early = (8, 8, 6, 6, 4, 4, 2, 2, *[1] * num_layers)[:num_layers]
        return cls((Phase(0, early), Phase(switch, (1,) * num_layers)), steps)

    def _in_steps(self) -> list[tuple[int, int]]:
        """Of each phase its begin and the end of its ramp."""
        return [
            (
                self._step(i, phase.begin),
                self._step(i, phase.begin if phase.ramp_end is None else phase.ramp_end),
            )
            for i, phase in enumerate(self.phases)
        ]

    def _step(self, i: int, point: Point) -> int:
        if isinstance(point, int):
            return point
        if self.steps is None:
            raise ValueError(
                f"SparsitySchedule: steps must be given where phases[{i}] has a share of them, {point}"
            )
        return round(point * self.steps)


def check_integer(op: str, name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer, found {value!r}")
    if value < least or (most is not None and value > most):
        wanted = f"be at least {least}" if most is None else f"lie in {least}..{most}"
        raise ValueError(f"{op}: {name} must {wanted}, found {value}")


def _phase(name: str, given: object, num_experts: int | None) -> Phase:
    if isinstance(given, Mapping):
        _check_keys(name, given, {"begin", "top_k"}, {"ramp_end"})
        given = (given["begin"], given["top_k"], given.get("ramp_end"))
    fields = _listed(name, given)
    if len(fields) not in (2, 3):
        raise ValueError(
            f"SparsitySchedule: {name} must be (begin, top_k) or (begin, top_k, ramp_end), found {given!r}"
        )
    begin, top_k, ramp_end = (*fields, None)[:3]
    _check_point(f"{name}.begin", begin)
    if ramp_end is not None:
        _check_point(f"{name}.ramp_end", ramp_end)
    top_k = _listed(f"{name}.top_k", top_k)
    if not top_k:
        raise ValueError(f"SparsitySchedule: {name}.top_k must not be empty")
    for layer, k in enumerate(top_k):
        check_integer("SparsitySchedule", f"{name}.top_k[{layer}]", k, 1, num_experts)
    return Phase(begin, top_k, ramp_end)


def _listed(name: str, given: object) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"SparsitySchedule: {name} must be a list, found {given!r}")
    return tuple(given)


def _check_point(name: str, point: object) -> None:
    if not isinstance(point, float):
        check_integer("SparsitySchedule", name, point, 0)
    elif not 0 <= point <= 1:
        raise ValueError(
            f"SparsitySchedule: {name} must be a share in 0..1 where it is a float, found {point}"
        )


def _check_keys(name: str, data: Mapping[str, Any], needed: set[str], optional: set[str]) -> None:
    for key in sorted(needed - data.keys()):
        raise ValueError(f"SparsitySchedule: {name} must have the key {key!r}")
    for key in sorted(data.keys() - needed - optional):
        raise ValueError(
            f"SparsitySchedule: {name} must have no key {key!r}; it knows {sorted(needed | optional)}"
        )


def _given(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}
