"""`sigma grow` on runs of ours: the checkpoint, the run that begins with it, what it cost, what is refused."""

import json
from pathlib import Path

import forked
import growth_memory
import pytest
import torch
from sigma_train import grow_run as writing
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint, read_record, save_checkpoint
from sigma_train.config import load_config
from sigma_train.errors import Stopped, WrongInput
from sigma_train.generate import load_run
from sigma_train.grow_cli import beside
from sigma_train.grow_run import Base, grow_run
from sigma_train.growth import grow, grow_optimizer_state
from sigma_train.growth_cost import ledger_of, mean_flops_per_token
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth
from sigma_train.model import LanguageModel, flops_per_token
from support import assert_one_sentence, sigma
from test_train_export import make_run
from test_train_init import SMALL, base, losses  # noqa: F401 - fixtures

GROWTH = Growth(LayerGrowthPlan.interposition(2), 2)


def of_grown(model: str) -> list[str]:
    """Settings of a run of the grown model in that folder."""
    config = load_config(None, Path(model) / "config.toml", [])
    return [
        f"model.num_layers={config.model.num_layers}",
        f"model.num_experts={config.model.num_experts}",
        f"model.top_k={config.model.top_k}",
        f"train.init_from={config.train.init_from}",
        f"train.init_optimizer={str(config.train.init_optimizer).lower()}",
    ]


@pytest.mark.parametrize("optimizer", ["reset", "inherit"])
def test_a_run_begins_with_what_was_grown(base, make_trainer, tmp_path, optimizer):  # noqa: F811
    """Defends: weights or moments other than those that grow in memory, a folder that only `sigma grow` understands."""
    former = load_checkpoint(latest_checkpoint(base.checkpoints))
    grow_run(Base.named(base.out), GROWTH, optimizer, tmp_path / "grown")
    run = make_trainer("big", *of_grown(tmp_path / "grown"))
    want = grow(former.model_state, GROWTH)
    own = dict(run.model.state_dict())
    assert all(torch.equal(own[name], x) for name, x in want.items())
    moments = grow_optimizer_state(former.optim_state, GROWTH, optimizer)
    for name, p in run.model.named_parameters():
        state = run.optimizer.state.get(p, {})
        assert bool(state) == (optimizer == "inherit")
        for slot, x in state.items():
            assert torch.equal(x, moments[f"state.{name}.{slot}"]), name
    run.run()
    assert len(losses(run)) == 3
    assert load_run(tmp_path / "grown")[1].active_parameters() == run.model.active_parameters()


def test_what_was_spent_is_carried_on(base, make_trainer, tmp_path):  # noqa: F811
    """Defends: a ledger that a run, a restart or a second growth loses; tokens at another model's price."""
    price = flops_per_token(base.model, base.config)
    assert mean_flops_per_token(base.config, 3) == price
    tokens = 3 * 2 * 64
    sunk = grow_run(Base.named(base.out), GROWTH, "reset", tmp_path / "grown")
    assert (sunk.sunk_flops, sunk.extra_flops) == (tokens * price, 0.0)
    run = make_trainer("big", *of_grown(tmp_path / "grown"))
    run.run()
    resumed = make_trainer("big", *of_grown(tmp_path / "grown"), resume=True)
    assert resumed.sunk == sunk
    now = ledger_of(latest_checkpoint(run.checkpoints))
    extra = tokens * flops_per_token(run.model, run.config)
    assert (now.sunk_flops, now.extra_flops) == (tokens * price, extra)
    wider = Growth(LayerGrowthPlan.none(4), 3, seed=5)
    again = grow_run(Base.named(run.out), wider, "reset", tmp_path / "again")
    assert again.sunk_flops == tokens * price + extra
    assert [entry["experts"] for entry in again.history] == [2, 3]
    record = read_record(latest_checkpoint(tmp_path / "again" / "checkpoints"))
    assert record["extra"]["sunk"]["flops"] == again.sunk_flops
    last = make_trainer("last", *of_grown(tmp_path / "again"))
    assert last.model.layers[0].mlp.router.weight.shape[0] == 8 * 2 * 3


