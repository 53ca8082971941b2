"""config.json of a mixture of experts of transformers: what it says, and what it says of the grown model."""

from collections.abc import Mapping, Sequence
from typing import Any

from sigma_train.errors import WrongInput
from sigma_train.growth_families import FAMILIES, REFUSED, Family
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth

Settings = dict[str, Any]
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
NORMALIZED = ("norm_topk_prob", "moe_renormalize")
GROUPS = ("n_group", "num_expert_group")
ALSO = {  # other names of what a family wants
    "norm_topk_prob": NORMALIZED, "n_group": GROUPS,
    "layers_block_type": ("layers_block_type", "hybrid_override_pattern"),
    "indexer_types": ("indexer_types", "index_topk_pattern"),
}  # fmt: skip
OF_EACH_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "no_rope_layers", "layer_rope_theta",
    "num_attention_heads_per_layer", "swiglu_limits", "swiglu_limits_shared", "hybrid_override_pattern",
    "index_topk_pattern",
)  # fmt: skip
# With another value some layers are told from others by their number alone.
OF_NO_LAYER = {
    "moe_layer_freq": 1, "moe_layer_interval": 1, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
}  # fmt: skip

# With another value a copy would not have its share of what its expert had.
OF_NO_COPY = {"moe_normalize_expert_weights": 1}


def family_of(settings: Mapping[str, Any]) -> Family:
    """Raises: WrongInput for a model that is not known, or of which something is not said."""
    name = settings.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise WrongInput(f"config.json: {_refused(name)}")
    found = FAMILIES[name]
    model = _language_model(settings, found)
    for key in found.wants:
        if not _named(model, ALSO.get(key, (key,))):
            raise WrongInput(f"config.json: {key} must be given for a {name}, found none")
    _score(model, found)
    if settings.get("quantization_config") or model.get("quantization_config"):
        raise WrongInput(
            "config.json: quantization_config: weights must be floating-point numbers, not quantised"
        )
    return found


def _refused(name: Any) -> str:
    if isinstance(name, str) and name in REFUSED:
        return f"{name} can't grow: {REFUSED[name]}"
    return (
        f"model_type must be one of the {len(FAMILIES)} families whose gates are known here (docs/grow.md), "
        f"found {name!r}"
    )


def _language_model(settings: Mapping[str, Any], family: Family) -> Settings:
    model = dict(settings)
    for key in filter(None, family.inside.split(".")):
        model = _inside(model, key)
    return model


def _inside(settings: Mapping[str, Any], key: str) -> Settings:
    found = settings.get(key)
    if not isinstance(found, Mapping):
        raise WrongInput(f"config.json: {key} must hold settings, found {found!r}")
    return dict(found)


def num_experts(settings: Mapping[str, Any]) -> int:
    return _count(_counts(settings), EXPERTS)


def top_k(settings: Mapping[str, Any]) -> int:
    return _count(_counts(settings), TOP_K)


def _counts(settings: Mapping[str, Any]) -> Settings:
    """Where the numbers of experts stand."""
    family = family_of(settings)
    model = _language_model(settings, family)
    return _inside(model, family.counts) if family.counts else model


def num_layers(settings: Mapping[str, Any]) -> int:
    family = family_of(settings)
    return _num_layers(_language_model(settings, family), family)


def _num_layers(model: Mapping[str, Any], family: Family) -> int:
    if model.get(family.layers) is None and isinstance(blocks := model.get("layers_block_type"), list):
        return len(blocks)
    return _integer(model, family.layers, least=1)


