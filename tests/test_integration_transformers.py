"""experts_implementation="sigma" equals eager in every model family of the installed transformers that can take it."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from support import assert_close, tolerance
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from sigma_kernels.integrations import transformers as sk_hf

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation\b.*\n(?:[@ )].*\n)*class (\w+)", re.MULTILINE)
FOUND = {  # experts class: the module that has it
    name: f"transformers.models.{path.parent.name}.{path.stem}"
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    for name in DECORATED.findall(path.read_text())
}

E = 20  # two picks of 8 tokens leave experts that no token reaches
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "use_cache": False,
    "max_position_embeddings": 64, "pad_token_id": 0,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "num_experts": E, "num_local_experts": E, "n_routed_experts": E, "moe_num_experts": E,
    "moe_intermediate_size": 24, "moe_hidden_size": 32, "router_hidden_size": 16, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "dense_intermediate_size": 24,
    "first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_start_index": 0, "mlp_only_layers": [],
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16, "o_groups": 2, "o_lora_rank": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_state": 16, "ssm_state_size": 16,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA_4 = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}

FAMILIES = {  # experts class: the model that holds it, and what its configuration needs beyond TINY
    "AXK1Experts": ("AXK1ForCausalLM", MLA),
    "AXK2Experts": ("AXK2ForCausalLM", MLA),
    "AfmoeExperts": ("AfmoeForCausalLM", {}),
    "AriaExperts": ("AriaTextForCausalLM", {}),
    "BailingHybridExperts": ("BailingHybridForCausalLM", {**MLA, **LINEAR}),
    "BeamExperts": ("BeamForCausalLM", SPARSE),
    "Cohere2MoeExperts": ("Cohere2MoeForCausalLM", {}),
    "DeepseekOcr2TextExperts": ("DeepseekOcr2TextModel", SPARSE),
    "DeepseekV2Experts": ("DeepseekV2ForCausalLM", MLA),
    "DeepseekV32Experts": ("DeepseekV32ForCausalLM", MLA),
    "DeepseekV3Experts": ("DeepseekV3ForCausalLM", MLA),
    "DeepseekV4Experts": ("DeepseekV4ForCausalLM", {"mlp_layer_types": ["hash_moe", "moe"]}),
    "DiffusionGemmaTextExperts": ("DiffusionGemmaEncoderTextModel", {}),
    "Dots1Experts": ("Dots1ForCausalLM", {}),
    "Dots3NoteExperts": ("Dots3NoteForCausalLM", MLA),
    "Ernie4_5_MoeExperts": ("Ernie4_5_MoeForCausalLM", {}),
    "Ernie4_5_VLMoeMoeExperts": (
        "Ernie4_5_VLMoeTextModel",
        {**SPARSE, "moe_intermediate_size": [24, 16], "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    ),
    "ExaoneMoeExperts": ("ExaoneMoeForCausalLM", SPARSE),
    "FlexOlmoExperts": ("FlexOlmoForCausalLM", {}),
    "FlintExperts": ("FlintForCausalLM", {}),
    "Gemma4TextExperts": (
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    ),
    "Glm4MoeExperts": ("Glm4MoeForCausalLM", {}),
    "Glm4MoeLiteExperts": ("Glm4MoeLiteForCausalLM", {**MLA, **SPARSE}),
    "Glm4vMoeTextExperts": (
        "Glm4vMoeTextModel",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}},
    ),
    "Glm5NextTextExperts": ("Glm5NextTextModel", {**MLA, **SPARSE, "qk_rope_head_dim": 0}),
    "GlmMoeDsaExperts": ("GlmMoeDsaForCausalLM", {**MLA, **SPARSE}),
    "GptOssExperts": ("GptOssForCausalLM", {}),
    "GraniteMoeExperts": ("GraniteMoeForCausalLM", {}),
    "GraniteMoeHybridExperts": ("GraniteMoeHybridForCausalLM", {}),
    "GraniteMoeSWAExperts": ("GraniteMoeSWAForCausalLM", {}),
    "GraniteMoeSharedExperts": ("GraniteMoeSharedForCausalLM", {}),
    "HYV3Experts": ("HYV3ForCausalLM", SPARSE),
    "HYV4Experts": ("HYV4ForCausalLM", {**MLA, **SPARSE}),
    "HunYuanMoEV1Experts": ("HunYuanMoEV1ForCausalLM", {}),
    "Inkling2Experts": ("Inkling2ForCausalLM", {}),
    "InklingExperts": ("InklingForCausalLM", {}),
    "JambaExperts": (
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    ),
    "KimiLinearExperts": ("KimiLinearForCausalLM", {**MLA, **SPARSE, **LINEAR}),
    "Kolibri1Experts": ("Kolibri1ForCausalLM", {}),
    "LagunaExperts": ("LagunaForCausalLM", SPARSE),
    "Lfm2MoeExperts": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "MellumExperts": ("MellumForCausalLM", {}),
    "MiMoV2FlashExperts": ("MiMoV2FlashForCausalLM", SPARSE),
    "MiniMaxExperts": ("MiniMaxForCausalLM", {}),
    "MiniMaxM2Experts": ("MiniMaxM2ForCausalLM", {}),
    "MiniMaxM3VLExperts": ("MiniMaxM3VLForCausalLM", {}),
    "Mistral4Experts": ("Mistral4ForCausalLM", {**MLA, "rope_parameters": {**ROPE, **LLAMA_4}}),
    "MistralLarge4TextExperts": ("MistralLarge4TextModel", MLA),
    "MixtralExperts": ("MixtralForCausalLM", {}),
    "MuseSparkExperts": ("MuseSparkTextModel", {}),
    "NemotronHExperts": ("NemotronHForCausalLM", {}),
    "OlmoeExperts": ("OlmoeForCausalLM", {}),
    "OpenAIPrivacyFilterExperts": ("OpenAIPrivacyFilterForTokenClassification", {}),
    "PhimoeExperts": ("PhimoeForCausalLM", {}),
    "Qwen2MoeExperts": ("Qwen2MoeForCausalLM", {}),
    "Qwen3MoeExperts": ("Qwen3MoeForCausalLM", {}),
    "Qwen3NextExperts": ("Qwen3NextForCausalLM", LINEAR),
    "Qwen3OmniMoeTalkerTextExperts": ("Qwen3OmniMoeTalkerModel", {}),
    "Qwen3OmniMoeThinkerTextExperts": ("Qwen3OmniMoeThinkerTextModel", {}),
    "Qwen3VLMoeTextExperts": ("Qwen3VLMoeTextModel", {}),
    "Qwen3_5MoeExperts": ("Qwen3_5MoeForCausalLM", LINEAR),
    "Qwen4ExpTextExperts": (
        "Qwen4ExpForCausalLM",
        {**LINEAR, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
         "indexer_compress_ratio": 4},
    ),
    "SolarOpenExperts": ("SolarOpenForCausalLM", {}),
    "UnlimitedOcrTextExperts": ("UnlimitedOcrTextModel", SPARSE),
    "ZayaExperts": ("ZayaForCausalLM", {}),
}  # fmt: skip
ONLY_TOP_K = {"PhimoeExperts": 2, "ZayaExperts": 1}  # their routers take no other
# One choice with every `pytest` where the layer is told another way; of the others two, which find more.
ALONE = {"MixtralExperts", "GptOssExperts", "NemotronHExperts", "Gemma4TextExperts", "Qwen3NextExperts"}
CASES = [
    pytest.param(
        name, k, marks=[] if k == ONLY_TOP_K.get(name, 2) or name in ALONE else pytest.mark.acceptance
    )
    for name in FAMILIES
    for k in (1, 2)
    if ONLY_TOP_K.get(name, k) == k
]
TOKENS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
INPUTS = {  # of the models that want more or other than tokens
    "Ernie4_5_VLMoeMoeExperts": {
        "input_ids": TOKENS,
        "moe_mm_token_type_ids": TOKENS % 2,
    },  # odd ones are images
    "Qwen3OmniMoeTalkerTextExperts": {"inputs_embeds": torch.linspace(-1, 1, 256).sin().view(2, 4, 32)},
}


def tiny_model(name: str, top_k: int) -> torch.nn.Module:
    model_name, settings = FAMILIES[name]
    cls = getattr(importlib.import_module(FOUND[name]), model_name)
    names_of_k = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**TINY, **dict.fromkeys(names_of_k, top_k), **settings})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def outputs_and_grads(
    model: torch.nn.Module, experts: list[torch.nn.Module], inputs: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What each experts module answers and, last, the model; the gradients of all parameters."""
    torch.manual_seed(1)  # Phimoe's router draws noise in training
    model.zero_grad()
    outputs = []
    hooks = [
        module.register_forward_hook(lambda *call: outputs.append(call[-1].detach())) for module in experts
    ]
    out = model(**inputs)
    for hook in hooks:
        hook.remove()
    out = out.logits if "logits" in out else out.last_hidden_state
    torch.manual_seed(2)
    out.backward(torch.randn_like(out))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [*outputs, out.detach()], grads


