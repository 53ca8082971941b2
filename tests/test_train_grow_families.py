"""Which families of transformers `sigma grow` knows, and what it makes of their config.json and of layers that see."""

import json
import re
from pathlib import Path

import pytest
import torch
from growth_models import TOKENS, logits, save
from safetensors.torch import load_file, save_file
from sigma_train.errors import WrongInput
from sigma_train.grow_folder import Folder, grow_folder
from sigma_train.growth import grow
from sigma_train.growth_families import FAMILIES, REFUSED
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_names import parse
from sigma_train.growth_pieces import Growth
from sigma_train.growth_settings import grown_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
PLAN = LayerGrowthPlan


def test_what_transformers_has_is_known_or_refused():
    """Defends: a family of a new transformers that nobody has looked at."""
    import transformers

    says_how_many = re.compile(r"^    (num_experts_per_tok|moe_topk|moe_top_k|moe_k|top_k_experts)\b", re.M)
    missing = []
    for path in (Path(transformers.__file__).parent / "models").glob("*/configuration_*.py"):
        text = path.read_text()
        kinds = set(re.findall(r'^    model_type = "(.+)"', text, re.M))
        if says_how_many.search(text) and not kinds & (FAMILIES.keys() | REFUSED.keys()):
            missing.append(path.parent.name)
    assert not missing


def test_the_page_lists_every_family():
    page = (Path(__file__).parents[1] / "docs" / "grow.md").read_text()
    assert [name for name in (*FAMILIES, *REFUSED) if f"`{name}`" not in page] == []


