"""Neurons of models of transformers, family by family: counts by hand, and layers taken out."""

import copy

import pytest
import torch
from neuron_models import tokens
from sigma_neurons.ablation import deactivate
from sigma_neurons.counting import ActivationCounter
from sigma_neurons.sites import find_sites
from sigma_train.errors import WrongInput
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

TINY = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **TINY,
            **EXPERTS,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            mlp_only_layers=[0],
        ),
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**TINY, num_local_experts=6, num_experts_per_tok=2)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**TINY, **EXPERTS)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**TINY)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**TINY, head_dim=8)),  # GELU
}
SITES = {  # name of the last layer's, experts, units
    "qwen2_moe": [("experts", 6, 12), ("shared_expert", 1, 20)],
    "mixtral": [("experts", 6, 24)],
    "olmoe": [("experts", 6, 24)],
    "phi3": [("mlp", 1, 24)],
    "gemma2": [("mlp", 1, 24)],
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    return kind(config).eval()


def by_hand(module: nn.Module, args: tuple) -> torch.Tensor:
    """[experts, units]: tokens at which each gate is above zero, one by one, in f64."""
    x = args[0].flatten(0, -2).double()
    if not hasattr(module, "num_experts"):
        gate = getattr(module, "gate_proj", None) or module.gate_up_proj
        units = module.down_proj.in_features
        return sum((gate.weight[:units].double() @ token > 0).long() for token in x)[None]
    gates, units = module.gate_up_proj.double(), module.down_proj.shape[2]
    fired = torch.zeros(len(gates), units, dtype=torch.int64)
    for token, chosen in zip(x, args[1].tolist(), strict=True):
        for expert in chosen:
            fired[expert] += gates[expert, :units] @ token > 0
    return fired


@every_family
@torch.no_grad()
def test_counts_are_those_by_hand(family):
    """Defends: a layer that is not seen, a shared expert as an expert of many, ups for gates where both are one."""
    model, inputs = made(family), tokens(2)
    sites = find_sites(model)
    last = [(s.name.split(".")[-1], s.experts, s.units) for s in sites if s.layer == 1]
    assert last == SITES[family]
    assert {s.layer for s in sites} == {0, 1}
    want = {}
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda layer, args, name=site.name: want.update({name: by_hand(layer, args)})
        )
        for site in sites
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    with ActivationCounter(model, ["de"]) as counter, counter.batch("de", inputs):
        model(inputs)
    for site, fired in zip(sites, counter.stats.fired, strict=True):
        assert torch.equal(fired[0], want[site.name]), site.name
        assert 0 < fired.sum() < fired.numel() * inputs.numel()


@every_family
@torch.no_grad()
def test_a_layer_without_neurons_is_one_without_its_down_projections(family):
    """Bit for bit.  Defends: half of a layer left in, as its shared expert; the other layer taken out."""
    model, inputs = made(family), tokens(2)
    without = copy.deepcopy(model)
    mask = []
    for site in find_sites(model):
        mask.append(torch.full((site.size,), site.layer == 1))
        if site.layer == 1:
            down = without.get_submodule(site.name).down_proj
            getattr(down, "weight", down).zero_()
    before = model(inputs).logits
    with deactivate(model, torch.cat(mask)):
        got = model(inputs).logits
    assert torch.equal(got, without(inputs).logits)
    assert not torch.allclose(got, before)


def test_a_model_without_gates_is_refused_by_name():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(WrongInput, match="GPT2LMHeadModel has no gated feed-forward layer that is known"):
        find_sites(model)
