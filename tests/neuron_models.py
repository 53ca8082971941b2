"""Small models with neurons, for tests: ours and those of transformers."""

import torch
from sigma_train.config import Config
from sigma_train.model import LanguageModel
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sigma_kernels.integrations import transformers as sk_hf

sk_hf.register()
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", "sigma"]


def ours(num_experts: int = 6, **train) -> LanguageModel:
    torch.manual_seed(0)
    config = Config.from_dict(
        {
            "model": {
                "vocab_size": 300, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
                "intermediate_size": 10, "num_experts": num_experts, "num_layers": 3, "top_k": 2, "max_seq_len": 32,
                "init_std": 0.3,
            },
            "train": {"seq_len": 32, **train},
        }
    )  # fmt: skip
    return LanguageModel(config)


TINY = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip


def theirs(implementation: str | None = None) -> nn.Module:
    """Dense without an implementation; with one, of experts but for the first layer."""
    torch.manual_seed(0)
    if implementation is None:
        return Qwen3ForCausalLM(Qwen3Config(**TINY)).eval()
    config = Qwen3MoeConfig(
        **TINY, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[0]
    )
    config._experts_implementation = implementation
    return Qwen3MoeForCausalLM(config).eval()


def tokens(batch: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, (batch, 32), generator=torch.Generator().manual_seed(seed))
