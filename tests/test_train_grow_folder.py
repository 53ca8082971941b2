"""`sigma grow` on folders of transformers: every family that is known, any dtype, files of any size, bounded memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import forked
import growth_memory
import pytest
import torch
from growth_models import SETTINGS, TOKENS, logits, save
from safetensors.torch import load_file, save_file
from sigma_train import grow_folder as writing
from sigma_train.errors import Stopped, WrongInput
from sigma_train.export import export_to_transformers
from sigma_train.grow_folder import Folder, active_parameters, grow_folder
from sigma_train.grow_run import Base, grow_run
from sigma_train.growth_families import FAMILIES
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth
from sigma_train.growth_settings import GROUPS, family_of, num_layers, top_k
from sigma_train.tensor_files import stored_tensors
from support import assert_one_sentence, sigma
from test_train_export import make_run

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
PLAN = LayerGrowthPlan


def growth_of(folder: Path, plan: Callable[[int], LayerGrowthPlan] = PLAN.none, *how: object) -> Growth:
    return Growth(plan(num_layers(Folder.read(folder).settings)), *how)


def test_every_known_family_is_tried():
    assert {family for family, _ in SETTINGS.values()} == set(FAMILIES)


# One of each way of growth with every `pytest`; the rest, a minute, by -m acceptance, in .ci/run.
USUAL = {
    "afmoe", "cohere2_moe, gates not normalised", "deepseek_v2", "deepseek_v3", "deepseek_v3, gates not normalised",
    "gemma4", "gpt_oss", "granitemoe", "llama4_text", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen3_moe",
    "qwen3_moe, dense layers named", "qwen3_next",
}  # fmt: skip


def test_the_usual_families_are_among_all():
    assert SETTINGS.keys() >= USUAL


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in USUAL else pytest.mark.acceptance) for name in SETTINGS]
)
def test_a_grown_model_computes_the_same(tmp_path, name):
    """Defends, for each family that is claimed: names, numbers of experts in config.json, gates, groups, biases; layers
    that are dense or sparse, or of another kind of attention, where their origin is not.
    """
    save(tmp_path / "a", name)
    routes = []
    folder, want = Folder.read(tmp_path / "a"), logits(tmp_path / "a", routes)
    assert len(routes) > 0
    # Or nothing were chosen.
    least = 1 if top_k(folder.settings) == 1 else 3
    assert all(len(x.reshape(40, -1).sort().values.unique(dim=0)) > least for x in routes)
    family = family_of(folder.settings)

    def grown(plan: LayerGrowthPlan, *how: object, **more: object) -> torch.Tensor:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        grow_folder(folder, Growth(plan, *how, **more), 0, 1 << 30, out)
        assert num_layers(Folder.read(out).settings) == len(plan.sources)
        return logits(out)

    model = folder.settings.get(family.inside, folder.settings)
    has_groups = max(model.get(key) or 1 for key in GROUPS) > 1
    if family.no_experts:
        with pytest.raises(WrongInput, match=f"^growth: .+ can't have more experts: {family.no_experts}$"):
            grown(PLAN.none(3), 2)
    else:
        wider = grown(PLAN.none(3), 3, 0.0, interleave=not has_groups)
        assert (wider - want).abs().max() < 1e-5 * want.abs().max()
        noisy = grown(PLAN.none(3), 2, 1e-3)
        assert 1e-6 < (noisy - want).abs().mean() / want.abs().mean() < 0.05
    is_kept = not (family.no_copies or family.no_zeros or "indexers shared" in name)
    if is_kept:
        deeper = grown(PLAN.stack(3, 2, 1), zero_outputs=True)
        assert (deeper - want).abs().max() < 1e-5 * want.abs().max()
    has_first = bool(family.skip_first or model.get("ple_layer_ids"))
    deeper = PLAN.interposition(3, 2, int(has_first))
    if has_first:
        told = r"skip_first must be at least 1: |layers of ple_layer_ids can't be copied"
        with pytest.raises(WrongInput, match=told):
            grown(PLAN.stack(3))
    if family.periods:
        with pytest.raises(WrongInput, match="attn_layer_period = 2 must tell copies of layers as it tells"):
            grown(deeper)
        deeper = PLAN.stack(3, 2, 1)
    if family.no_copies:
        with pytest.raises(WrongInput, match=f"^growth: layers of a .+ can't be copied: {family.no_copies}$"):
            grown(deeper)
    elif not is_kept:
        with pytest.raises(WrongInput, match="growth: zero_outputs would not keep what a"):
            grown(deeper, zero_outputs=True)
        assert grown(deeper).isfinite().all()
    else:
        assert torch.equal(grown(deeper, zero_outputs=True), want)


def test_without_zeros_a_deeper_model_is_its_plan(tmp_path):
    """Defends: layers in another order than the plan's; against the same layers put together in transformers."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    save(tmp_path / "a", "olmoe")
    stale = {
        "weight_map": {"model.gone": "gone.safetensors"}
    }  # which transformers does not read beside a whole file
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(stale))
    plan = PLAN.stack(3, 2, 1)
    grow_folder(Folder.read(tmp_path / "a"), Growth(plan), 0, 1 << 30, tmp_path / "b")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", experts_implementation="eager")
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in plan.sources)
    model.config.num_hidden_layers = len(plan.sources)
    with torch.no_grad():
        want = model(TOKENS, use_cache=False).logits
    assert torch.equal(logits(tmp_path / "b"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_dtype_in_files_of_any_size(tmp_path, dtype):
    """Defends: noise on originals, a dtype that changes, tensors lost between files, an index that names others."""
    save(tmp_path / "a", "mixtral", dtype, max_shard_size="50KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    growth = growth_of(tmp_path / "a", PLAN.interposition, 2)
    for name, size in (("one", 1 << 30), ("many", 20_000)):
        grow_folder(Folder.read(tmp_path / "a"), growth, 0, size, tmp_path / name)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 10
    assert all(path.stat().st_size < 24_000 or len(load_file(path)) == 1 for path in files)
    parts = {name: (path.name, x) for path in files for name, x in load_file(path).items()}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in parts.items()}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert whole.keys() == parts.keys()
    assert all(torch.equal(x, parts[name][1]) and x.dtype == dtype for name, x in whole.items())
    former = {n: x for path in (tmp_path / "a").glob("*.safetensors") for n, x in load_file(path).items()}
    name = "model.layers.{}.block_sparse_moe.experts.{}.w2.weight"
    assert torch.equal(whole[name.format(3, 5)], former[name.format(1, 5)])
    copy, origin = whole[name.format(3, 11)].double(), former[name.format(1, 5)].double()
    assert 0.008 < (copy - origin).std() / origin.std() < 0.0125
    assert logits(tmp_path / "many").isfinite().all()


def test_fused_experts_grow_as_single_ones_do(tmp_path):
    """Defends: rows of a fused tensor taken for those of another expert, noise that depends on the layout."""
    save(tmp_path / "single", "qwen3_moe")
    save(tmp_path / "fused", "qwen3_moe", save_original_format=False)
    assert any("experts.gate_up_proj" in name for name in Folder.read(tmp_path / "fused").tensors)
    for name in ("single", "fused"):
        growth = growth_of(tmp_path / name, PLAN.stack, 2)
        grow_folder(Folder.read(tmp_path / name), growth, 0, 1 << 30, tmp_path / f"{name}-out")
    assert torch.equal(logits(tmp_path / "fused-out"), logits(tmp_path / "single-out"))


def test_growth_and_export_commute(tmp_path):
    """Defends: two ways of growth that differ between our checkpoints and transformers'."""
    make_run(tmp_path / "run", "model.top_k=2", "router.normalize=true")
    growth = Growth(PLAN.interposition(2), 2)
    grow_run(Base.named(tmp_path / "run"), growth, "reset", tmp_path / "grown")
    export_to_transformers(tmp_path / "grown", tmp_path / "one")
    export_to_transformers(tmp_path / "run", tmp_path / "exported")
    grow_folder(Folder.read(tmp_path / "exported"), growth, 0, 1 << 30, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert settings[0] == settings[1]
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (
        tmp_path / "one" / "tokenizer.json"
    ).read_bytes()


def test_layers_beyond_the_model_stay_beyond(tmp_path):
    """Defends: DeepSeek's layer of the token after next, which no config counts, taken for one of the model."""
    save(tmp_path / "a", "deepseek_v3")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    weights |= {n.replace(".2.", ".3."): x + 1 for n, x in weights.items() if n.startswith("model.layers.2.")}
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    grow_folder(
        Folder.read(tmp_path / "a"),
        growth_of(tmp_path / "a", PLAN.interposition, 2),
        0,
        1 << 30,
        tmp_path / "b",
    )
    grown = load_file(tmp_path / "b" / "model.safetensors")
    name = "model.layers.{}.mlp.experts.7.up_proj.weight"
    assert torch.equal(grown[name.format(6)], weights[name.format(3)])
    assert name.format(7) not in grown


def test_the_command_keeps_a_ledger(cache, tmp_path):
    """Defends: FLOPs of all experts for those of the active ones, a second growth that forgets the first."""
    save(tmp_path / "a", "mixtral")
    active = active_parameters(Folder.read(tmp_path / "a"))
    weights = load_file(tmp_path / "a" / "model.safetensors")
    of_experts = sum(x.numel() for name, x in weights.items() if ".experts." in name)
    assert active == sum(x.numel() for x in weights.values()) - of_experts * 4 / 6
    (tmp_path / "a" / "LICENSE").write_text("as before")
    (tmp_path / "a" / "pytorch_model.bin").write_text("the same weights again")
    args = ["--depth", "interposition", "--experts", "2", "--sunk-tokens", "1000", "--norms"]
    result = sigma("grow", "a", "--out", "b", *args, env=cache, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{6 * active * 1000:.3g} FLOPs are sunk in its weights; from_pretrained reads it" in result.stdout
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        *("config.json", "generation_config.json", "growth.json", "LICENSE", "model.safetensors")
    }
    grown = active_parameters(Folder.read(tmp_path / "b"))
    args = ["--experts", "2", "--sunk-tokens", "500", "--shard-gb", "0.0001"]
    assert sigma("grow", "b", "--out", "c", *args, env=cache, cwd=tmp_path).returncode == 0
    ledger = json.loads((tmp_path / "c" / "growth.json").read_text())
    assert ledger["flops"] == 6 * active * 1000 + 6 * grown * 500
    assert [entry["sunk_flops"] for entry in ledger["history"]] == [6 * active * 1000, ledger["flops"]]
    settings = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (settings["num_local_experts"], settings["num_experts_per_tok"]) == (24, 8)
    assert logits(tmp_path / "c").isfinite().all()


def broken(folder: Path, what: str) -> None:
    """A sound folder with one thing wrong."""
    save(folder, "olmoe")
    settings, weights = folder / "config.json", folder / "model.safetensors"
    told = json.loads(settings.read_text())
    match what:
        case "family":
            settings.write_text(json.dumps(told | {"model_type": "llama"}))
        case "refused":
            settings.write_text(json.dumps(told | {"model_type": "inkling2"}))
        case "inside":
            settings.write_text(json.dumps(told | {"model_type": "llama4"}))
        case "quantised":
            settings.write_text(json.dumps(told | {"quantization_config": {"bits": 4}}))
        case "count":
            settings.write_text(json.dumps(told | {"num_experts": 5}))
        case "layers":
            settings.write_text(json.dumps(told | {"num_hidden_layers": "3"}))
        case "list":
            settings.write_text(json.dumps(told | {"layer_types": ["full_attention"]}))
        case "layer":
            settings.write_text(json.dumps(told | {"num_hidden_layers": 4, "layer_types": None}))
        case "gates":
            without = {key: value for key, value in told.items() if key != "norm_topk_prob"}
            gates = {"first_k_dense_replace": 0, "n_group": 1, "routed_scaling_factor": 2.5}
            settings.write_text(json.dumps(without | gates | {"model_type": "deepseek_v3"}))
        case "kind":
            settings.write_text(json.dumps(told | {"model_type": ["olmoe"]}))
        case "none":
            settings.write_text(json.dumps(told | {"num_experts": 0}))
        case "ledger":
            (folder / "growth.json").write_text(json.dumps({"flops": 1.0}))
        case "map":
            weights.rename(folder / "model-1.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
        case "json":
            settings.write_text("{")
        case "no weights":
            weights.rename(folder / "model.bin")
        case "cut":
            os.truncate(weights, weights.stat().st_size - 4)
        case "header":
            weights.write_bytes(b"\xff" * 8)
        case "dtype":
            state = load_file(weights)
            name = "model.layers.0.mlp.experts.0.up_proj.weight"
            save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, weights)
        case "index":
            weights.rename(folder / "model-1.safetensors")
            index = {"weight_map": {"model.gone": "model-1.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "complex":
            save_file(load_file(weights) | {"model.phase": torch.ones(1, dtype=torch.complex64)}, weights)
        case "unknown":
            save_file(load_file(weights) | {"model.layers.0.mlp.experts.bias": torch.ones(6)}, weights)


BROKEN = {
    "family": f"config.json: model_type must be one of the {len(FAMILIES)} families whose gates are known here "
    "(docs/grow.md), found 'llama'",
    "refused": "config.json: inkling2 can't grow: its layers read those before them by their numbers, and its "
    "checkpoints are quantised",
    "quantised": "config.json: quantization_config: weights must be floating-point numbers, not quantised",
    "count": "config.json has 5 experts, the tensors of layer 0 are of 6",
    "layers": "config.json: num_hidden_layers must be an integer of at least 1, found '3'",
    "list": "config.json: layer_types must have one entry for each of 3 layers, found ['full_attention']",
    "layer": "config.json has 4 layers, no tensor is of layer 3",
    "gates": "config.json: norm_topk_prob must be given for a deepseek_v3, found none",
    "kind": f"config.json: model_type must be one of the {len(FAMILIES)} families whose gates are known here "
    "(docs/grow.md), found ['olmoe']",
    "inside": "config.json: text_config must hold settings, found None",
    "none": "config.json: num_experts must be an integer of at least 1, found 0",
    "ledger": "a/growth.json must hold flops and history, as sigma grow writes them",
    "map": "a/model.safetensors.index.json must have a weight_map, the file of each tensor",
    "json": "a/config.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    "no weights": "a/model.safetensors is missing; weights must be safetensors",
    "cut": "a/model.safetensors is no sound safetensors file: {} lies beyond its end",
    "header": "a/model.safetensors is no sound safetensors file: its header lies beyond its end",
    "dtype": "model.layers.0.mlp.experts.0.up_proj.weight is F8_E4M3; what changes must be one of F64, F32, BF16, F16",
    "index": "a/model.safetensors.index.json names model.gone, which is in none of its files",
    "complex": "a/model.safetensors: model.phase must be one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, "
    "I8, U8, BOOL, found 'C64'",
    "unknown": "growth: model.layers.0.mlp.experts.bias is no tensor of experts whose layout is known",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_cannot_grow_is_named(cache, tmp_path, what):
    broken(tmp_path / "a", what)
    args = ("--depth", "stack", "--experts", "2")
    result = sigma("grow", "a", "--out", "b", *args, env=cache, cwd=tmp_path)
    last = result.stderr.partition("file: ")[2].partition(" ")[0]
    assert_one_sentence(result, 2, BROKEN[what].format(last))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_plan_that_config_json_cannot_say_is_named(tmp_path):
    """Defends: dense layers in the middle of a DeepSeek stack, groups whose best experts are an expert and its copy."""
    save(tmp_path / "a", "deepseek_v3")
    folder = Folder.read(tmp_path / "a")
    with pytest.raises(WrongInput, match="skip_first must be at least 1"):
        grow_folder(folder, Growth(PLAN.stack(3)), 0, 1, tmp_path / "b")
    with pytest.raises(WrongInput, match="n_group = 4 groups"):
        grow_folder(folder, Growth(PLAN.none(3), 2, interleave=True), 0, 1, tmp_path / "b")
    with pytest.raises(WrongInput, match="the plan is of 4 layers, config"):
        grow_folder(folder, Growth(PLAN.none(4), 2), 0, 1, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), Stopped(15)], ids=["full", "signal"]
)
def test_a_write_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch, fault):
    """Defends: half a folder under the name that was asked for, or beside it."""
    save(tmp_path / "a", "olmoe")

    def header_of(tensors):
        if "lm_head.weight" in tensors or "model.norm.weight" in tensors:
            raise fault
        return original(tensors)

    original = writing.header_of
    monkeypatch.setattr(writing, "header_of", header_of)
    with pytest.raises(type(fault)):
        grow_folder(
            Folder.read(tmp_path / "a"), growth_of(tmp_path / "a", PLAN.stack, 2), 0, 10_000, tmp_path / "b"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_memory_is_that_of_a_few_matrices(tmp_path):
    """Defends: a file or a fused tensor that is read, mapped or kept whole: 64 MB grow to 256 MB."""
    for name, layers, I in (("small", 1, 16), ("large", 2, 1024)):
        E, H = 8, 640
        state = {"lm_head.weight": torch.zeros(64, H)}
        for i in range(layers):
            prefix = f"model.layers.{i}.mlp."
            state[f"{prefix}gate.weight"] = torch.randn(E, H)
            state[f"{prefix}experts.gate_up_proj"] = torch.randn(E, 2 * I, H, dtype=torch.bfloat16)
            state[f"{prefix}experts.down_proj"] = torch.randn(E, H, I, dtype=torch.bfloat16)
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        settings = {
            "model_type": "olmoe",
            "num_hidden_layers": layers,
            "num_experts": E,
            "num_experts_per_tok": 1,
        }
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    forked.spawn(growth_memory.measure, ("folder", tmp_path), 1)
    peak = json.loads((tmp_path / "peak.json").read_text())["peak_bytes"]
    grown = tmp_path / "large-grown" / "model.safetensors"
    one_expert = 2 * 1024 * 640 * 4  # of gate and up, f32
    assert grown.stat().st_size > 240e6
    assert peak < 6 * one_expert < grown.stat().st_size / 7
    tensors = stored_tensors(grown)
    assert tensors["model.layers.3.mlp.experts.down_proj"].shape == (16, 640, 1024)
