"""What a tensor of a mixture-of-experts checkpoint is, told by its name: ours, and those of transformers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

# Towers that see, hear or speak have layers of their own, which stay as they are.
LAYER = re.compile(
    r"((?!(?:.*\.)?(?:vision|visual|audio|sam_model|qwen2_model|perception|ctc_timestamp|talker|code2wav))"
    r"(?:.*\.)?(?:layers|transformer\.blocks)\.)(\d+)\.(.+)"
)
ALL_EXPERTS = re.compile(
    r"(?:.*\.)?(?:experts\.(gate_up_proj|up_proj|down_proj|fc1|fc2)|moe\.(gate_proj|up_proj|down_proj)"
    r"|(?:block_sparse_moe|mlp|self_attention\.experts)\.(input_linear|output_linear))(?:_bias|\.weight)?"
    r"|(?:.*\.)?experts\.(?:(w13|w2)_weight|mlp\.(w1|v1|w2))|mlp\.((?:down|up)_embed)\.weight"
)
STACKED = re.compile(r".*\.experts\.mlp\.(?:w1|v1|w2)")
ONE_EXPERT = re.compile(r"((?:.*\.)?experts\.)(\d+)(\.(gate_proj|up_proj|down_proj|w1|w2|w3)\..+)")
ROUTER = re.compile(
    r"(?:.*\.)?(?:mlp|moe|block_sparse_moe|feed_forward|mixer|ffn|self_attention\.experts)\.(?:router|gate)"
    r"(?:\.(?:gate|layer|wg))?\.(?:weight|bias)|gate\.weight|router\.(?:proj\.weight|per_expert_scale)"
)
BALANCE_BIAS = re.compile(r".*\.(expert_bias|e_score_correction_bias|router_bias)")
OUTPUT = re.compile(
    r".*\b(o_proj|out_proj|down_proj|w2|experts\.fc2|output_linear|fc2_latent_proj|attention\.(?:dense|wo)|wo_ud|w2_md)"
    r"(\.weight|\.bias|_bias)?|.*\b(?:shared_)?w2_weight|(?:mlp|self_attention\.experts)\.bias"
)
MATRICES = {  # others end in _proj
    "w1": "gate", "w3": "up", "v1": "up", "w2": "down", "w13": "gate_up",  # Mixtral's, DBRX', Inkling's
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
        is_stacked: experts of a layer are blocks of rows of one matrix.
    """

    before: str
    layer: int | None
    after: str
    kind: Kind
    expert: int = 0
    matrix: str = ""
    is_output: bool = False
    is_stacked: bool = False

    @property
    def is_weight(self) -> bool:
        """No scale of a quantised matrix, and no bias."""
        return self.is_stacked or self.after.endswith((".weight", "_proj"))

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
    matrix = matrix.removesuffix("_proj")
    if matrix and after.startswith("self_attention."):  # JetMoE's, beside those of its MLP
        matrix = f"attention {matrix}"
    is_output, is_stacked = (bool(form.fullmatch(after)) for form in (OUTPUT, STACKED))
    return Name(before, layer, after, kind, expert, matrix, is_output, is_stacked)


def unknown_experts(names: Iterable[str]) -> list[str]:
    """Names of layers that speak of experts and are of no kind known here.

    A norm is one for all experts, and so is what JetMoE adds to their sum.
    """
    of_all = ("_norm.weight", "self_attention.experts.bias")
    return [name for name in names if ".experts." in name and not name.endswith(of_all) and _is_other(name)]


def _is_other(name: str) -> bool:
    found = parse(name)
    return found.layer is not None and found.kind is Kind.OTHER