def test_layers_counted_on_their_own_stay(tmp_path):
    """Defends: Qwen's `mtp.layers.0`, for the token after the next, copied as the model's layer 0, or not grown."""
    save(tmp_path / "a", "qwen3_next")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    beyond = {n.replace("model.", "mtp."): x + 1 for n, x in weights.items() if "layers.0.mlp" in n}
    save_file(weights | beyond, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    grow_folder(Folder.read(tmp_path / "a"), Growth(PLAN.interposition(3), 2), 0, 1 << 30, tmp_path / "b")
    grown = load_file(tmp_path / "b" / "model.safetensors")
    name = "mtp.layers.{}.mlp.experts.{}.up_proj.weight"
    assert name.format(1, 0) not in grown
    assert torch.equal(grown[name.format(0, 5)], beyond[name.format(0, 5)])
    copy, origin = grown[name.format(0, 11)], grown[name.format(0, 5)]
    assert 0.005 < (copy - origin).std() / origin.std() < 0.02
    noise = (
        grown[name.replace("mtp", "model").format(0, 11)] - weights[name.replace("mtp", "model").format(0, 5)]
    )
    assert not torch.allclose(noise, copy - origin, atol=1e-6)  # the draw of the model's layer 0


def test_columns_in_turn_are_told_apart(tmp_path):
    """Defends: gpt-oss' gate and up, whose columns take turns, taken for halves with one std each of both."""
    save(tmp_path / "a", "gpt_oss")
    weights, name = load_file(tmp_path / "a" / "model.safetensors"), "model.layers.0.mlp.experts.gate_up_proj"
    weights[name][..., 1::2] *= 100
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    grow_folder(Folder.read(tmp_path / "a"), Growth(PLAN.none(3), 2), 0, 1 << 30, tmp_path / "b")
    noise = load_file(tmp_path / "b" / "model.safetensors")[name][6:] - weights[name]
    shares = [noise[..., i::2].std() / weights[name][..., i::2].std() for i in (0, 1)]
    assert [float(x) for x in shares] == pytest.approx([0.01, 0.01], rel=0.1)


def test_experts_that_are_rows_of_one_matrix_are_told_apart(tmp_path):
    """Defends: DBRX' experts, taken for one with one std and one draw; growth in memory that is another."""
    save(tmp_path / "a", "dbrx")
    weights, name = load_file(tmp_path / "a" / "model.safetensors"), "transformer.blocks.1.ffn.experts.mlp.v1"
    weights[name][12:24] *= 100  # of the second of six
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    growth = Growth(PLAN.none(3), 2)
    grow_folder(Folder.read(tmp_path / "a"), growth, 0, 1 << 30, tmp_path / "b")
    grown = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(grown[name][:72], weights[name])
    gate = name.replace("v1", "w1")
    noise, of_gate = ((grown[n][72:] - weights[n]).view(6, 12 * 32) for n in (name, gate))
    former, former_gate = (weights[n].view(6, 12 * 32).std(1, correction=0) for n in (name, gate))
    assert (noise.std(1) / former).tolist() == pytest.approx([0.01] * 6, rel=0.1)
    assert not torch.allclose(noise / former[:, None], of_gate / former_gate[:, None], atol=1e-3)
    assert all(torch.equal(x, grown[n]) for n, x in grow(weights, growth).items())
    with pytest.raises(WrongInput, match="v1 has 73 rows, which 6 experts cannot share"):
        grow({**weights, name: torch.zeros(73, 32)}, growth)


def test_experts_of_attention_draw_their_own_noise(tmp_path):
    """Defends: JetMoE's two routers of a layer, whose copies would begin with the same noise."""
    save(tmp_path / "a", "jetmoe")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    grow_folder(Folder.read(tmp_path / "a"), Growth(PLAN.none(3), 2), 0, 1 << 30, tmp_path / "b")
    grown = load_file(tmp_path / "b" / "model.safetensors")
    names = [f"model.layers.0.{of}.router.layer.weight" for of in ("mlp", "self_attention.experts")]
    draws = [(grown[n][6:] - weights[n]) / weights[n].std(1, correction=0, keepdim=True) for n in names]
    assert all(0.005 < x.std() < 0.02 for x in draws)
    assert not torch.allclose(*draws, atol=1e-4)
    heads = Folder.read(tmp_path / "b").settings["num_attention_heads"]
    assert heads == 8  # 2 of keys for each of 4 experts


@pytest.mark.parametrize("name", ["llama4", "aria", "deepseek_ocr2", "nemo_speechlm", "dots3_note"])
def test_what_sees_stays_as_it_is(tmp_path, name):
    """Defends: layers of vision, which have numbers too, copied by the plan; their settings changed."""
    save(tmp_path / "a", name)
    former = Folder.read(tmp_path / "a")
    grow_folder(former, Growth(PLAN.stack(3), 2), 0, 1 << 30, tmp_path / "b")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    kept = [n for n in before if parse(n).layer is None]
    assert sum("layers." in n or "blocks." in n for n in kept) > 8
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert {n for n in after if parse(n).layer is None} == set(kept)
    grown = Folder.read(tmp_path / "b").settings
    text = grown.pop("text_config")
    assert grown == {key: value for key, value in former.settings.items() if key != "text_config"}
    assert text["num_hidden_layers"] == 6


@pytest.mark.parametrize("settings, told", [
    ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer of at least 1, found 0"),
    ({"mlp_only_layers": ["1"]}, "mlp_only_layers must be a list of layers, found ['1']"),
    ({"mlp_only_layers": 1}, "mlp_only_layers must be a list of layers, found 1"),
    ({"num_local_experts": 0}, "num_local_experts must be an integer of at least 1, found 0"),
    ({"num_experts_per_tok": None}, "num_experts_per_tok must be an integer of at least 1, found None"),
])  # fmt: skip
def test_settings_of_no_model_are_named(settings, told):
    sound = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 1}
    growth = Growth(PLAN.stack(2), 2)
    grown = grown_settings(sound | {"num_local_experts": None}, growth)
    assert (grown["num_experts"], grown["num_local_experts"], grown["num_experts_per_tok"]) == (8, None, 2)
    with pytest.raises(WrongInput, match=f"^config.json: {re.escape(told)}$"):
        grown_settings(sound | settings, growth)


SOUND = {"num_hidden_layers": 3, "num_experts_per_tok": 2, "num_experts": 8}