def test_sigma_ledger_shows_what_was_spent(base, make_trainer, tmp_path, cache):  # noqa: F811
    """Defends: a comparison by FLOPs for which one has to write Python; figures of a run that began with nothing."""
    grow_run(Base.named(base.out), GROWTH, "reset", tmp_path / "grown")
    run = make_trainer("big", *of_grown(tmp_path / "grown"))
    run.run()
    now = ledger_of(latest_checkpoint(run.checkpoints))
    assert now.sunk_flops > 0 < now.extra_flops
    small, big = str(base.out), str(run.out)
    told = json.loads(sigma("ledger", small, big, "--json", env=cache).stdout)["runs"]
    want = {"sunk_flops": now.sunk_flops, "extra_flops": now.extra_flops, "total_flops": now.total_flops}
    assert want.items() <= told[big].items()
    assert not want.keys() & told[small].keys()
    shown = sigma("ledger", big, env=cache).stdout
    for name, flops in want.items():
        assert f"  {name.replace('_', ' '):24} {flops:.4g}\n" in shown


def test_a_schedule_is_paid_for_as_it_went(base):  # noqa: F811
    """Defends: tokens of a phase of several experts, counted at the k of the end."""
    config = load_config("smoke", None, ["sparsity.phases=[[0,[4,4]],[2,[1,1]]]"])
    model = LanguageModel(config)
    prices = [flops_per_token(model, config, [k, k]) for k in (4, 4, 1, 1)]
    assert mean_flops_per_token(config, 4) == pytest.approx(sum(prices) / 4, rel=1e-12)