def what_gates_ask(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a Growth: what of it the family decides."""
    family = family_of(settings)
    model = _language_model(settings, family)
    return {
        "score": _score(model, family),
        "alternates": family.alternates,
        "divides_outputs": not family.scale and _is_summed(model, family),
    }


def _score(model: Mapping[str, Any], family: Family) -> str:
    score = model.get(family.score, family.score)
    if score not in ("softmax", "sigmoid"):
        raise WrongInput(f"config.json: {family.score} must be softmax or sigmoid, found {score!r}")
    return score


def _is_summed(model: Mapping[str, Any], family: Family) -> bool:
    """Whether a layer's output would be f times as large with f times as many experts chosen."""
    normalized = family.is_normalized
    if normalized is None:
        normalized = any(model[key] for key in _named(model, NORMALIZED))
    return _score(model, family) == "sigmoid" and not normalized


def grown_settings(settings: Mapping[str, Any], growth: Growth) -> Settings:
    """config.json of the grown model.  Raises: WrongInput for settings that it can't have."""
    family = family_of(settings)
    model = _language_model(settings, family)
    name = settings["model_type"]
    if growth.layers.sources != tuple(range(_num_layers(model, family))):
        _keep_first(settings, growth.layers, family)
        _grow_layers(model, growth, family, name)
    if growth.experts > 1 and family.no_experts:
        raise WrongInput(f"growth: {name} can't have more experts: {family.no_experts}")
    if growth.experts > 1 and family.counts:
        counts = _inside(model, family.counts)
        _grow_experts(counts, growth, family)
        model[family.counts] = counts
    elif growth.experts > 1:
        _grow_experts(model, growth, family)
    return _with(settings, family.inside, model) if family.inside else model


def _with(settings: Mapping[str, Any], inside: str, model: Settings) -> Settings:
    key, _, rest = inside.partition(".")
    return {**settings, key: _with(settings[key], rest, model) if rest else model}


def _keep_first(settings: Mapping[str, Any], plan: LayerGrowthPlan, family: Family) -> None:
    """Raises: WrongInput if the plan copies or moves layers that must be where they are."""
    if not family.skip_first:
        return
    n = family.first
    if isinstance(n, str):
        n = len(_listed(n, _inside(settings, "vision_config").get(n)))
    if any(plan.targets(i) != [i] for i in range(n)):
        raise WrongInput(f"growth: skip_first must be at least {n}: {family.skip_first}")


def _grow_layers(model: Settings, growth: Growth, family: Family, name: str) -> None:
    plan, n = growth.layers, _num_layers(model, family)
    if n != plan.num_layers:
        raise WrongInput(f"growth: the plan is of {plan.num_layers} layers, config.json has {n}")
    if family.no_copies:
        raise WrongInput(f"growth: layers of a {name} can't be copied: {family.no_copies}")
    if growth.zero_outputs and (why := family.no_zeros or _shares(model)):
        raise WrongInput(f"growth: zero_outputs would not keep what a {name} computes: {why}")
    for key, value in OF_NO_LAYER.items():
        if model.get(key) not in (None, value):
            raise WrongInput(f"config.json: {key} must be {value} to copy layers, found {model[key]!r}")
    for key in family.lists:
        if not any(model.get(other) for other in ALSO.get(key, (key,))):
            model[key] = rule.made(model, n) if (rule := family.rules.get(key)) else None
        if not any(model.get(other) for other in ALSO.get(key, (key,))):
            raise WrongInput(
                f"config.json: {key} must say of each layer what it is, found none; save_pretrained writes it"
            )
    if model.get("use_sliding_window") and model.get("layer_types") is None:
        raise WrongInput("config.json: layer_types must say which layers have use_sliding_window, found none")
    for key in OF_EACH_LAYER:
        if model.get(key):
            model[key] = _planned(key, model[key], plan, model.get("num_nextn_predict_layers") or 0)
    _grow_numbers(model, plan, family)
    if by_number := model.get("per_layer_config"):
        made = {j: by_number.get(str(source)) for j, source in enumerate(plan.sources)}
        model["per_layer_config"] = {str(j): own for j, own in made.items() if own is not None}
    model.pop("num_hidden_layers", None)  # a family that counts by another name counts otherwise, too
    model[family.layers] = len(plan.sources)
    if family.dense and model.get("mlp_layer_types") is None:
        _grow_dense(model, family.dense, plan)


def _grow_numbers(model: Settings, plan: LayerGrowthPlan, family: Family) -> None:
    """What names layers by their numbers, or tells them by these."""
    for period, offset in family.periods:
        every, which = _integer(model, period, least=1), _integer(model, offset)
        if any(
            ((j - which) % every == 0) != ((of - which) % every == 0) for j, of in enumerate(plan.sources)
        ):
            raise WrongInput(
                f"growth: {period} = {every} must tell copies of layers as it tells these; a stack of a multiple "
                "of it does"
            )
    if (named := model.get("kv_source_layers")) is not None:
        if named != list(range(plan.num_layers)):
            raise WrongInput(
                f"config.json: kv_source_layers must name each layer itself to copy layers, found {named!r}"
            )
        model["kv_source_layers"] = list(range(len(plan.sources)))
    if named := model.get("ple_layer_ids"):
        places = [plan.targets(number - 1) for number in _listed("ple_layer_ids", named)]
        if any(len(of_one) > 1 for of_one in places):
            raise WrongInput(f"growth: layers of ple_layer_ids can't be copied, found {named!r}")
        model["ple_layer_ids"] = [place + 1 for (place,) in places]


def _shares(model: Mapping[str, Any]) -> str:
    told = {*(model.get("indexer_types") or ()), *(model.get("index_topk_pattern") or ())}
    shares = {"shared", "S"} & told
    return "some layers attend where the last one did that chose" if shares else ""


def _planned(key: str, value: Any, plan: LayerGrowthPlan, beyond: int) -> Sequence[Any]:
    """Entries beyond the model's layers, for tokens after the next, stay.  An entry may be a letter."""
    n = plan.num_layers
    if not isinstance(value, list | str) or len(value) not in (n, n + beyond):
        raise WrongInput(f"config.json: {key} must have one entry for each of {n} layers, found {value!r}")
    grown = [*(value[source] for source in plan.sources), *value[n:]]
    return "".join(grown) if isinstance(value, str) else grown


def _grow_dense(model: Settings, key: str, plan: LayerGrowthPlan) -> None:
    dense = _dense_layers(model, key, plan.num_layers)
    is_dense = [source in dense for source in plan.sources]
    if key == "mlp_only_layers":
        model |= {"decoder_sparse_step": 1, key: [j for j, it_is in enumerate(is_dense) if it_is]}
    elif key == "moe_layers":
        model[key] = [j for j, it_is in enumerate(is_dense) if not it_is]
    elif is_dense != sorted(is_dense, reverse=True):
        raise WrongInput(
            "growth: config.json can only say that the first layers are dense; skip_first must be at least "
            f"{len(dense)}, or the plan an interposition"
        )
    else:
        model[key] = sum(is_dense)
        if (last := model.get("moe_layer_end_index", -1)) not in (-1, plan.num_layers - 1):
            raise WrongInput(
                f"config.json: moe_layer_end_index must be the last layer to copy, found {last!r}"
            )
        if last != -1:
            model["moe_layer_end_index"] = len(plan.sources) - 1


def _dense_layers(model: Mapping[str, Any], key: str, n: int) -> set[int]:
    """As the family's model has them."""
    listed = model.get(key)
    if key == "mlp_only_layers":
        step = _integer(model, "decoder_sparse_step", 1, least=1)
        return {i for i in range(n) if i in _listed(key, listed or []) or (i + 1) % step}
    if key == "moe_layers":
        step = _integer(model, "interleave_moe_layer_step", 1, least=1)
        return set(range(n)) - set(range(step - 1, n, step) if listed is None else _listed(key, listed))
    return set(range(_integer(model, key)))


def _listed(key: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(layer, int) for layer in value):
        raise WrongInput(f"config.json: {key} must be a list of layers, found {value!r}")
    return value


def _grow_experts(model: Settings, growth: Growth, family: Family) -> None:
    f = growth.experts
    for key, value in OF_NO_COPY.items():
        if model.get(key) not in (None, value):
            raise WrongInput(f"config.json: {key} must be {value} to copy experts, found {model[key]!r}")
    for names in (EXPERTS, TOP_K):
        _count(model, names)
        for key in _named(model, (*names, *family.follows) if names == TOP_K else names):
            model[key] = _integer(model, key, least=1) * f
    for key in _named(model, GROUPS):
        if (groups := _integer(model, key, least=1)) > 1:
            # The groups are neighbours: appended copies make as many new ones, each a copy of one.
            if growth.interleave:
                raise WrongInput(
                    f"growth: interleave would put an expert's copies into one of {key} = {groups} groups, by whose "
                    "best experts groups are chosen"
                )
            model[key], model["topk_group"] = groups * f, _integer(model, "topk_group") * f
    if family.scale and _is_summed(model, family):
        model[family.scale] = _number(model, family.scale) / f


def _named(model: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Under which of the names something stands; null is what transformers writes for none."""
    return [key for key in names if model.get(key) is not None]


def _count(model: Mapping[str, Any], names: Sequence[str]) -> int:
    return _integer(model, next(iter(_named(model, names)), names[0]), least=1)


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
