"""One model at several numbers of experts a token: what each loses, a search of layers' k, export at a chosen one."""

import json
import math
import re
import shutil

import pytest
import torch
from rich.console import Console
from sigma_cli.commands import app
from sigma_train import elastic as el
from sigma_train import elastic_view, loop
from sigma_train.config import ConfigError, load_config
from sigma_train.elastic_allocation import allocate
from sigma_train.elastic_search import even, front, search, walk
from sigma_train.errors import WrongInput
from sigma_train.expert_counts import ExpertCounts
from sigma_train.export import export_to_transformers
from sigma_train.folder import claimed
from sigma_train.loop import Trainer
from sigma_train.metrics import read_metrics
from sigma_train.model import LanguageModel, flops_per_token
from test_train_export import make_run
from typer.testing import CliRunner

SMALL = [
    *("data.max_bytes=200000", "train.batch_size=2", "train.steps=10", "train.save_every=5"),
    *("train.eval_every=10", "model.num_layers=3", "router.normalize=true"),
]
DRAWN = ["sparsity.sample=[1, 2, 4]", "model.top_k=4", "router.normalize_one=true"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def train(tmp_path_factory, cache):
    """A function that trains a small run and gives its folder."""

    def run(name: str, *settings: str):
        out = tmp_path_factory.mktemp("runs") / name
        shared = [*SMALL, f"data.cache_dir={cache}"]
        config = load_config("smoke", None, [*shared, *settings], {"train": {"out": str(out)}})
        with pytest.MonkeyPatch.context() as patch, claimed(out):
            patch.setattr(loop, "dense_tokens_per_s", lambda config: 1.0)
            trainer = Trainer(config, Console(quiet=True), resume=False)
            with trainer.ledger:
                trainer.run()
        return out

    return run


@pytest.fixture(scope="module")
def matryoshka(train):
    return train("matryoshka", *DRAWN)


def sigma(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def refused(*arguments: object) -> str:
    """The one sentence of a command that refuses its input."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code != 0
    return str(result.exception) if str(result.exception) != "2" else result.output


def weights_at(model: LanguageModel, top_k: int) -> list[float]:
    """The sum of each token's weights in each layer."""
    model.set_top_k(top_k)
    with torch.no_grad():
        model(torch.randint(0, 500, (1, 40)))
    return [w for moe in model.moe_layers() for w in moe.last_routing.weights.sum(1).tolist()]


def test_weights_add_up_to_one_at_every_k():
    """Defends: a model that adds less to its residual stream the fewer experts it is given."""
    model = LanguageModel(load_config("smoke", None, ["model.top_k=4", "router.normalize=true"]))
    for k in range(1, 9):
        assert weights_at(model, k) == pytest.approx([1.0] * 80)


def test_a_run_at_one_expert_keeps_the_routers_gradient_unless_it_is_asked_for():
    """Defends: another weight of the one in validation than in training, or a router that is not trained unawares."""
    drawn = ["sparsity.sample=[1, 2]", "model.top_k=2", "router.normalize=true"]
    model = LanguageModel(load_config("smoke", None, drawn))
    assert max(weights_at(model, 1)) < 0.5
    assert weights_at(model, 2) == pytest.approx([1.0] * 80)
    asked = LanguageModel(load_config("smoke", None, [*drawn, "router.normalize_one=true"]))
    assert weights_at(asked, 1) == pytest.approx([1.0] * 80)
    plain = LanguageModel(load_config("smoke", None, ["model.top_k=2"]))
    assert max(weights_at(plain, 1)) < max(weights_at(plain, 2)) < 1


def test_set_top_k_of_one_number_and_of_a_list():
    model = LanguageModel(load_config("smoke", None, ["model.num_layers=3"]))
    model.set_top_k(5)
    assert [moe.router.top_k for moe in model.moe_layers()] == [5, 5, 5]
    model.set_top_k([1, 8, 3])
    assert [moe.router.top_k for moe in model.moe_layers()] == [1, 8, 3]
    for wrong, told in (
        (9, "top_k must lie in 1..8, found 9"),
        ([0, 1, 1], "top_k must lie in 1..8, found [0, 1, 1]"),
        ([1, 1], "top_k must have one entry for each of 3 layers, found [1, 1]"),
    ):
        with pytest.raises(ValueError, match=f"^set_top_k: {re.escape(told)}$"):
            model.set_top_k(wrong)
    assert [moe.router.top_k for moe in model.moe_layers()] == [1, 8, 3]
    with pytest.raises(ValueError, match="the model is dense"):
        LanguageModel(load_config("smoke-dense", None, [])).set_top_k(1)


def test_one_k_to_draw_from_is_a_fixed_k(train):
    """Bit for bit: the draws of a single k change nothing of the run."""
    short = ("train.steps=4", "train.eval_every=4", "model.num_layers=2", "model.top_k=2")
    fixed, drawn = train("fixed", *short), train("drawn", *short, "sparsity.sample=[2]")
    losses = [
        [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
        for run in (fixed, drawn)
    ]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_budget_of_a_run():
    """Defends: draws above the budget, an MFU of the law without it, a budget that no draw keeps."""
    settings = ["sparsity.sample=[1, 2, 4]", "sparsity.budget=3", "model.num_layers=3", "train.steps=50"]
    with pytest.raises(
        ConfigError, match=r"sparsity.budget must be at least 4, 1 in each of 4 layers, found 3"
    ):
        ExpertCounts(load_config("smoke", None, [*settings, "model.num_layers=4"]))
    assert ExpertCounts(load_config("smoke", None, settings)).mean(0, 50) == (1, 1, 1)
    counts = ExpertCounts(load_config("smoke", None, [*settings, "sparsity.budget=7"]))
    drawn = [counts.of_batch(step, 0) for step in range(50)]
    assert max(map(sum, drawn)) == 7
    assert counts.mean(0, 50) == tuple(sum(layer) / 50 for layer in zip(*drawn, strict=True))
    with pytest.raises(
        ConfigError, match=r'sparsity\.budget is of sparsity.sample with sparsity.granularity = "layer"'
    ):
        load_config("smoke", None, [*settings, "sparsity.granularity=global"])


def test_which_k_a_run_has_seen():
    """Of phases those until the checkpoint; of draws all; beyond a layer's largest is extrapolation."""

    def seen(steps: int, *settings: str):
        return ExpertCounts(load_config("smoke", None, [*settings, "train.steps=10"])).seen(steps)

    phases = "sparsity.phases=[[0, [4, 2]], [0.5, [1, 1], 0.8]]"
    assert seen(5, phases) == ({4}, {2})
    assert seen(7, phases) == ({4, 3}, {2})
    assert seen(10, phases) == ({4, 3, 2, 1}, {2, 1})
    assert seen(0, phases) == ({4}, {2})
    assert seen(3, "sparsity.sample=[1, 4]") == ({1, 4}, {1, 4})
    assert seen(3, "sparsity.sample=[1, 2, 4]", "sparsity.budget=3") == ({1, 2}, {1, 2})
    assert seen(3, "sparsity.sample=[1, 2, 4]", "sparsity.budget=5") == ({1, 2, 4}, {1, 2, 4})
    assert seen(3, "model.top_k=[2, 3]") == ({2}, {3})
    elastic = el.Elastic(None, 0, None, None, None, (frozenset({1, 4}), frozenset({1, 2})))
    assert [elastic.standing(p) for p in [(4, 2), (2, 2), (1, 1), (4, 4), (5, 1)]] == [
        "trained", "between", "trained", "beyond", "beyond"
    ]  # fmt: skip
    assert elastic_view.trained_at(elastic).startswith("trained at k = layer by layer: 1, 4; 1, 2;")


def test_measure_is_the_runs_own_validation(matryoshka):
    """Defends: other batches, other units, the k of the plan before, counts of one batch."""
    elastic = el.load(matryoshka)
    text = elastic.batches()
    (want,) = (
        row["val_bits_per_byte"]
        for row in read_metrics(matryoshka / "metrics.jsonl")
        if "val_bits_per_byte" in row
    )
    at = {k: el.measure(elastic, elastic.uniform(k), text) for k in (1, 4, 2)}
    assert at[4].bits_per_byte == pytest.approx(want, rel=1e-12)
    assert len({m.bits_per_byte for m in at.values()}) == 3
    tokens = sum(inputs.numel() for inputs, _ in text)
    for k, m in at.items():
        assert m.counts.sum(1).tolist() == [k * tokens] * 3
        assert m.active_parameters == elastic.model.active_parameters([k] * 3)
        assert 3 * m.flops == pytest.approx(flops_per_token(elastic.model, elastic.config, [k] * 3), rel=1e-5)
    assert at[1].active_parameters < at[2].active_parameters < at[4].active_parameters
    inputs, targets = text[0]
    elastic.model.set_top_k(2)
    with torch.no_grad():
        told = elastic.model(inputs).log_softmax(-1).gather(-1, targets[..., None])
    assert at[2].nats[0] == pytest.approx(-told.sum().item(), rel=1e-5)
    mixed = el.measure(elastic, (1, 4, 2), text)
    assert mixed.counts.sum(1).tolist() == [tokens, 4 * tokens, 2 * tokens]


def test_a_loss_that_is_no_number_is_named(matryoshka):
    """Defends: a table of NaN, or a JSON file that no number fits in, after minutes of measuring."""
    elastic = el.load(matryoshka)
    with torch.no_grad():
        elastic.model.layers[1].mlp.experts.down_proj[3] = math.nan
    with pytest.raises(WrongInput, match="step-00000010 has no finite loss at k = 8,8,8, found nan"):
        el.measure(elastic, (8, 8, 8), elastic.batches(1))


def test_load_by_hand():
    """Two layers: all tokens on one of four experts, and 4, 2, 2, 0."""
    m = el.Measured((1, 1), (1.0,), 1, torch.tensor([[8, 0, 0, 0], [4, 2, 2, 0]]), 0, 0)
    load = m.load()
    assert load["most"] == [3, 1]
    assert load["least"] == [-1, -1]
    assert load["mean_deviation"] == [1.5, 0.5]
    assert load["entropy"] == pytest.approx([0, 0.75])
    assert load["dead"] == [3, 1]


def test_difference_and_its_error_by_hand():
    """Nats 1, 2, 6 against 0, 2, 4 on 7 bytes: 3 more in all, deviations 1, 0, 2 about 1, error sqrt(3)."""
    a, b = (el.Measured((1,), nats, 7, torch.ones(1, 2), 0, 0) for nats in ((1.0, 2.0, 6.0), (0.0, 2.0, 4.0)))
    assert a.over(b) == pytest.approx((3 / 7 / math.log(2), math.sqrt(3) / 7 / math.log(2)))
    alone = el.Measured((1,), (1.0,), 7, torch.ones(1, 2), 0, 0)
    assert alone.over(alone) == (0, math.inf)


def additive(gains: list[list[float]]):
    """A loss to which each layer adds its own, less by gains[layer][i] with the i-th expert after the first."""

    def loss(plan):
        return 10 - sum(sum(gains[layer][: k - 1]) for layer, k in enumerate(plan))

    return loss


def test_search_by_hand():
    """Layer 1 gains most; each layer less with each expert: both ways find the best plan of six experts."""
    loss = additive([[1, 0.5, 0.1], [3, 2, 0.2], [0.4, 0.3, 0.25]])
    found = search(loss, layers=3, least=1, most=4, total=6)
    assert found.raised == ((1, 1, 1), (1, 2, 1), (1, 3, 1), (2, 3, 1))
    assert found.lowered[:3] == ((4, 4, 4), (3, 4, 4), (3, 3, 4))
    assert found.lowered[-1] == found.plan == (2, 3, 1)
    plans = [p for p in torch.cartesian_prod(*[torch.arange(1, 5)] * 3).tolist() if sum(p) == 6]
    assert loss(found.plan) == min(map(loss, plans))
    neighbours = {
        (*p[:i], p[i] + by, *p[i + 1 :])
        for path, by in ((found.lowered, -1), (found.raised, 1))
        for p in path[:-1]
        for i in range(3)
    }
    assert found.tried == len({p for p in neighbours if all(1 <= k <= 4 for k in p)})


def test_the_better_end_is_taken_and_no_plan_is_asked_for_twice():
    """A layer whose first expert alone is worth nothing, and whose second is worth most, misleads raising alone."""
    loss, asked = additive([[0, 9, 0], [1, 1, 1]]), []
    found = search(lambda plan: asked.append(plan) or loss(plan), layers=2, least=1, most=4, total=5)
    assert found.raised[-1] == (1, 4)
    assert found.plan == found.lowered[-1] == (3, 2)
    assert len(asked) == len(set(asked)) == found.tried
    assert walk(loss, (2, 2), 4, 1) == [(2, 2)]
    assert walk(additive([[1], [1]]), (1, 1), 3, 2) == [(1, 1), (2, 1)]  # the first of equals


def test_even_plans_and_the_front_by_hand():
    assert even(4, 10) == ((2, 2, 3, 3), (3, 3, 2, 2))
    assert even(3, 6) == ((2, 2, 2), (2, 2, 2))
    points = [(1, 5), (2, 4), (2, 6), (3, 4), (4, 1), (1, 5), (1, 6)]
    assert front(points) == [True, True, False, False, True, True, False]


def test_the_choice_is_not_judged_on_what_it_was_made_on(matryoshka):
    elastic = el.load(matryoshka)
    text = elastic.batches()
    found = allocate(elastic, text, 2.4, 1, 4)
    assert found.total == sum(found.found.plan) == 7
    half = len(text) // 2
    assert (
        found.searched[found.found.plan] == el.measure(elastic, found.found.plan, text[:half]).bits_per_byte
    )
    for plan, m in found.judged.items():
        assert m.nats == el.measure(elastic, plan, text[half:]).nats
    ends = [found.searched[path[-1]] for path in (found.found.lowered, found.found.raised)]
    assert found.searched[found.found.plan] == min(ends)
    assert allocate(elastic, text[:2], 2.33333333333, 1, 4).total == 7  # as one types 7 / 3


def test_commands_write_what_they_show(matryoshka, tmp_path):
    shown = sigma(
        "elastic", "eval", matryoshka, "--top-k", "1,3,6", "--plan", "4,4,1", "--json", tmp_path / "e.json"
    )
    told = json.loads((tmp_path / "e.json").read_text())
    assert [p["top_k"] for p in told["plans"]] == [[1, 1, 1], [3, 3, 3], [6, 6, 6], [4, 4, 1]]
    assert [p["standing"] for p in told["plans"]] == ["trained", "between", "beyond", "trained"]
    assert told["trained_at"] == [[1, 2, 4]] * 3
    assert all(f"{p['bits_per_byte']:.4f}" in shown for p in told["plans"])
    assert "trained at k = 1, 2, 4 in each layer; beyond the largest of these is extrapolation" in shown
    usual = sigma("elastic", "eval", matryoshka / "checkpoints" / "step-00000005", "--batches", 1)
    assert re.findall(r"(?m)^│ (\d)", usual) == ["1", "2", "3", "4", "5", "6"]  # two beyond what was trained
    files = ("--json", tmp_path / "s.json", "--plot", tmp_path / "s.png")
    shown = sigma("elastic", "search", matryoshka, "--mean-k", 2, "--batches", 4, *files)
    told = json.loads((tmp_path / "s.json").read_text())
    assert sum(told["found"]["top_k"]) == 6
    assert ",".join(map(str, told["found"]["top_k"])) in shown
    assert told["lowered"][0]["top_k"] == [4, 4, 4]
    assert told["raised"][0]["top_k"] == [1, 1, 1]
    assert told["batches"] == 4
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("arguments", "told"), [
    (["eval", "--top-k", "9"], "--top-k must lie in 1..8, the experts of the model, found 9"),
    (["eval", "--top-k", "1,x"], "--top-k must be integers with commas between, as 1,2,4, found '1,x'"),
    (["eval", "--plan", "1,2"], "--plan must have one entry for each of 3 layers, found 2"),
    (["search", "--mean-k", "4.5"], "--mean-k must be a number from 1 to 4, found 4.5"),
    (["search", "--mean-k", "nan"], "--mean-k must be a number from 1 to 4, found nan"),
    (["search", "--mean-k", "2", "--least", "5"], "--least must lie in 1..4, the largest k, found 5"),
    (["search", "--mean-k", "2", "--most", "9"], "--most must lie in 1..8, the experts of the model, found 9"),
    (["search", "--mean-k", "2", "--batches", "1"], "search wants at least 2 batches of the validation split"),
])  # fmt: skip
def test_wrong_arguments_are_a_sentence_and_write_nothing(matryoshka, tmp_path, arguments, told):
    command, *rest = arguments
    assert told in refused("elastic", command, matryoshka, *rest, "--json", tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_is_named_first(tmp_path, option):
    """Defends: minutes of measuring whose file cannot be written; there is no run here to measure."""
    told = f"{option}: cannot write in {tmp_path / 'none'}: No such file or directory; name another folder"
    command = ["search", tmp_path, "--mean-k", 2] if option == "--plot" else ["eval", tmp_path]
    assert refused("elastic", *command, option, tmp_path / "none" / "file") == told
    assert (
        refused("elastic", *command, option, tmp_path) == f"{option} must be a file, found {str(tmp_path)!r}"
    )


def test_runs_that_cannot_be_judged_are_named(matryoshka, tmp_path):
    make_run(tmp_path / "dense", "model.num_experts=1")
    assert "elastic wants a model with experts" in refused("elastic", "eval", tmp_path / "dense")
    assert "must be a run or a checkpoint, found neither there" in refused("elastic", "eval", tmp_path)
    run = tmp_path / "moved"
    shutil.copytree(matryoshka, run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("max_bytes = 200000", "max_bytes = 100000"))
    checkpoint = run / "checkpoints/step-00000010"
    assert f"the text of data.paths is not what {checkpoint} was trained on" in refused(
        "elastic", "eval", run
    )


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("top_k", [1, 3, None])
def test_export_at_a_chosen_k(matryoshka, tmp_path, top_k):
    """Defends: the k of the settings, and at one expert another weight than ours."""
    from transformers import AutoModelForCausalLM

    export_to_transformers(matryoshka, tmp_path / "out", top_k)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.num_experts_per_tok == (top_k or 4)
    ours = el.load(matryoshka).model
    ours.set_top_k(top_k or 4)
    tokens = torch.randint(0, 500, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-4)


def test_exports_that_cannot_be(matryoshka, tmp_path):
    told = refused("export", matryoshka, tmp_path / "out", "--top-k", "4,4,1")
    assert told == "export: Qwen3 has one top_k for all layers, found [4, 4, 1]"
    assert "export: --top-k must lie in 1..8, found 9" in refused(
        "export", matryoshka, tmp_path / "out", "--top-k", 9
    )
    make_run(tmp_path / "dense", "model.num_experts=1")
    told = refused("export", tmp_path / "dense", tmp_path / "out", "--top-k", 2)
    assert "--top-k is of a model with experts" in told
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