@pytest.mark.parametrize("settings, told", [
    ({"model_type": "lfm2_moe", "norm_topk_prob": True}, "config.json: layer_types must say of each layer what it is, "
                                                         "found none; save_pretrained writes it"),
    ({"model_type": "qwen3_next", "full_attention_interval": "4"},
     "config.json: layer_types must say of each layer what it is, found none; save_pretrained writes it"),
    ({"model_type": "glm_moe_dsa", "n_group": 1, "norm_topk_prob": True, "index_skip_topk_offset": 3},
     "config.json: indexer_types must say of each layer what it is, found none; save_pretrained writes it"),
    ({"model_type": "glm_moe_dsa", "n_group": 1, "norm_topk_prob": True, "index_topk_pattern": "FS"},
     "config.json: index_topk_pattern must have one entry for each of 3 layers, found 'FS'"),
    ({"model_type": "jamba", "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 2,
      "expert_layer_offset": 1}, "growth: expert_layer_period = 2 must tell copies of layers as it tells these; a "
                                 "stack of a multiple of it does"),
    ({"model_type": "mistral_large4", "text_config": SOUND | {"kv_source_layers": [0, 0, 2]}},
     "config.json: kv_source_layers must name each layer itself to copy layers, found [0, 0, 2]"),
    ({"model_type": "qwen4_exp", "text_config": SOUND | {"ple_layer_ids": [2]}},
     "growth: layers of ple_layer_ids can't be copied, found [2]"),
    ({"model_type": "qwen3_vl_moe", "text_config": SOUND, "vision_config": {"deepstack_visual_indexes": [8, 16]}},
     "growth: skip_first must be at least 2: images come to them by their numbers"),
    ({"model_type": "qwen3_vl_moe", "text_config": SOUND, "vision_config": {}},
     "config.json: deepstack_visual_indexes must be a list of layers, found None"),
    ({"model_type": "ernie4_5_moe", "moe_layer_start_index": 0, "moe_layer_interval": 2},
     "config.json: moe_layer_interval must be 1 to copy layers, found 2"),
    ({"model_type": "ernie4_5_moe", "moe_layer_start_index": 0, "moe_layer_end_index": 1},
     "config.json: moe_layer_end_index must be the last layer to copy, found 1"),
    ({"model_type": "llama4_text", "no_rope_layers": [1, 1, 0], "moe_layers": 2},
     "config.json: moe_layers must be a list of layers, found 2"),
    ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 4}, "config.json: hidden_size_per_layer_input must "
                                                                      "be 0 to copy layers, found 4"),
    ({"model_type": "dbrx", "n_layers": 3, "ffn_config": {
        "moe_num_experts": 8, "moe_top_k": 2, "moe_normalize_expert_weights": 2}},
     "config.json: moe_normalize_expert_weights must be 1 to copy experts, found 2"),
    ({"model_type": "dbrx", "n_layers": 3}, "config.json: ffn_config must hold settings, found None"),
    ({"model_type": "minimax"}, "growth: layers of a minimax can't be copied: its linear attention decays by a "
                                "layer's number"),
    ({"model_type": "cohere2_moe", "expert_selection_fn": "tanh", "norm_topk_prob": True, "layer_types": ["a"] * 3,
      "mlp_layer_types": ["sparse"] * 3}, "config.json: expert_selection_fn must be softmax or sigmoid, found 'tanh'"),
])  # fmt: skip
def test_layers_or_gates_that_cannot_be_said_are_named(settings, told):
    with pytest.raises(WrongInput, match=f"^{re.escape(told)}$"):
        grown_settings(SOUND | settings, Growth(PLAN.interposition(3), 2))


RULES = [(name, key) for name, family in FAMILIES.items() for key in family.rules]


@pytest.mark.parametrize("name, key", RULES)
def test_a_list_that_is_not_there_is_made_as_transformers_makes_it(name, key):
    """Defends: a period that begins elsewhere, a default that is another family's."""
    from transformers import AutoConfig

    family, different = FAMILIES[name], set()
    rule = family.rules[key]
    for n in (1, 2, 5, 13):
        for value in (None, 1, 3, 5) if rule.key else (None,):
            model = {"num_hidden_layers": n} | ({} if value is None else {rule.key: value})
            config = AutoConfig.for_model(
                name, **({family.inside: model} if family.inside else model)
            ).to_dict()
            want = config.get(family.inside, config)[key]
            assert rule.made(model, n) == want
            different.add(tuple(want))
    assert len(different) >= 4


def test_a_hub_folder_without_lists_grows(tmp_path):
    """Defends: a list that is made of the grown model's number of layers, or not at all."""
    save(tmp_path / "a", "qwen3_next")
    told = json.loads((tmp_path / "a" / "config.json").read_text())
    assert told.pop("layer_types") == ["linear_attention", "full_attention", "linear_attention"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(told | {"full_attention_interval": 2}))
    growth = Growth(PLAN.interposition(3), zero_outputs=True)
    grow_folder(Folder.read(tmp_path / "a"), growth, 0, 1 << 30, tmp_path / "b")
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


