"""The settings of a grown run of ours: what of [model], [router] and [sparsity] its weights ask for."""

from typing import Any

from sigma_train.config import Config, ConfigError
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth


def grown_config(config: Config, growth: Growth) -> Config:
    """E and every k times `growth.experts`, lists of layers by the plan, a budget of draws with both.

    Gates that a softmax makes fall to 1/f by themselves, and so do those that are divided by their sum.  What is
    neither is divided by f in `router.output_scale`.
    Raises: ConfigError where layers of one expert, whose gate is not divided by itself, stand beside others whose are.
    """
    f = growth.experts
    settings = config.model_dump()
    model, router, sparsity = settings["model"], settings["router"], settings["sparsity"]
    if f > 1:
        _grow_router(config, router, f)
        model["num_experts"] *= f
    model["num_layers"] = len(growth.layers.sources)
    top_k = config.model.top_k
    model["top_k"] = _grown(top_k, growth.layers, f) if isinstance(top_k, tuple) else top_k * f
    sparsity["phases"] = [
        [begin, _grown(top_k, growth.layers, f), *end] for begin, top_k, *end in config.sparsity.phases
    ]
    sparsity["sample"] = [k * f for k in config.sparsity.sample]
    if config.sparsity.budget is not None:
        sparsity["budget"] = config.sparsity.budget * f * model["num_layers"] // config.model.num_layers
    return Config.from_dict(settings)


def _grown(top_k: tuple[int, ...], plan: LayerGrowthPlan, f: int) -> list[int]:
    return [top_k[source] * f for source in plan.sources]


def _grow_router(config: Config, router: dict[str, Any], f: int) -> None:
    if config.model.num_experts == 1:
        raise ConfigError("growth: model.num_experts is 1, a dense model has no experts to grow")
    s = config.sparsity
    numbers = {k for phase in s.phases for k in phase[1]} | set(s.sample) or set(config.model.layer_top_k)
    leaves_one = 1 in numbers and not config.router.normalize_one  # as it is, where others are divided
    if config.router.normalize and leaves_one and len(numbers) > 1:
        raise ConfigError(
            "growth: with router.normalize = true a layer's one expert keeps its gate and several share 1, "
            f"which {f} times as many cannot; found {sorted(numbers)} experts a token"
        )
    router["normalize"] = config.router.normalize and not leaves_one
    if config.router.score == "sigmoid" and not router["normalize"]:
        router["output_scale"] /= f
