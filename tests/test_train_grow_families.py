"""Which families of transformers `sigma grow` knows, and what it makes of their config.json and of layers that see."""

import re
from pathlib import Path

import pytest
import torch
from growth_models import save
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


@pytest.mark.parametrize("name", ["llama4", "aria", "deepseek_ocr2"])
def test_what_sees_stays_as_it_is(tmp_path, name):
    """Defends: layers of vision, which have numbers too, copied by the plan; their settings changed."""
    save(tmp_path / "a", name)
    former = Folder.read(tmp_path / "a")
    grow_folder(former, Growth(PLAN.stack(3), 2), 0, 1 << 30, tmp_path / "b")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    kept = [n for n in before if parse(n).layer is None]
    assert sum("layers." in n for n in kept) > 8
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert {n for n in after if parse(n).layer is None} == set(kept)
    grown = Folder.read(tmp_path / "b").settings
    text = grown.pop("text_config")
    assert grown == {key: value for key, value in former.settings.items() if key != "text_config"}
    assert text["num_hidden_layers"] == 6


@pytest.mark.parametrize("settings, told", [
    ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer of at least 1, found 0"),
    ({"mlp_only_layers": 1}, "mlp_only_layers must be a list of layers, found 1"),
    ({"num_local_experts": 0}, "num_local_experts must be an integer of at least 1, found 0"),
    ({"num_experts_per_tok": None}, "num_experts_per_tok must be an integer of at least 1, found None"),
])  # fmt: skip
def test_settings_of_no_model_are_named(settings, told):
    sound = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 1}
    growth = Growth(PLAN.stack(2), 2)
    grown = grown_settings(sound | {"num_local_experts": None}, growth)
    assert (grown["num_experts"], grown["num_local_experts"], grown["num_experts_per_tok"]) == (8, None, 2)
    with pytest.raises(WrongInput, match=f"^config.json: {told}$"):
        grown_settings(sound | settings, growth)


SOUND = {"num_hidden_layers": 3, "num_experts_per_tok": 2, "num_experts": 8}


@pytest.mark.parametrize("settings, told", [
    ({"model_type": "qwen3_next"}, "config.json: layer_types must say of each layer what it is, found none; "
                                   "save_pretrained writes it"),
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


def test_a_layer_list_may_go_on_beyond_the_model():
    """Defends: entries for tokens after the next that are lost, or copied."""
    settings = {
        "model_type": "qwen3_next",
        "num_nextn_predict_layers": 1,
        "layer_types": ["a", "b", "c", "d"],
    }
    grown = grown_settings(SOUND | settings, Growth(PLAN.interposition(3)))
    assert grown["layer_types"] == ["a", "a", "b", "b", "c", "c", "d"]
