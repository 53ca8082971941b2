"""A run's model as a Hugging Face folder: config.json, model.safetensors, tokenizer.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sigma_train.config import Config, ConfigError
from sigma_train.files import atomic_folder, failed_writes_are_oserrors, must_be_new, sync, write_text
from sigma_train.generate import load_run
from sigma_train.model import LanguageModel
from sigma_train.tokenizer import END_OF_TEXT


def export_to_transformers(run: Path, out: Path, top_k: int | Sequence[int] | None = None) -> None:
    """Write the newest model of `run` as Qwen3MoeForCausalLM, or Qwen3ForCausalLM where it is dense.

    A token goes to `top_k` experts, or to model.top_k.  The constant output scale is folded into the down projections.
    The folder appears whole or not at all.
    Raises: WrongInput if `out` exists; ConfigError if the model is not expressible as Qwen3; CheckpointError if there
        is no run.
    """
    must_be_new(out, "export")
    config, model, tokenizer = load_run(run)
    if top_k is not None:
        _turn_to(model, config, top_k)
    settings = transformers_config(config, model, tokenizer.eos_id)
    with atomic_folder(out, "export") as temporary:
        weights = transformers_state(model, config)
        with failed_writes_are_oserrors(out):
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
            sync(temporary / "model.safetensors")
        write_text(temporary / "config.json", json.dumps(settings, indent=2))
        tokenizer.save(temporary / "tokenizer.json")
        tokenizer_settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
        write_text(temporary / "tokenizer_config.json", json.dumps(tokenizer_settings, indent=2))


def _turn_to(model: LanguageModel, config: Config, top_k: int | Sequence[int]) -> None:
    """Raises: ConfigError if the model can't have it."""
    if config.model.num_experts == 1:
        raise ConfigError("export: --top-k is of a model with experts, model.num_experts is 1")
    try:
        model.set_top_k(top_k)
    except ValueError as error:
        raise ConfigError(str(error).replace("set_top_k: top_k", "export: --top-k")) from None


def transformers_config(config: Config, model: LanguageModel, eos_id: int) -> dict[str, Any]:
    """Raises: ConfigError naming what Qwen3-MoE has no setting for."""
    c, r = config.model, config.router
    common = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tie_embeddings,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "float32",
    }
    routers = [moe.router for moe in model.moe_layers()]
    ks = [router.top_k for router in routers] or list(c.layer_top_k)
    if len(set(ks)) > 1:
        # transformers 5.23 has per_layer_config, which its Qwen3-MoE does not read.
        raise ConfigError(f"export: Qwen3 has one top_k for all layers, found {ks}")
    top_k = ks[0]
    if not routers:
        width = c.intermediate_size * top_k
        return {
            **common,
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "intermediate_size": width,
        }
    if r.score != "softmax":
        raise ConfigError(f"export: Qwen3-MoE routes by softmax only; router.score is {r.score!r}")
    if r.balance == "bias":
        raise ConfigError("export: Qwen3-MoE has no selection bias; router.balance is 'bias'")
    return {
        **common,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": c.intermediate_size,
        "intermediate_size": c.intermediate_size,
        "num_experts": c.num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": routers[0].normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def transformers_state(model: LanguageModel, config: Config) -> dict[str, Tensor]:
    """The weights under the names that transformers' checkpoints have: one tensor per projection of each expert."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name if name.startswith("lm_head") else f"model.{name}"
        if name == "lm_head.weight" and config.model.tie_embeddings:
            continue
        if name.endswith("mlp.router.weight"):
            state[name.replace("router", "gate")] = tensor
        elif name.endswith("experts.gate_up_proj"):
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                prefix = name.replace("gate_up_proj", str(e))
                state[f"{prefix}.gate_proj.weight"], state[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for e, expert in enumerate(tensor * config.router.output_scale):
                state[f"{name.replace('down_proj', str(e))}.down_proj.weight"] = expert
        elif name.endswith("mlp.gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            (
                state[name.replace("gate_up_proj", "gate_proj")],
                state[name.replace("gate_up_proj", "up_proj")],
            ) = gate, up
        else:
            state[name] = tensor
    return {name: tensor.clone() for name, tensor in state.items()}
