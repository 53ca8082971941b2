"""What a tensor of a mixture-of-experts checkpoint is, told by its name: ours, and those of transformers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

LAYER = re.compile(r"((?:.*\.)?layers\.)(\d+)\.(.+)")
ALL_EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")
ONE_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\.(gate_proj|up_proj|down_proj|w1|w2|w3)\..+)")
ROUTER = re.compile(r".*(mlp|moe)\.(router|gate)\.weight")
BALANCE_BIAS = re.compile(r".*\.(expert_bias|e_score_correction_bias)")
OUTPUT = re.compile(r".*\b(o_proj|out_proj|down_proj|w2)(\.weight|\.bias)?")
MATRICES = {"w1": "gate", "w3": "up", "w2": "down"}  # Mixtral's; others end in _proj


class Kind(Enum):
    """Of a tensor, by what becomes of it as experts are added."""

    ALL_EXPERTS = "experts of a layer, one a row"
    ONE_EXPERT = "a matrix of one expert"
    ROUTER = "a row for each expert, learned"
    BALANCE_BIAS = "a number for each expert, not learned"
    OTHER = "nothing of experts"


@dataclass(frozen=True)
class Name:
    """A name in parts.

    Attributes:
        before, layer, after: the name is before + str(layer) + "." + after; layer is None outside of layers.
        expert: of ONE_EXPERT its number.
        matrix: gate, up, gate_up (gate, then up), down or router; "" for what is none of experts.
        is_output: what it makes is added to the residual stream, alone or through a norm.
    """

    before: str
    layer: int | None
    after: str
    kind: Kind
    expert: int = 0
    matrix: str = ""
    is_output: bool = False

    @property
    def is_weight(self) -> bool:
        """No scale of a quantised matrix, and no bias."""
        return self.after.endswith((".weight", "_proj"))

    def at(self, layer: int | None, expert: int = 0) -> str:
        """The name of the same tensor of another layer, and of another expert where it is of one."""
        after = self.after
        if self.kind is Kind.ONE_EXPERT:
            after = ONE_EXPERT.sub(lambda m: f"{m[1]}{expert}{m[3]}", after)
        return after if layer is None else f"{self.before}{layer}.{after}"


def parse(name: str) -> Name:
    if not (found := LAYER.fullmatch(name)):
        return Name("", None, name, Kind.OTHER)
    before, layer, after = found[1], int(found[2]), found[3]
    kind, expert, matrix = Kind.OTHER, 0, ""
    if m := ALL_EXPERTS.fullmatch(after):
        kind, matrix = Kind.ALL_EXPERTS, m[1]
    elif m := ONE_EXPERT.fullmatch(after):
        kind, expert, matrix = Kind.ONE_EXPERT, int(m[2]), MATRICES.get(m[4], m[4])
    elif ROUTER.fullmatch(after):
        kind, matrix = Kind.ROUTER, "router"
    elif BALANCE_BIAS.fullmatch(after):
        kind = Kind.BALANCE_BIAS
    return Name(
        before, layer, after, kind, expert, matrix.removesuffix("_proj"), bool(OUTPUT.fullmatch(after))
    )


def unknown_experts(names: Iterable[str]) -> list[str]:
    """Names that speak of experts and are of no kind known here."""
    return [name for name in names if ".experts." in name and parse(name).kind is Kind.OTHER]