def test_experts_that_others_have_placed_are_in_order(tmp_path):
    """Defends: copies of the row where an expert stood, taken for that of its number."""
    model = make_run(tmp_path / "run")
    want = grow({name: x.clone() for name, x in model.state_dict().items()}, GROWTH)
    placement = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])
    state = dict(model.state_dict())
    for part in ("gate_up_proj", "down_proj"):
        name = f"layers.1.mlp.experts.{part}"
        state[name] = torch.empty_like(state[name]).index_copy_(0, placement, state[name])
    state["layers.1.mlp.placement"] = placement
    save_checkpoint(tmp_path / "run" / "checkpoints", 2, state, {}, {}, keep=1)
    grow_run(Base.named(tmp_path / "run"), GROWTH, "reset", tmp_path / "out")
    got = load_checkpoint(latest_checkpoint(tmp_path / "out" / "checkpoints")).model_state
    assert got.keys() == want.keys() - {"lm_head.weight"}
    assert all(torch.equal(x, want[name]) for name, x in got.items())


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), Stopped(15)], ids=["full", "signal"]
)
def test_a_write_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch, fault):
    """Defends: half a folder under the name that was asked for, or beside it."""
    make_run(tmp_path / "run")
    told = []

    def assembled(*args):
        told.append(args)
        if len(told) == 9:
            raise fault
        return writing_assembled(*args)

    writing_assembled = writing.assembled
    monkeypatch.setattr(writing, "assembled", assembled)
    with pytest.raises(type(fault)):
        grow_run(Base.named(tmp_path / "run"), GROWTH, "reset", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_says_what_comes_next(cache, tmp_path):
    """Defends: options that do not reach the growth."""
    make_run(tmp_path / "run")
    args = ["--depth", "stack", "--skip-first", "1", "--experts", "3", "--noise", "0", "--norms"]
    result = sigma("grow", "run", "--out", "out", *args, env=cache, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "sigma train --config out/config.toml --out FOLDER trains it" in result.stdout
    assert "steepest fall" in result.stdout
    config, model, _ = load_run(tmp_path / "out")
    assert (config.model.num_layers, config.model.num_experts, config.model.top_k) == (3, 24, 3)
    assert config.train.init_from == str(tmp_path / "out")
    former = load_run(tmp_path / "run")[1]
    assert torch.equal(model.layers[2].self_attn.q_proj.weight, former.layers[1].self_attn.q_proj.weight)
    assert torch.equal(
        model.layers[0].mlp.experts.down_proj, former.layers[0].mlp.experts.down_proj.repeat(3, 1, 1)
    )


def test_a_folder_that_is_not_named_is_beside_the_run(cache, tmp_path):
    """Defends: a grown folder among a run's checkpoints, which it would take for the newest, or remove."""
    make_run(tmp_path / "run")
    grown = tmp_path / "run-grown"
    for source in ("run", "run/.", "run/checkpoints", "run/checkpoints/step-00000001"):
        assert beside(tmp_path / source) == grown
    args = ("grow", "run", "--depth", "interposition", "--experts", "2", "--noise", "0.01")
    result = sigma(*args, env=cache, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"wrote {grown}: " in result.stdout
    assert load_run(grown)[0].model.num_layers == 4
    assert_one_sentence(sigma(*args, env=cache, cwd=tmp_path), 2, f"--out: {grown} exists; name a new folder")
    with pytest.raises(
        WrongInput, match="SOURCE must be a run, a checkpoint or a folder of transformers, found /"
    ):
        beside(Path("/"))


WRONG = [
    ([], 2, "--depth or --experts must be given, what is to grow"),
    (["--experts", "2", "--noise", "-1"], 2, "--noise must be a number of at least 0, found -1.0"),
    (["--experts", "2", "--noise", "nan"], 2, "--noise must be a number of at least 0, found nan"),
    (["--experts", "2", "--shard-gb", "0"], 2, "--shard-gb must be a number above 0, found 0.0"),
    (
        ["--experts", "2", "--skip-last", "1"],
        2,
        "--depth-factor, --zero-outputs, --skip-first and --skip-last are options of --depth, which was not given",
    ),
    (
        ["--depth", "stack", "--interleave"],
        2,
        "--interleave and --balance-bias are options of --experts, which was not given",
    ),
    (
        ["--depth", "stack", "--skip-last", "2"],
        2,
        "LayerGrowthPlan: skip_first + skip_last must leave one of 2 layers to copy, found 0 + 2",
    ),
    (["--experts", "2", "--out", "run"], 2, "--out: run exists; name a new folder"),
    (
        ["--experts", "2", "--sunk-tokens", "5"],
        2,
        "--sunk-tokens is an option of a folder of transformers; a run knows its tokens",
    ),
    (
        ["--experts", "2", "--optimizer", "inherit"],
        2,
        "--optimizer: run/checkpoints/step-00000001 holds no moments of an optimizer to inherit",
    ),
]


@pytest.mark.parametrize("args, code, message", WRONG, ids=[" ".join(args) for args, _, _ in WRONG])
def test_wrong_arguments_are_named(cache, tmp_path, args, code, message):
    make_run(tmp_path / "run")
    args = args if "--out" in args else [*args, "--out", "out"]
    assert_one_sentence(sigma("grow", "run", *args, env=cache, cwd=tmp_path), code, message)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_no_sound_checkpoint_is_named(cache, tmp_path):
    """Defends: growth of damaged weights, of a folder of nothing, of weights that are not those of the settings."""
    args = ("--experts", "2", "--out", "out")
    (tmp_path / "empty").mkdir()
    result = sigma("grow", "empty", *args, env=cache, cwd=tmp_path)
    assert_one_sentence(result, 2, "empty must be a run or a checkpoint, found neither there")
    make_run(tmp_path / "run")
    (part,) = (tmp_path / "run" / "checkpoints").glob("*/*.distcp")
    content = part.read_bytes()
    part.write_bytes(content[:-100] + b"x" + content[-99:])
    result = sigma("grow", "run", *args, env=cache, cwd=tmp_path)
    assert_one_sentence(
        result,
        2,
        "checkpoint run/checkpoints/step-00000001 is damaged: the sha256 of __0_0.distcp differs, "
        "and no other below run/checkpoints is sound; a new run needs another folder",
    )
    part.write_bytes(content)
    settings = tmp_path / "run" / "config.toml"
    settings.write_text(settings.read_text().replace("num_layers = 2", "num_layers = 3"))
    result = sigma("grow", "run", *args, env=cache, cwd=tmp_path)
    assert_one_sentence(
        result,
        2,
        "run/checkpoints/step-00000001 does not fit the model of the settings: "
        "layers.2.input_layernorm.weight is missing, and 10 more do not fit",
    )
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Defends: a state, or what was written of it, that is kept whole: 8 layers of 4.3 MB grow to 137 MB."""
    for name, layers, width in (("small", 2, 64), ("large", 8, 256)):
        make_run(tmp_path / name, f"model.num_layers={layers}", f"model.hidden_size={width}", "model.top_k=2",
                 "model.intermediate_size=160")  # fmt: skip
    forked.spawn(growth_memory.measure, ("run", tmp_path), 1)
    peak = json.loads((tmp_path / "peak.json").read_text())["peak_bytes"]
    grown = sum(path.stat().st_size for path in (tmp_path / "large-grown").rglob("*.distcp"))
    largest = 16 * 2 * 160 * 256 * 4
    assert grown > 120e6
    assert peak < 4 * largest < grown / 5
