"""A small model of each family of transformers that `sigma grow` knows, with what its gates may do else."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
SMALL = {"moe_intermediate_size": 12, "head_dim": 8}
SIX = SMALL | {"num_experts": 6}
SHARED = {"shared_expert_intermediate_size": 16}
EIGHT = {"moe_intermediate_size": 12, "n_routed_experts": 8}
DENSE = {"first_k_dense_replace": 1}
GROUPS = {"n_group": 4, "topk_group": 2}
ONE = {"n_group": 1, "topk_group": 1}
SCALED = {"routed_scaling_factor": 1.7}
SUMMED = {"norm_topk_prob": False, **SCALED}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
INDEXED = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
MIDDLE = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
KIMI = {"linear_head_dim": 8, "linear_num_heads": 4, "num_local_experts": 8, "moe_intermediate_size": 12}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
NEMOTRON = EIGHT | SUMMED | {
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8, "head_dim": 8,
    "moe_shared_expert_intermediate_size": 16, "layers_block_type": ["linear_attention", "moe", "full_attention"],
}  # fmt: skip
LLAMA4 = {
    "num_local_experts": 6, "head_dim": 8, "intermediate_size_mlp": 24, "moe_layers": [0, 2],
    "no_rope_layers": [1, 0, 1], "attention_chunk_size": 8,
}  # fmt: skip
GEMMA4 = SIX | {
    "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 16,
    "sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
HEARS = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 8,
}  # fmt: skip
EAR_OF_QWEN = {
    "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
    "output_dim": 32, "n_window": 4, "downsample_hidden_size": 8,
}  # fmt: skip
QWEN4 = SIX | SHARED | DELTA | {
    "hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
    "indexer_budget": 8, "indexer_compress_ratio": 2,
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
}  # fmt: skip
DBRX = {
    "d_model": 32, "n_heads": 4, "n_layers": 3, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
}  # fmt: skip
DBRX_EXPERTS = {"ffn_hidden_size": 12, "moe_num_experts": 6, "moe_top_k": 2}
ONLY_GEMMA4 = ("enable_moe_block", "hidden_size_per_layer_input")
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
EYE = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "depth": 2,
    "num_heads": 2, "patch_size": 4, "image_size": 8, "out_hidden_size": 32, "projection_intermediate_size": 16,
}  # fmt: skip
EAR = {
    "patch_sizes": [2, 2],
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "num_hidden_layers": 2,
    "out_hidden_size": 32,
}
SAM = {
    "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 16, "downsample_channels": [8, 16],
}  # fmt: skip
READER = {"sam_config": SAM, "encoder_config": EYE | {"num_key_value_heads": 2, "vocab_size": 8}}


def seeing(text: dict[str, Any], eye: dict[str, Any] | None = None, **outer: Any) -> dict[str, Any]:
    return {"text_config": COMMON | text, "vision_config": EYE | (eye or {}), **outer}


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", SIX | SLIDING | {"num_shared_experts": 1, "route_scale": 1.7}),
    "aria": ("aria", seeing({"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
                            projector_patch_to_query_dict={4: 2})),
    "aria_text": ("aria_text", {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "axk1": ("axk1", LATENT | EIGHT | GROUPS | SUMMED | MIDDLE),
    "axk2": ("axk2", LATENT | EIGHT | INDEXED | SUMMED | MIDDLE),
    "axk2, groups": ("axk2", LATENT | EIGHT | INDEXED | GROUPS),
    "bailing_hybrid": ("bailing_hybrid", LATENT | KIMI | GROUPS | SUMMED | LINEAR | DENSE | {"head_dim": 8}),
    "beam": ("beam", SMALL | {"num_experts": 8} | GROUPS | SUMMED | SLIDING | MIDDLE),
    "cohere2_moe": ("cohere2_moe", SIX | SLIDING | MIDDLE | {"prefix_dense_intermediate_size": 24}),
    "cohere2_moe, sigmoid": ("cohere2_moe", SIX | SLIDING | MIDDLE | {
        "prefix_dense_intermediate_size": 24, "expert_selection_fn": "sigmoid", "num_shared_experts": 1}),
    "cohere2_moe, gates not normalised": ("cohere2_moe", SIX | SLIDING | {
        "expert_selection_fn": "sigmoid", "norm_topk_prob": False, "mlp_layer_types": ["sparse"] * 3}),
    "dbrx": ("dbrx", DBRX | {"ffn_config": DBRX_EXPERTS}),
    "dbrx, gates not normalised": ("dbrx", DBRX | {
        "ffn_config": DBRX_EXPERTS | {"moe_normalize_expert_weights": None}}),
    "deepseek_v2": ("deepseek_v2", LATENT | EIGHT | DENSE | GROUPS | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT | EIGHT | DENSE | GROUPS),
    "deepseek_v3, gates not normalised": ("deepseek_v3", LATENT | EIGHT | DENSE | ONE | SUMMED),
    "deepseek_v32": ("deepseek_v32", LATENT | EIGHT | DENSE | GROUPS | INDEXED | SUMMED),
    "deepseek_v4": ("deepseek_v4", EIGHT | {
        "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2,
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "sliding_window": 8,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe", "moe"]}),
    "diffusion_gemma": ("diffusion_gemma", {
        "text_config": COMMON | {key: x for key, x in GEMMA4.items() if key not in ONLY_GEMMA4}, "vision_config": EYE,
        "canvas_length": 20}),
    "doge": ("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4, "keep_window_size": 8}),
    "dots1": ("dots1", SMALL | EIGHT | DENSE | {"n_shared_experts": 1}),
    "dots3_note": ("dots3_note", {
        "text_config": COMMON | LATENT | EIGHT | INDEXED | GROUPS | SUMMED | MIDDLE | {
            "layer_types": ["sliding_attention", "indexed_attention", "sliding_attention"], "sliding_window": 8,
            "head_dim": 16, "shared_experts_intermediate_size": 16, "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        "vision_config": EYE | {"pyramid_num_routed": [-1, 4], "moe_intermediate_size": 8, "adapter_in_dim": 16,
                                "adapter_out_dim": 32},
        "audio_config": HEARS | {"feature_size": 8, "downsample_hidden_size": 8, "adapter_input_size": 16,
                                 "adapter_out_dim": 32}}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 12}),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", seeing({
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": [12, 8],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "rope_parameters": ROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}})),
    "exaone_moe": ("exaone_moe", SMALL | SLIDING | GROUPS | SUMMED | {"num_experts": 8}),
    "flex_olmo": ("flex_olmo", {"num_experts": 6}),
    "flint": ("flint", SIX | SHARED | SLIDING | {"mlp_only_layers": [1]}),
    "flint, gates not normalised": ("flint", SIX | SHARED | SLIDING | {"mlp_only_layers": [], "norm_topk_prob": False}),
    "gemma4": ("gemma4", {"text_config": COMMON | GEMMA4}),
    "gemma4_text": ("gemma4_text", GEMMA4),
    "glm4_moe": ("glm4_moe", SMALL | EIGHT | DENSE),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT | EIGHT | SUMMED | MIDDLE),
    "glm4v_moe": ("glm4v_moe", seeing(SMALL | EIGHT | DENSE | SUMMED | {
        "rope_parameters": ROPE["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}})),
    "glm5_next": ("glm5_next", seeing(LATENT | KIMI | EIGHT | INDEXED | SUMMED | MIDDLE | {
        "qk_rope_head_dim": 0, "index_kpool": 2, "hc_mult": 2, "indexer_types": ["full"] * 3,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"]})),
    "glm_moe_dsa": ("glm_moe_dsa", LATENT | EIGHT | INDEXED | SUMMED | MIDDLE),
    "glm_moe_dsa, indexers shared": ("glm_moe_dsa", LATENT | EIGHT | INDEXED | MIDDLE | {
        "indexer_types": ["full", "shared", "full"]}),
    "gpt_oss": ("gpt_oss", SLIDING | ROPE | {"num_local_experts": 6, "head_dim": 8}),
    "granitemoe": ("granitemoe", {"num_local_experts": 6, "residual_multiplier": 0.5}),
    "granitemoe_swa": ("granitemoe_swa", SLIDING | {
        "num_local_experts": 6, "shared_intermediate_size": 16, "layer_rope_theta": [1e4, 1e3, 1e2]}),
    "granitemoehybrid": ("granitemoehybrid", LINEAR | MAMBA | {
        "num_local_experts": 6, "shared_intermediate_size": 16, "position_embedding_type": "rope"}),
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": 6, "shared_intermediate_size": 16}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 6, "head_dim": 8}),
    "hy_v3": ("hy_v3", SIX | MIDDLE | {"router_scaling_factor": 1.7}),
    "hy_v4": ("hy_v4", LATENT | EIGHT | INDEXED | SUMMED | MIDDLE | {"hc_mult": 2, "indexer_types": ["full"] * 3}),
    "inkling_mm_model": ("inkling_mm_model", seeing(SMALL | MIDDLE | {
        "n_routed_experts": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "sliding_window_size": 8, "d_rel": 4, "rel_extent": 8, "logits_mup_width_multiplier": 1.0,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 4})),
    "jamba": ("jamba", {"num_experts": 6, "attn_layer_period": 2, "mamba_d_state": 8, "attn_layer_offset": 1,
                        "use_mamba_kernels": False}),
    "jetmoe": ("jetmoe", {"num_local_experts": 6, "kv_channels": 8}),
    "kimi_linear": ("kimi_linear", LATENT | KIMI | LINEAR | MIDDLE | GROUPS | SUMMED | {"q_lora_rank": None}),
    "kolibri1": ("kolibri1", SIX | SHARED | SLIDING),
    "kolibri1, gates normalised": ("kolibri1", SIX | SHARED | SLIDING | {"norm_topk_prob": True}),
    "laguna": ("laguna", SIX | SHARED | SLIDING | MIDDLE | {
        "num_attention_heads_per_layer": [4, 2, 4], "moe_routed_scaling_factor": 1.7}),
    "lfm2_moe": ("lfm2_moe", SIX | SUMMED | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}),
    "lfm2_moe, gates normalised": ("lfm2_moe", SIX | {
        "num_dense_layers": 1, "use_expert_bias": False, "layer_types": ["conv", "full_attention", "conv"]}),
    "llama4": ("llama4", seeing(LLAMA4, {
        "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16})),
    "llama4_text": ("llama4_text", LLAMA4),
    "longcat_flash": ("longcat_flash", LATENT | SCALED | {
        "num_hidden_layers": 6, "n_routed_experts": 6, "zero_expert_num": 2, "expert_ffn_hidden_size": 12,
        "head_dim": 8}),
    "mellum": ("mellum", SIX | SLIDING | MIDDLE),
    "mimo_v2_flash": ("mimo_v2_flash", SMALL | EIGHT | SLIDING | MIDDLE | GROUPS | SUMMED | {"v_head_dim": 8}),
    "minimax": ("minimax", LINEAR | {"num_local_experts": 6, "head_dim": 8, "block_size": 8}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 6, "head_dim": 8}),
    "minimax_m3_vl": ("minimax_m3_vl", seeing(MIDDLE | {
        "num_local_experts": 6, "head_dim": 8, "dense_intermediate_size": 24, "shared_intermediate_size": 16,
        "rotary_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2,
        "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"]}, projector_hidden_size=16)),
    "mistral4": ("mistral4", LATENT | EIGHT | DENSE | GROUPS | SCALED),
    "mistral4, gates not normalised": ("mistral4", LATENT | EIGHT | DENSE | SUMMED),
    "mistral_large4": ("mistral_large4", seeing(LATENT | EIGHT | DENSE | GROUPS | INDEXED | SCALED | ROPE)),
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "muse_spark": ("muse_spark", seeing(SMALL | SLIDING | SCALED | MIDDLE | {
        "num_local_experts": 6, "moe_hidden_size": 16, "layer_rope_theta": [1e4, 0, 1e3]}, audio_config=EAR,
        out_hidden_size=16,        projector_hidden_size=16)),
    "nemo_speechlm": ("nemo_speechlm", {
        "text_config": COMMON | NEMOTRON | GROUPS,
        "word_timestamp_config": HEARS | {"vocab_size": 8, "blank_token_id": 7},
        "audio_config": {"asr_config": HEARS, "diarization_config": {
            "audio_config": HEARS, "head_config": {"hidden_size": 8, "audio_hidden_size": 16}}}}),
    "nemotron_h": ("nemotron_h", NEMOTRON | GROUPS),
    "nemotron_h, latent": ("nemotron_h", NEMOTRON | {"moe_latent_size": 16, "mlp_bias": True, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 6}),
    "openai_privacy_filter": ("openai_privacy_filter", ROPE | {
        "num_local_experts": 6, "head_dim": 8, "sliding_window": 8}),
    "phimoe": ("phimoe", {"num_local_experts": 6}),
    "qwen2_moe": ("qwen2_moe", {"moe_intermediate_size": 12, "num_experts": 6} | SHARED),
    "qwen3_5_moe": ("qwen3_5_moe", seeing(SIX | SHARED | DELTA | LINEAR)),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", SIX | SHARED | DELTA | LINEAR),
    "qwen3_moe": ("qwen3_moe", SIX | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3_moe, dense layers named": ("qwen3_moe", SIX | {"mlp_only_layers": [1]}),
    "qwen3_next": ("qwen3_next", SIX | SHARED | DELTA | LINEAR | {"mlp_only_layers": [1]}),
    "qwen3_omni_moe": ("qwen3_omni_moe", {
        "thinker_config": seeing(SIX, {"deepstack_visual_indexes": [0]}, audio_config=EAR_OF_QWEN),
        "talker_config": {
            "text_config": COMMON | SIX | SHARED, "thinker_hidden_size": 32, "num_code_groups": 2,
            "spatial_merge_size": 2,
            "code_predictor_config": COMMON | {"head_dim": 8, "num_code_groups": 2}},
        "code2wav_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "codebook_size": 8, "num_quantizers": 2, "decoder_dim": 16,
            "upsample_rates": [2], "upsampling_ratios": [2]}}),
    "qwen3_vl_moe": ("qwen3_vl_moe", seeing(SIX, {"deepstack_visual_indexes": [0]})),
    "qwen4_exp": ("qwen4_exp", seeing(QWEN4)),
    "qwen4_exp, embeddings of a layer": ("qwen4_exp", seeing(QWEN4 | {
        "ple_layer_ids": [1], "eos_token_id": 1, "heads_per_ngram": 2, "ngram_size": 2, "ngram_vocab_size_base": 16,
        "make_ngram_vocab_size_divisible_by": 1})),
    "solar_open": ("solar_open", SMALL | EIGHT | GROUPS | SUMMED),
    "step3p7": ("step3p7", seeing(SMALL | EIGHT | SLIDING | MIDDLE | {
        "share_expert_dim": 16, "num_sliding_attention_heads": 2, "moe_router_scaling_factor": 1.7,
        "swiglu_limits": [0.5, 0.0, 1.0]})),
    "unlimited_ocr": ("unlimited_ocr", seeing(EIGHT | GROUPS | SCALED | MIDDLE, READER)),
    "zaya": ("zaya", SMALL | {
        "num_experts": 24, "num_experts_per_tok": 1, "router_hidden_size": 16, "sliding_window": 8,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]}),
    "deepseek_ocr2": ("deepseek_ocr2", seeing(EIGHT | SCALED | MIDDLE, READER)),
}  # fmt: skip
TOKENS = torch.arange(40).view(2, 20) * 7 % 64


def loader(config: Any) -> Any:
    """Of the whole model, where it is more than a language model, or none."""
    import transformers

    for kind in ("ImageTextToText", "CausalLM", "MultimodalLM", "TokenClassification"):
        found = getattr(transformers, f"AutoModelFor{kind}")
        if type(config) in found._model_mapping:
            return found
    raise AssertionError(config)


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, **how: Any) -> None:
    """A model of random weights, large enough to tell one from another, its norms and biases too."""
    from transformers import AutoConfig

    family, settings = deepcopy(SETTINGS[name])
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **settings if {"text_config", "thinker_config"} & settings.keys() else COMMON | settings
    )
    model = loader(config).from_config(config, dtype=dtype)
    for own, x in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" not in own and x.is_floating_point():
            # Zaya's tokens would go to one expert.
            about = x.dim() == 1 and not re.search("router_mlp|balancing", own)
            size = 2 if "embed_tokens" in own else 0.01 if "balancing" in own else 0.3
            x.data.copy_(torch.randn_like(x) * size + about)
        if "tid2eid" in own:  # of DeepSeek V4's tokens the experts, each another
            x.data.copy_(torch.arange(x.numel()).view_as(x) * 3 % 8)
    model.save_pretrained(folder, **how)


def logits(folder: Path, routes: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Of what `from_pretrained` reads, which must lack nothing and have nothing left over.

    Args:
        routes: which experts tokens went to is appended, layer by layer.
    """
    from transformers import AutoConfig

    model, info = loader(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not any(info.values()), info
    model = getattr(model, "thinker", model)  # of Qwen's Omni, beside one that speaks
    for x in model.parameters():
        x.data = x.data.clone()  # where it lies in a file decides how products are summed
    if routes is not None:
        for module in model.modules():
            if type(module).__name__ == "JetMoeTopKGating":
                module.register_forward_hook(
                    lambda own, _, made: routes.append(made[4].topk(own.top_k).indices)
                )
            elif type(module).__name__ == "DogeCDMoE":
                module.down_embed.register_forward_pre_hook(lambda _, args: routes.append(args[0]))
            elif re.search("(?<!Parallel)(?<!InklingShared)Experts$", type(module).__name__):
                module.register_forward_pre_hook(lambda _, args: routes.append(_chosen(*args)))
    torch.manual_seed(0)  # DiffusionGemma begins with a canvas that is drawn
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def _chosen(x: torch.Tensor, indices: torch.Tensor | None = None, *_: torch.Tensor) -> torch.Tensor:
    """[tokens, k]; Llama 4 gives each expert all tokens instead, those that did not choose it as zeros."""
    if indices is None:
        is_chosen = x.view(-1, TOKENS.numel(), x.shape[-1]).any(-1)
        return is_chosen.T.nonzero()[:, 1].view(TOKENS.numel(), -1)
    return indices