def way(experts: torch.nn.Module) -> str:
    """What the page says of this class."""
    activation = getattr(experts, "act_fn", torch.nn.functional.silu)
    own_gate = experts.has_gate and type(experts)._apply_gate is not _default_apply_gate
    reasons = {
        "transposed": experts.is_transposed,
        "interleaved": not experts.is_concatenated,
        "biases": experts.has_bias,
        "no gate": not experts.has_gate,
        "own gate": own_gate,
        "not SiLU": not own_gate and "silu" not in getattr(activation, "__name__", str(activation)).lower(),
        "norm after each expert": experts.has_post_expert_norm,
    }
    named = [reason for reason, holds in reasons.items() if holds]
    return f"two GEMMs: {', '.join(named)}" if named else "fused"


def moved_by_one_ulp(model, experts, inputs, grads):
    """How far each of eager's own gradients goes where the experts' weights change in their last place.

    Gradients of some families are small differences of large terms: rounding that the layer's result cannot show, of
    theirs as of ours, stands out there.
    """
    weights = [p for module in experts for p in module.parameters()]
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p in weights:
            p *= 1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape)
    _, other = outputs_and_grads(model, experts, inputs)
    with torch.no_grad():
        for p, old in zip(weights, before, strict=True):
            p.copy_(old)
    return {key: float((other[key] - grad).abs().max()) for key, grad in grads.items()}


