"""Mixture-of-experts families of transformers: what config.json does not say of each, and those that can't grow.

A family is data.  What is made of it is in growth_settings.py (config.json) and growth_pieces.py (tensors).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sigma_train.growth_lists import Every, First


@dataclass(frozen=True)
class Family:
    """How a router's scores become gates, and what becomes of layers.

    Attributes:
        score: of the router, "softmax" or "sigmoid"; else the setting that has one of them.
        is_normalized: of sigmoids, whether gates are divided by their sum; None: as `norm_topk_prob` says.
        scale: of sigmoids that are not, the setting that gates are multiplied by; "": there is none.
        dense: the setting that says which layers have no experts: "mlp_only_layers" and "moe_layers" name layers, any
            other counts the first; "": none, or as `mlp_layer_types` has them.
        lists: have an entry for each layer, and must be there before layers are copied, as what transformers takes
            for them else depends on a layer's number.
        rules: of lists, by which transformers makes those that are not there.
        periods: pairs of settings, a period and which layer of each period is another than the rest.
        wants: must be there, as what transformers takes for them else is each family's own.
        inside: the setting that holds the language model's, where others see or hear; with a point, one within another.
        layers: the setting that counts layers.
        counts: the setting that holds the numbers of experts, where they are not among the others.
        follows: what else is f times as large where f times as many experts are chosen.
        alternates: columns of fused gate and up take turns.
        no_experts: why experts can't be added.
        no_copies: why layers can't be copied.
        skip_first: why the first layers can't.
        first: how many these are; else the setting of what sees that has an entry for each.
        no_zeros: why a copied layer with outputs of zero would not be nothing.
    """

    score: str
    is_normalized: bool | None = None
    scale: str = "routed_scaling_factor"
    dense: str = ""
    lists: tuple[str, ...] = ()
    rules: Mapping[str, Every | First] = field(default_factory=dict)
    periods: tuple[tuple[str, str], ...] = ()
    wants: tuple[str, ...] = ()
    inside: str = ""
    layers: str = "num_hidden_layers"
    counts: str = ""
    follows: tuple[str, ...] = ()
    alternates: bool = False
    no_experts: str = ""
    no_copies: str = ""
    skip_first: str = ""
    first: int | str = 1
    no_zeros: str = ""


ATTENTION, MLP, INDEXERS, TEXT = "layer_types", "mlp_layer_types", "indexer_types", "text_config"
FIRST, NAMED = "first_k_dense_replace", "mlp_only_layers"
SLIDING = {ATTENTION: Every("", 2, "sliding_attention", "full_attention")}
ALTERNATE = {ATTENTION: Every("full_attention_interval", 4, "linear_attention", "full_attention")}
ONE_DENSE = {MLP: First("", 1, "dense", "sparse")}
NO_ROPE = {"no_rope_layers": Every("no_rope_layer_interval", 4, 1, 0)}
INDEXED = {INDEXERS: Every("index_topk_freq", 1, "shared", "full", shift=-1, unless="index_skip_topk_offset")}
STREAMS = "its layers mix several residual streams"

SOFTMAX = Family("softmax")
SIGMOID = Family("sigmoid", is_normalized=True)
SCALED = Family("sigmoid", wants=("n_group", "norm_topk_prob"))
DEEPSEEK = replace(SCALED, dense=FIRST)
LLAMA4 = Family(
    "sigmoid", is_normalized=False, scale="", dense="moe_layers", lists=("no_rope_layers",), rules=NO_ROPE
)
GEMMA4 = Family(
    "softmax",
    lists=(ATTENTION,),
    wants=("hidden_size_per_layer_input",),
    no_zeros="its layers scale the residual stream",
)

FAMILIES = {
    "afmoe": replace(
        SIGMOID,
        dense="num_dense_layers",
        lists=(ATTENTION,),
        rules={ATTENTION: Every("global_attn_every_n_layers", 4, "sliding_attention", "full_attention")},
    ),
    "aria": replace(SOFTMAX, inside=TEXT),
    "aria_text": SOFTMAX,
    "axk1": DEEPSEEK,
    "axk2": replace(DEEPSEEK, wants=("norm_topk_prob",)),
    "bailing_hybrid": replace(
        DEEPSEEK,
        lists=(ATTENTION,),
        rules={ATTENTION: Every("layer_group_size", 6, "linear_attention", "full_attention")},
    ),
    "beam": replace(SCALED, no_copies="what its layers add is divided by their number"),
    "cohere2_moe": Family(
        "expert_selection_fn",
        scale="",
        lists=(ATTENTION, MLP),
        wants=("expert_selection_fn", "norm_topk_prob"),
    ),
    "dbrx": replace(SOFTMAX, layers="n_layers", counts="ffn_config"),
    "deepseek_ocr2": replace(SOFTMAX, lists=(MLP,), inside=TEXT),
    "deepseek_v2": replace(SOFTMAX, dense=FIRST, wants=(FIRST,)),
    "deepseek_v3": replace(DEEPSEEK, wants=(FIRST, *DEEPSEEK.wants)),
    "deepseek_v32": DEEPSEEK,
    "deepseek_v4": replace(
        SOFTMAX,
        lists=(ATTENTION, MLP),
        no_experts="its first layers look up in a table which experts a token goes to",
        no_zeros=STREAMS,
    ),
    "diffusion_gemma": replace(GEMMA4, wants=(), inside=TEXT),
    "doge": replace(
        SOFTMAX,
        no_experts="they are pairs of keys, of which each is chosen alone",
        no_zeros="its layers scale the residual stream",
    ),
    "dots1": replace(DEEPSEEK, wants=(FIRST, *DEEPSEEK.wants)),
    "dots3_note": replace(SCALED, lists=(ATTENTION, MLP), inside=TEXT),
    "ernie4_5_moe": replace(SOFTMAX, dense="moe_layer_start_index"),
    "ernie4_5_vl_moe": replace(
        SOFTMAX,
        lists=(MLP,),
        inside=TEXT,
        no_experts="those of text and of images are one list in its files",
    ),
    "exaone_moe": replace(DEEPSEEK, lists=(ATTENTION,)),
    "flex_olmo": SOFTMAX,
    "flint": Family(
        "sigmoid", scale="", dense=NAMED, lists=(ATTENTION,), wants=("norm_topk_prob", "mlp_only_layers")
    ),
    "gemma4": replace(GEMMA4, inside=TEXT),
    "gemma4_text": GEMMA4,
    "glm4_moe": replace(DEEPSEEK, wants=(FIRST, *DEEPSEEK.wants)),
    "glm4_moe_lite": replace(SCALED, lists=(MLP,), rules=ONE_DENSE),
    "glm4v_moe": replace(DEEPSEEK, inside=TEXT),
    "glm5_next": replace(SCALED, lists=(ATTENTION, MLP, INDEXERS), inside=TEXT, no_zeros=STREAMS),
    "glm_moe_dsa": replace(DEEPSEEK, lists=(INDEXERS,), rules=INDEXED),
    "gpt_oss": replace(SOFTMAX, lists=(ATTENTION,), rules=SLIDING, alternates=True),
    "granitemoe": SOFTMAX,
    "granitemoe_swa": replace(
        SOFTMAX,
        lists=(ATTENTION,),
        rules={ATTENTION: Every("", 4, "sliding_attention", "full_attention", shift=0)},
    ),
    "granitemoehybrid": SOFTMAX,
    "granitemoeshared": SOFTMAX,
    "hunyuan_v1_moe": SOFTMAX,
    "hy_v3": replace(SIGMOID, lists=(MLP,), rules=ONE_DENSE),
    "hy_v4": replace(SCALED, lists=(MLP, INDEXERS)),
    "inkling_mm_model": replace(
        SIGMOID,
        lists=(ATTENTION, MLP),
        inside=TEXT,
        no_experts="gates of the shared experts are divided by one sum with those of the chosen",
    ),
    "jamba": replace(
        SOFTMAX,
        periods=(
            ("attn_layer_period", "attn_layer_offset"),
            ("expert_layer_period", "expert_layer_offset"),
        ),
    ),
    "jetmoe": replace(SOFTMAX, follows=("num_attention_heads",)),
    "kimi_linear": replace(SCALED, lists=(ATTENTION, MLP)),
    "kolibri1": Family(
        "sigmoid",
        scale="",
        lists=(ATTENTION,),
        rules={ATTENTION: Every("", 5, "sliding_attention", "full_attention")},
        wants=("norm_topk_prob",),
    ),
    "laguna": replace(SIGMOID, lists=(MLP,), rules=ONE_DENSE),
    "lfm2_moe": Family("sigmoid", dense="num_dense_layers", lists=(ATTENTION,), wants=("norm_topk_prob",)),
    "llama4": replace(LLAMA4, inside=TEXT),
    "llama4_text": LLAMA4,
    "longcat_flash": replace(
        SOFTMAX,
        layers="num_layers",
        no_experts="some of them compute nothing and have no weights",
        no_zeros="experts without weights hand on what they get",
    ),
    "mellum": SOFTMAX,
    "mimo_v2_flash": replace(SCALED, lists=(ATTENTION, MLP)),
    "minimax": replace(SOFTMAX, no_copies="its linear attention decays by a layer's number"),
    "minimax_m2": SIGMOID,
    "minimax_m3_vl": replace(SIGMOID, lists=(ATTENTION, MLP), inside=TEXT),
    "mistral4": replace(SOFTMAX, dense=FIRST),
    "mistral_large4": replace(
        SOFTMAX, dense=FIRST, lists=("no_rope_layers", INDEXERS), rules=NO_ROPE | INDEXED, inside=TEXT
    ),
    "mixtral": SOFTMAX,
    "muse_spark": replace(
        SIGMOID,
        lists=(ATTENTION, MLP, "layer_rope_theta"),
        inside=TEXT,
        no_zeros="its gates weigh the residual stream itself",
    ),
    "nemo_speechlm": replace(SCALED, lists=("layers_block_type",), inside=TEXT),
    "nemotron_h": replace(SCALED, lists=("layers_block_type",)),
    "olmoe": SOFTMAX,
    "openai_privacy_filter": SOFTMAX,
    "phimoe": replace(SOFTMAX, no_experts="a token goes to two, chosen one after the other"),
    "qwen2_moe": replace(SOFTMAX, dense=NAMED),
    "qwen3_5_moe": replace(SOFTMAX, lists=(ATTENTION,), rules=ALTERNATE, inside=TEXT),
    "qwen3_5_moe_text": replace(SOFTMAX, lists=(ATTENTION,), rules=ALTERNATE),
    "qwen3_moe": replace(SOFTMAX, dense=NAMED),
    "qwen3_next": replace(SOFTMAX, dense=NAMED, lists=(ATTENTION,), rules=ALTERNATE),
    "qwen3_omni_moe": replace(
        SOFTMAX,
        dense=NAMED,
        inside="thinker_config.text_config",
        no_copies="what speaks reads a layer of it by its number",
    ),
    "qwen3_vl_moe": replace(
        SOFTMAX,
        dense=NAMED,
        inside=TEXT,
        skip_first="images come to them by their numbers",
        first="deepstack_visual_indexes",
    ),
    "qwen4_exp": replace(
        SOFTMAX,
        lists=(ATTENTION,),
        rules={ATTENTION: Every("full_attention_interval", 4, "linear_attention", "indexed_attention")},
        inside=TEXT,
    ),
    "solar_open": SCALED,
    "step3p7": replace(SIGMOID, lists=(ATTENTION, MLP), inside=TEXT),
    "unlimited_ocr": replace(SOFTMAX, dense=FIRST, inside=TEXT),
    "zaya": replace(
        SOFTMAX,
        no_experts="a token goes to one",
        skip_first="the router of its first has less than others'",
        no_zeros="its routers read those of the layers before",
    ),
}

REFUSED = {
    "inkling2": "its layers read those before them by their numbers, and its checkpoints are quantised",
}