@pytest.mark.parametrize("name, key, letters, listed", [
    ("nemotron_h", "hybrid_override_pattern", "MEM*E", "layers_block_type"),
    ("glm_moe_dsa", "index_topk_pattern", "FSFFS", "indexer_types"),
    ("mistral_large4", "index_topk_pattern", "FSFFS", "indexer_types"),
])  # fmt: skip
def test_a_letter_for_each_layer_follows_the_plan(name, key, letters, listed):
    """Defends: letters that stay as they are beside more layers, layers that attend where a copy of nothing chose."""
    from transformers import AutoConfig

    inside = FAMILIES[name].inside

    def of(settings):
        config = AutoConfig.for_model(
            name, **{key: x for key, x in settings.items() if key != "model_type"}
        ).to_dict()
        return config.get(inside, config)[listed]

    model = {
        "num_hidden_layers": 5,
        key: letters,
        "n_group": 1,
        "norm_topk_prob": True,
        "first_k_dense_replace": 0,
    }
    settings = {"model_type": name} | ({inside: model} if inside else model)
    plan = PLAN.stack(5, 2, 1)
    grown = grown_settings(settings, Growth(plan))
    assert len(set(of(settings))) > 1
    assert of(grown) == [of(settings)[source] for source in plan.sources]
    if "S" in letters:
        with pytest.raises(WrongInput, match="some layers attend where the last one did that chose"):
            grown_settings(settings, Growth(plan, zero_outputs=True))


def test_images_come_to_the_layers_that_they_came_to(tmp_path):
    """Defends: Qwen3-VL's first layers, each of which adds what the vision has for its number, moved or copied."""
    from transformers import AutoModelForImageTextToText

    save(tmp_path / "a", "qwen3_vl_moe")
    growth = Growth(PLAN.stack(3, 2, 1), 2, 0.0, zero_outputs=True)
    grow_folder(Folder.read(tmp_path / "a"), growth, 0, 1 << 30, tmp_path / "b")
    is_image = TOKENS % 3 == 0
    seen = torch.randn(int(is_image.sum()), 32, generator=torch.Generator().manual_seed(0))
    found = []
    for folder in ("a", "b"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / folder, experts_implementation="eager")
        inner = model.model.language_model
        with torch.no_grad():
            x = inner.embed_tokens(TOKENS)
            of = [
                inner(
                    inputs_embeds=x, visual_pos_masks=is_image, deepstack_visual_embeds=[seen * scale]
                ).last_hidden_state
                for scale in (0, 1)
            ]
        found.append(of)
    (blind, want), (_, got) = found
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (blind - want).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize("name", [
    "talker.model.layers.0.mlp.experts.3.up_proj.weight", "talker.code_predictor.model.layers.0.mlp.up_proj.weight",
    "code2wav.pre_transformer.layers.0.mlp.up_proj.weight", "perception.encoder.asr_encoder.layers.0.norm1.weight",
    "ctc_timestamp.decoder.transformer.layers.0.norm1.weight", "model.vision_model.blocks.0.attn.proj.weight",
])  # fmt: skip
def test_what_sees_hears_or_speaks_has_no_layers_of_the_model(name):
    assert parse(name).layer is None


def test_numbers_of_layers_follow_the_plan():
    """Defends: Qwen4's embeddings, counted from one, at a layer that has none."""
    settings = {"model_type": "qwen4_exp", "text_config": SOUND | {"ple_layer_ids": [3]}}
    grown = grown_settings(settings, Growth(PLAN.interposition(3, 2, 0, 1)))
    assert grown["text_config"]["ple_layer_ids"] == [5]


def test_shared_experts_are_no_attention():
    """Defends: two parts of an MLP, counted as attention and MLP, where outputs of attention are not known."""
    state = {
        "layers.0.attention.w.weight": torch.zeros(2, 2),
        "layers.0.shared_experts.w2.weight": torch.zeros(2, 2),
    }
    state |= {f"layers.0.experts.{e}.w2.weight": torch.zeros(2, 2) for e in range(2)}
    with pytest.raises(
        WrongInput, match="zero_outputs wants the outputs of attention and MLP, not found in layer 1"
    ):
        grow(state, Growth(PLAN.stack(1), zero_outputs=True))


def test_a_layer_list_may_go_on_beyond_the_model():
    """Defends: entries for tokens after the next that are lost, or copied."""
    settings = {
        "model_type": "qwen3_next",
        "num_nextn_predict_layers": 1,
        "layer_types": ["a", "b", "c", "d"],
    }
    grown = grown_settings(SOUND | settings, Growth(PLAN.interposition(3)))
    assert grown["layer_types"] == ["a", "a", "b", "b", "c", "c", "d"]