def test_every_class_is_in_the_table():
    sources = [path.read_text() for path in MODELS.glob("*/modeling_*.py")]
    assert len(FOUND) == sum(source.count("\n@use_experts_implementation") for source in sources)
    assert FAMILIES.keys() == FOUND.keys()


@pytest.mark.filterwarnings("ignore")  # transformers' own, of many kinds
@pytest.mark.parametrize("name, top_k", CASES)
def test_model_equals_eager(name, top_k, monkeypatch):
    """Defends: layout, biases, gates and weights of each family; experts that no token reaches; what the page says."""
    model = tiny_model(name, top_k)
    experts = [module for module in model.modules() if type(module).__name__ == name]
    inputs = INPUTS.get(name, {"input_ids": TOKENS})
    model.set_experts_implementation("eager")
    want, want_grads = outputs_and_grads(model, experts, inputs)
    moved = moved_by_one_ulp(model, experts, inputs, want_grads)

    called, fused = [], []

    def sigma(module, x, index, weights):
        called.append((module, index.shape[1]))
        return sk_hf.experts_forward(module, x, index, weights)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "sigma", sigma)
    run_fused = sk_hf.moe_experts
    monkeypatch.setattr(sk_hf, "moe_experts", lambda *args: fused.append(args) or run_fused(*args))
    model.set_experts_implementation("sigma")
    got, got_grads = outputs_and_grads(model, experts, inputs)

    assert {module.down_proj.shape[0] for module in experts} == {E}
    assert called == [(module, top_k) for module in experts]
    path = way(experts[0])
    assert len(fused) == (len(called) if path == "fused" else 0)
    family = FOUND[name].split(".")[2]
    assert f"| {family} | `{name}` | `{FAMILIES[name][0]}` | {path} |" in PAGE.read_text()
    for value, right in zip(got, want, strict=True):
        assert_close(value, right, 4 * tolerance(torch.float32, 64))
    assert got_grads.keys() == want_grads.keys()
    largest = max(grad.abs().max() for grad in want_grads.values())
    for key, grad in got_grads.items():
        # A router normalised over its one expert has gradient zero: what is left there is rounding of larger terms.
        scale = want_grads[key].abs().max() + 1e-2 * largest
        usual = 4 * tolerance(torch.float32, 64) * scale
        bound = min(max(usual, 8 * moved[key]), 2 * usual)  # however far a choice that flips moves it
        assert (grad - want_grads[key]).abs().max() <= bound, key


def test_page_lists_no_other():
    assert sorted(re.findall(r"^\| \w+ \| `(\w+)`", PAGE.read_text(), re.MULTILINE)) == sorted(FOUND)


def test_models_outside_the_interface_are_outside():
    """Defends the page: these models take the word "sigma" and keep their own experts."""
    (listed,) = re.findall(r"outside the interface: ([^.]+)\.", PAGE.read_text())
    for family in re.findall(r"`(\w+)`", listed):
        source = (MODELS / family / f"modeling_{family}.py").read_text()
        assert not DECORATED.search(source), family


def tiny_experts(name: str = "Qwen3MoeExperts") -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """An experts module of its own and what it takes."""
    experts = next(module for module in tiny_model(name, 2).modules() if type(module).__name__ == name)
    return experts, (torch.randn(8, 32), torch.randint(0, E, (8, 2)), torch.rand(8, 2))


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "AriaExperts"])
def test_older_releases_say_less(name):
    """Defends: transformers 5.7 has no norm after each expert and no flag for expert parallelism."""
    experts, inputs = tiny_experts(name)
    want = sk_hf.experts_forward(experts, *inputs)
    del experts.has_post_expert_norm, experts._is_expert_parallel
    assert torch.equal(sk_hf.experts_forward(experts, *inputs), want)


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts"])
def test_compiles_as_one_graph(name):
    experts, inputs = tiny_experts(name)
    compiled = torch.compile(sk_hf.experts_forward, backend="aot_eager", fullgraph=True)
    want = sk_hf.experts_forward(experts, *inputs)
    assert_close(compiled(experts, *inputs), want, tolerance(torch.float32, 32))


