"""What a tensor of a mixture-of-experts checkpoint is, told by its name: ours, and those of transformers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

# Towers that see, hear or speak have layers of their own, which stay as they are.
LAYER = re.compile(
    r"((?!(?:.*\.)?(?:vision|visual|audio|sam_model|qwen2_model))(?:.*\.)?layers\.)(\d+)\.(.+)"
)
ALL_EXPERTS = re.compile(
    r"(?:.*\.)?(?:experts\.(gate_up_proj|up_proj|down_proj|fc1|fc2)|moe\.(gate_proj|up_proj|down_proj)"
    r"|block_sparse_moe\.(input_linear|output_linear))(?:_bias|\.weight)?"
)
ONE_EXPERT = re.compile(r"((?:.*\.)?experts\.)(\d+)(\.(gate_proj|up_proj|down_proj|w1|w2|w3)\..+)")
ROUTER = re.compile(
    r"(?:.*\.)?(?:mlp|moe|block_sparse_moe|feed_forward|mixer)\.(?:router|gate)(?:\.(?:gate|layer|wg))?\.(?:weight|bias)"
    r"|gate\.weight|router\.(?:proj\.weight|per_expert_scale)"
)
BALANCE_BIAS = re.compile(r".*\.(expert_bias|e_score_correction_bias|router_bias)")
OUTPUT = re.compile(
    r".*\b(o_proj|out_proj|down_proj|w2|experts\.fc2|output_linear|fc2_latent_proj|attention\.dense)"
    r"(\.weight|\.bias|_bias)?"
)
MATRICES = {  # others end in _proj
    "w1": "gate", "w3": "up", "w2": "down",  # Mixtral's
    "fc1": "gate_up", "fc2": "down",  # Aria's
    "input_linear": "gate_up", "output_linear": "down",  # Granite's
}  # fmt: skip


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

    @property
    def is_beyond(self) -> bool:
        """Of a layer for the tokens after the next that has a count of its own, as Qwen's `mtp.layers`."""
        return self.before.startswith("mtp.")

    def at(self, layer: int | None, expert: int = 0) -> str:
        """The name of the same tensor of another layer, and of another expert where it is of one."""
        after = self.after
        if self.kind is Kind.ONE_EXPERT:
            after = ONE_EXPERT.sub(lambda m: f"{m[1]}{expert}{m[3]}", after)
        return after if layer is None else f"{self.before}{layer}.{after}"


def parse(name: str) -> Name:
    if not (parts := LAYER.fullmatch(name)):
        return Name("", None, name, Kind.OTHER)
    before, layer, after = parts[1], int(parts[2]), parts[3]
    kind, expert, matrix = Kind.OTHER, 0, ""
    if m := ALL_EXPERTS.fullmatch(after):
        found = m[m.lastindex or 0]
        kind, matrix = Kind.ALL_EXPERTS, MATRICES.get(found, found)
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
    """Names of layers that speak of experts and are of no kind known here; a norm is one for all experts."""
    return [
        name
        for name in names
        if ".experts." in name and not name.endswith("_norm.weight") and _is_other(name)
    ]


def _is_other(name: str) -> bool:
    found = parse(name)
    return found.layer is not None and found.kind is Kind.OTHER
