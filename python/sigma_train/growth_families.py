"""Mixture-of-experts families of transformers whose gates and layers are known here, and their grown config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sigma_train.errors import WrongInput
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = "num_experts_per_tok"
OF_EACH_LAYER = ("layer_types", "mlp_layer_types")


@dataclass(frozen=True)
class Family:
    """How a router's scores become gates.

    Attributes:
        score: of the router.
        is_normalized: of sigmoids, whether gates are divided by their sum; None: as `norm_topk_prob` says.
        dense: which layers have no experts: "listed" by decoder_sparse_step and mlp_only_layers, "first" of them by
            first_k_dense_replace, "none".
        wants: settings that config.json must have, as what transformers takes for them else is each family's own.
    """

    score: Literal["softmax", "sigmoid"]
    is_normalized: bool | None = None
    dense: Literal["none", "listed", "first"] = "none"
    wants: tuple[str, ...] = ()


GATES = ("first_k_dense_replace", "n_group", "norm_topk_prob", "routed_scaling_factor")
FAMILIES = {
    "qwen2_moe": Family("softmax", dense="listed"),
    "qwen3_moe": Family("softmax", dense="listed"),
    "mixtral": Family("softmax"),
    "olmoe": Family("softmax"),
    "flex_olmo": Family("softmax"),
    "deepseek_v2": Family("softmax", dense="first", wants=GATES[:1]),
    "deepseek_v3": Family("sigmoid", dense="first", wants=GATES),
    "glm4_moe": Family("sigmoid", dense="first", wants=GATES),
    "dots1": Family("sigmoid", dense="first", wants=GATES),
    "minimax_m2": Family("sigmoid", is_normalized=True),
}


def family_of(settings: Mapping[str, Any]) -> Family:
    """Raises: WrongInput for a model that is not known, or of which something is not said."""
    name = settings.get("model_type")
    found = FAMILIES.get(name) if isinstance(name, str) else None
    if found is None:
        raise WrongInput(
            f"config.json: model_type must be one of {', '.join(FAMILIES)}, whose gates are known here, "
            f"found {name!r}"
        )
    for key in found.wants:
        if settings.get(key) is None:
            raise WrongInput(f"config.json: {key} must be given for a {name}, found none")
    if settings.get("quantization_config"):
        raise WrongInput(
            "config.json: quantization_config: weights must be floating-point numbers, not quantised"
        )
    return found


def num_experts(settings: Mapping[str, Any]) -> int:
    return _integer(settings, next(iter(_named_experts(settings)), EXPERTS[0]), least=1)


def _named_experts(settings: Mapping[str, Any]) -> list[str]:
    """Under which keys their number stands; null is what transformers writes for none."""
    return [key for key in EXPERTS if settings.get(key) is not None]


def top_k(settings: Mapping[str, Any]) -> int:
    return _integer(settings, TOP_K, least=1)


def num_layers(settings: Mapping[str, Any]) -> int:
    return _integer(settings, "num_hidden_layers", least=1)


def grown_settings(settings: Mapping[str, Any], growth: Growth) -> dict[str, Any]:
    """config.json of the grown model.  Raises: WrongInput for settings that it can't have."""
    family, grown = family_of(settings), dict(settings)
    _grow_layers(grown, growth.layers, family)
    if growth.experts > 1:
        _grow_experts(grown, growth, family)
    return grown


def _grow_layers(settings: dict[str, Any], plan: LayerGrowthPlan, family: Family) -> None:
    n = num_layers(settings)
    if n != plan.num_layers:
        raise WrongInput(f"growth: the plan is of {plan.num_layers} layers, config.json has {n}")
    if tuple(range(n)) == plan.sources:
        return
    for key in OF_EACH_LAYER:
        if (of_each := settings.get(key)) is not None:
            settings[key] = [_of_layers(key, of_each, n)[source] for source in plan.sources]
    if settings.get("use_sliding_window") and settings.get("layer_types") is None:
        raise WrongInput("config.json: layer_types must say which layers have use_sliding_window, found none")
    if settings.get("moe_layer_freq", 1) != 1:
        raise WrongInput(f"config.json: moe_layer_freq must be 1, found {settings['moe_layer_freq']!r}")
    settings["num_hidden_layers"] = len(plan.sources)
    if family.dense == "listed":
        dense = _dense_layers(settings, n)
        settings["decoder_sparse_step"] = 1
        settings["mlp_only_layers"] = [j for j, source in enumerate(plan.sources) if source in dense]
    if family.dense == "first":
        first = _integer(settings, "first_k_dense_replace")
        is_dense = [source < first for source in plan.sources]
        if is_dense != sorted(is_dense, reverse=True):
            raise WrongInput(
                f"growth: config.json can only say that the first layers are dense; skip_first must be at least "
                f"{first}, or the plan an interposition"
            )
        settings["first_k_dense_replace"] = sum(is_dense)


def _dense_layers(settings: Mapping[str, Any], n: int) -> list[int]:
    """As Qwen's model has them."""
    step, only = _integer(settings, "decoder_sparse_step", 1, least=1), settings.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise WrongInput(f"config.json: mlp_only_layers must be a list of layers, found {only!r}")
    return [i for i in range(n) if i in only or (i + 1) % step]


def _grow_experts(settings: dict[str, Any], growth: Growth, family: Family) -> None:
    f = growth.experts
    for key in _named_experts(settings):
        settings[key] = _integer(settings, key, least=1) * f
    settings[TOP_K] = top_k(settings) * f
    if (groups := settings.get("n_group") or 1) > 1:
        # The groups are neighbours: appended copies make as many new ones, each a copy of one.
        if growth.interleave:
            raise WrongInput(
                f"growth: interleave would put an expert's copies into one of n_group = {groups} groups, by whose "
                "best experts groups are chosen"
            )
        settings["n_group"], settings["topk_group"] = groups * f, _integer(settings, "topk_group") * f
    if family.score == "sigmoid" and not (family.is_normalized or settings["norm_topk_prob"]):
        settings["routed_scaling_factor"] = _number(settings, "routed_scaling_factor") / f


def _integer(settings: Mapping[str, Any], key: str, default: int | None = None, least: int = 0) -> int:
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise WrongInput(f"config.json: {key} must be an integer of at least {least}, found {value!r}")
    return value


def _number(settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise WrongInput(f"config.json: {key} must be a number, found {value!r}")
    return value


def _of_layers(key: str, value: Any, n: int) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) != n:
        raise WrongInput(f"config.json: {key} must have one entry for each of {n} layers, found {value!r}")
    return value
