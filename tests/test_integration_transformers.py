"""experts_implementation="sigma" equals eager: logits and every gradient, in each family that a tiny model can show."""

import pytest
import torch
import transformers
from support import assert_close, tolerance
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sigma_kernels.integrations import transformers as sk_hf

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts": 6,
    "n_routed_experts": 6,
}
FAMILIES = {  # config class: what the family needs beyond TINY
    "Qwen3MoeConfig": {},
    "Qwen2MoeConfig": {"shared_expert_intermediate_size": 24},
    "OlmoeConfig": {"intermediate_size": 24},
    "MixtralConfig": {},
    "GptOssConfig": {},
    "Glm4MoeConfig": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    "DeepseekV3Config": {
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}


@pytest.mark.filterwarnings("ignore")  # transformers' own, of many kinds
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family, top_k):
    """Defends: layout, biases, gates and weights of each family; experts that no token reaches."""
    sk_hf.register()
    settings = {**TINY, **FAMILIES[family], "num_experts_per_tok": top_k}
    config = getattr(transformers, family)(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    tokens = torch.randint(0, 64, (2, 9))
    results, calls = {}, []

    def counted(*args):
        calls.append(args)
        return sk_hf.experts_forward(*args)

    ALL_EXPERTS_FUNCTIONS.register("sigma", counted)
    for name in ("eager", "sigma"):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results[name] = (out.logits.detach(), grads)
    assert len(calls) == config.num_hidden_layers
    logits, grads = results["sigma"]
    want, want_grads = results["eager"]
    assert_close(logits, want, 4 * tolerance(torch.float32, 64))
    assert grads.keys() == want_grads.keys()
    largest = max(grad.abs().max() for grad in want_grads.values())
    for name, grad in grads.items():
        # A router normalised over its one expert has gradient zero: what is left there is rounding of larger terms.
        scale = want_grads[name].abs().max() + 1e-2 * largest
        assert (grad - want_grads[name]).abs().max() <= 4 * tolerance(torch.float32, 64) * scale, name


def test_expert_parallel_is_refused():
    module = torch.nn.Module()
    module._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="sentinel indices"):
        sk_hf.experts_forward(module, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