@pytest.mark.filterwarnings("ignore")  # transformers' own, of many kinds
def test_generates_the_tokens_of_eager():
    sk_hf.register()
    model, tokens = tiny_model("Qwen3MoeExperts", 2).eval(), {}
    for implementation in ("eager", "sigma"):
        model.set_experts_implementation(implementation)
        tokens[implementation] = model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=True)
    assert tokens["sigma"].shape == (2, 10)
    assert torch.equal(tokens["sigma"], tokens["eager"])


@pytest.mark.filterwarnings("ignore")  # transformers' own, of many kinds
@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts"])
def test_gradient_checkpointing(name):
    """Defends: backward passes that read twice what a checkpoint gives out once."""
    sk_hf.register()
    grads = []
    for checkpoints in (False, True):
        model = tiny_model(name, 2).train()
        model.set_experts_implementation("sigma")
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(input_ids=TOKENS).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts"])
def test_autocast_computes_in_the_dtype_of_the_parameters(name):
    experts, (x, index, weights) = tiny_experts(name)
    x = x.bfloat16()
    want = sk_hf.experts_forward(experts, x.float(), index, weights).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = sk_hf.experts_forward(experts, x, index, weights.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_close(got, want, 4 * tolerance(torch.bfloat16, 32))


def test_a_fused_class_runs_in_bfloat16():
    experts, (x, index, weights) = tiny_experts()
    experts, x, weights = experts.bfloat16(), x.bfloat16(), weights.bfloat16()
    got = sk_hf.experts_forward(experts, x, index, weights)
    assert got.dtype == torch.bfloat16
    experts.config._experts_implementation = "eager"
    want = experts.float()(x.float(), index, weights.float())
    assert_close(got, want, 4 * tolerance(torch.bfloat16, 32))


def test_a_gate_put_on_the_module_runs():
    experts, inputs = tiny_experts()
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1]
    experts.config._experts_implementation = "grouped_mm"
    want = experts(*inputs)
    assert_close(sk_hf.experts_forward(experts, *inputs), want, 4 * tolerance(torch.float32, 32))


def test_expert_parallel_is_refused():
    experts, inputs = tiny_experts()
    experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="Qwen3MoeExperts: it does not take the sentinel indices"):
        sk_hf.experts_forward(experts, *inputs)


def test_a_flag_of_a_newer_release_is_refused(monkeypatch):
    assert not sk_hf.UNKNOWN_FLAGS
    monkeypatch.setitem(sk_hf.UNKNOWN_FLAGS, "has_pre_expert_norm", False)
    experts, inputs = tiny_experts()
    sk_hf.experts_forward(experts, *inputs)
    experts.has_pre_expert_norm = True
    with pytest.raises(
        NotImplementedError, match="Qwen3MoeExperts: it does not know has_pre_expert_norm=True"
    ):
        sk_hf.experts_forward(experts, *inputs)


def test_interleaved_rows_without_a_gate_of_their_own_are_refused():
    experts, inputs = tiny_experts()
    experts.is_concatenated = False
    with pytest.raises(NotImplementedError, match="interleaved gate and up rows need an _apply_gate"):
        sk_hf.experts_forward(experts, *inputs)


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts"])
def test_what_the_operations_refuse(name):
    """Defends: an index that names no expert, a dtype without kernel and mixed dtypes never give numbers."""
    experts, (x, index, weights) = tiny_experts(name)
    with pytest.raises(ValueError, match=f"expert indices must lie in 0..{E - 1}"):
        sk_hf.experts_forward(experts, x, index.index_fill(1, torch.tensor([1]), E), weights)
    with pytest.raises(TypeError, match="must have the dtype of"):
        sk_hf.experts_forward(experts, x.double(), index, weights)
    float8 = torch.float8_e4m3fn
    message = rf"cannot run {name}: no backend can run \w+ here: .* not float8_e4m3fn"
    with pytest.raises(RuntimeError, match=message):
        sk_hf.experts_forward(experts.to(float8), x.to(float8), index, weights.to(float8))


def test_fp8_experts_are_refused_by_transformers():
    sk_hf.register()
    with pytest.raises(KeyError, match="`sigma` is not a valid experts implementation"):
        ALL_FP8_EXPERTS_FUNCTIONS.get_interface("sigma", None)
