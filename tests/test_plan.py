"""`sigma plan`: shapes, FLOPs and what one rank keeps are the trainer's own; times are of measured layers."""

import functools
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import plan_ranks
import pytest
import torch
from sigma_cli.commands import app
from sigma_train import files, plan_page
from sigma_train.accelerators import ACCELERATORS
from sigma_train.config import Config, load_config
from sigma_train.errors import WrongInput
from sigma_train.expert_counts import ExpertCounts
from sigma_train.model import LanguageModel
from sigma_train.plan import LOADS, Plan, make_plan
from sigma_train.plan_memory import activations, copies, memory
from sigma_train.plan_routing import expected
from sigma_train.plan_shapes import Layout, Shapes, layout, padded, shapes, sharded
from sigma_train.plan_time import MEASURED, crowd, flops
from sigma_train.plan_wire import SHARDING, collectives
from support import assert_one_sentence, sigma
from test_train_learning import SMALL  # noqa: F401 - of make_trainer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from sigma_kernels.nn import SparsitySchedule

ROOT = Path(__file__).parent.parent
EARLY = [8, 8, 6, 6, 4, 4, 2, 2] + [1] * 48
H200 = ACCELERATORS["H200"]


@functools.cache
def sized(preset: str, *settings: str) -> tuple[Config, Shapes]:
    config = load_config(preset, None, list(settings))
    return config, shapes(config)


def planned(preset: str, ranks: int, expert_ranks: int | None, *settings: str, device=H200) -> Plan:
    config, sizes = sized(preset, *settings)
    where = layout(config, ranks, expert_ranks, device.node_ranks)
    return make_plan(config, sizes, where, device, MEASURED[config.train.dtype])


@pytest.mark.parametrize(
    "preset, settings, total, active",
    [
        ("sigma-moe-tiny", [], 19.98e9, 0.537e9),
        ("sigma-moe-tiny", [f"model.top_k={EARLY}"], 19.98e9, 0.650e9),
        ("sigma-moe-200b", [], 200e9, 20e9),
    ],
)
def test_presets_have_the_published_sizes(preset, settings, total, active):
    _, found = sized(preset, *settings)
    digits = 1e-3 if "tiny" in preset else 2e-2  # of what was fitted, and of what is published
    assert found.total == pytest.approx(total, rel=digits)
    assert found.active_in_layers == pytest.approx(active, rel=digits)


def test_the_schedules_early_phase_has_the_published_size():
    """The model itself, on the meta device: 20 B, of which a token meets 0.65 B and then 0.54 B besides embeddings."""
    config = load_config("sigma-moe-tiny", None, [])
    with torch.device("meta"):
        model = LanguageModel(config)
    embeddings = 2 * config.model.vocab_size * config.model.hidden_size
    assert f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}" == "19.98"
    schedule = SparsitySchedule.sigma_moe_tiny(config.model.num_layers, 0.9, config.train.steps)
    for step, active in ((0, "0.650"), (config.train.steps, "0.537")):
        model.set_top_k(schedule.top_k(step))
        assert f"{(model.active_parameters() - embeddings) / 1e9:.3f}" == active
    small = ExpertCounts(load_config("sigma-moe-tiny-cpu", None, []))
    assert small.of_step(0) == SparsitySchedule.sigma_moe_tiny(12, 900).top_k(0)
    assert small.of_step(900) == (1,) * 12 != small.of_step(899)


def test_shapes_without_memory_are_those_of_the_trainer(make_trainer):
    trainer = make_trainer("run", "model.top_k=[2,1]", "model.tie_embeddings=false")
    found = shapes(trainer.config)
    of_model = Counter(tuple(p.shape) for p in trainer.model.parameters())
    assert Counter([*found.dense, *found.experts]) == of_model
    assert found.experts[::2] == [tuple(m.experts.gate_up_proj.shape) for m in trainer.model.moe_layers()]


@pytest.mark.parametrize("experts", [8, 1])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_what_autograd_keeps_on_one_rank(make_trainer, dtype, experts):
    """Defends: the activations of a dense model, and of experts that get no rows from others."""
    top_k = "[3,1]" if experts > 1 else "1"
    trainer = make_trainer(
        "run", f"train.dtype={dtype}", f"model.num_experts={experts}", f"model.top_k={top_k}"
    )
    kept = plan_ranks.Kept(trainer.model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        trainer.one_step.gradients(0)
    config, where = trainer.config, Layout(1, 1, 8)
    sizes = shapes(config)
    assert kept.bytes == activations(config, sizes, where, None, 4) + copies(config, sizes, where)
    assert memory(config, sizes, where).exchange == 0
    assert collectives(config, sizes, where) == []


def test_products_are_counted_as_torch_counts_them(make_trainer):
    """Defends: a matrix that is left out, a factor of 6 that is another; attention is left to its formula."""
    trainer = make_trainer("run", "model.num_experts=1", "model.tie_embeddings=false")
    with FlopCounterMode(display=False) as counter:
        trainer.one_step.gradients(0)
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "attention" not in str(op))
    assert flops(trainer.config, shapes(trainer.config), 1).dense == products


def test_flops_by_hand():
    p = planned("smoke", 4, 2, "model.top_k=[2,1]", "train.grad_accum=3")
    T, H, A = 4 * 3 * 8 * 64, 64, 64
    assert p.flops.experts == 6 * T * (2 + 1) * 3 * H * 64
    assert p.flops.router == 6 * T * 2 * 8 * H
    assert p.flops.dense == 6 * T * (2 * (2 * H * A + 2 * H * 32) + 512 * H)
    assert p.flops.attention == 6 * T * 2 * 64 * A
    assert p.tokens == T


@pytest.mark.parametrize(
    "ranks, expert_ranks, node", [(16, 4, 8), (24, 12, 8), (12, 6, 4), (8, 8, 8), (6, 1, 4)]
)
def test_what_leaves_a_node_by_enumeration(ranks, expert_ranks, node):
    """Defends: groups that lie across nodes, replicas whose neighbours are far."""
    where = Layout(ranks, expert_ranks, node)
    sets = [range(s, s + expert_ranks) for s in range(0, ranks, expert_ranks)]
    copies_of = [range(s, ranks, expert_ranks) for s in range(expert_ranks)]
    for group, members in (
        (where.everyone, [range(ranks)]),
        (where.around_experts, sets),
        (where.around_replicas, copies_of),
    ):
        pairs = [a // node == b // node for m in members for a, b in itertools.permutations(m, 2)]
        ring = [
            a // node == b // node for m in members for a, b in zip(m, [*m[1:], m[0]], strict=True) if a != b
        ]
        assert group.size == len(members[0])
        assert group.pairs == pytest.approx(sum(pairs) / len(pairs) if pairs else 1.0)
        assert group.ring == pytest.approx(sum(ring) / len(ring) if ring else 1.0)


def test_what_is_sent_of_what_is_handed_over():
    """By simulation of a ring, and by counting what an even all-to-all keeps."""
    p = planned("sigma-moe-tiny", 32, 16)
    for c in p.messages:
        n = c.ranks
        if c.kind == "all_to_all":
            blocks = n - 1  # of n, one a rank
        else:
            passes = n - 1  # each passes on one n-th of the whole at a time, until all have all
            blocks = 2 * passes if c.kind == "all_reduce" else passes
        assert c.sent == pytest.approx(c.handed / n * blocks), c.what
    dispatch = next(c for c in p.messages if c.what == "dispatch")
    assert dispatch.inside == pytest.approx(dispatch.handed * 7 / 16)
    assert dispatch.outside == pytest.approx(dispatch.handed * 8 / 16)
    averaged = next(c for c in p.messages if c.what == "experts' gradients")
    assert averaged.handed == 4 * sum(map(math.prod, p.shapes.experts)) // 16
    assert averaged.inside == 0, "of two replicas each has its own nodes"


def test_shards_are_those_of_torch():
    for rows, ranks in itertools.product((1, 3, 8, 9, 18), (1, 2, 4, 5)):
        parts = [len(part) for part in torch.chunk(torch.empty(rows), ranks)]
        parts += [0] * (ranks - len(parts))
        assert [sharded((rows,), ranks, rank) for rank in range(ranks)] == parts
        assert padded((rows, 7), ranks) == ranks * parts[0] * 7


def figures(page: str, row: str) -> list[list[float]]:
    """The numbers in each row of a page's tables that begins so."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith(f"| {row} |")]
    cells = [line.removeprefix(f"| {row} |").split("|")[:-1] for line in lines]
    return [
        [float(n.replace(",", "")) for cell in row for n in re.findall(r"[\d.,]+", cell)] for row in cells
    ]


def test_shares_are_those_of_the_measured_pages():
    text = (ROOT / "docs/results/h200.md").read_text()

    def race(name: str, who: str) -> list[float]:
        section = next(s for s in text.split("\n## ") if s.startswith(name))
        line = next(line for line in section.splitlines() if line.startswith(f"| {who} |"))
        return [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]

    *_, stream = race("layer/forward/bf16, sigma-moe-tiny-E96-k1-H1536-I768-T2048, balanced", "sigma")
    assert MEASURED["bf16"].memory == MEASURED["f32"].memory == round(stream / H200.memory_gb_s, 3)
    f32 = "layer/forward/f32, A-E96-k1-H1024-I512-T2048, balanced"
    assert MEASURED["f32"].experts == round(race(f32, "sigma")[-2] / H200.f32_tflops, 3)
    assert MEASURED["f32"].dense == round(race(f32, "bound: dense")[-1] / H200.f32_tflops, 3)
    (row,) = (r for r in figures("docs/log.md", "the same, 32,768") if len(r) == 10)
    work = 18 * 32768 * 1536 * 768 / (H200.bf16_tflops * 1e12) * 1e6  # us at the peak
    assert MEASURED["bf16"].experts == round(work / row[1], 3)
    assert MEASURED["bf16"].dense == round(work / row[7], 3)


@pytest.mark.parametrize(
    "row, E, k, H, I, T",
    [
        ("shape A, 2,048 tokens", 96, 1, 1024, 512, 2048),
        ("Sigma-MoE-Tiny, 2,048", 96, 1, 1536, 768, 2048),
        ("the same, 8,192", 96, 1, 1536, 768, 8192),
        ("the same, 32,768", 96, 1, 1536, 768, 32768),
        ("Qwen3-30B-A3B, 512, top-8", 128, 8, 2048, 768, 512),
    ],
)
def test_the_time_of_experts_is_near_what_was_measured(row, E, k, H, I, T):
    """Within 16 % of each measured layer, forward and backward; the docs say so."""
    sizes = {
        "num_experts": E,
        "top_k": k,
        "hidden_size": H,
        "intermediate_size": I,
        "num_layers": 1,
        "max_seq_len": T,
    }
    settings = [f"model.{name}={value}" for name, value in sizes.items()]
    p = planned("smoke", 1, None, *settings, f"train.seq_len={T}", "train.batch_size=1", "train.dtype=bf16")
    (measured,) = (r for r in figures("docs/log.md", row) if len(r) == 10)
    assert p.times.compute["experts' products"] * 1e6 == pytest.approx(measured[1], rel=0.16)


def test_times_of_parts_add_up():
    for ranks, expert_ranks in ((1, 1), (8, 8), (64, 8), (2048, 32)):
        p = planned("sigma-moe-tiny", ranks, expert_ranks)
        t = p.times
        assert t.overlapped <= t.expected <= t.in_order
        assert sum(t.exposed.values()) == pytest.approx(t.expected)
        assert t.exposed.get(SHARDING, 0) == 0, "it all hides, and no rounding of it is told"
        assert t.exposed[t.bound] == max(t.exposed.values())
        assert 0 < p.mfu(t.in_order) <= p.mfu(t.overlapped) < 1
        assert dict(p.crowds)[1] == pytest.approx(t.expected)
        steps = [s for _, s in p.crowds]
        assert steps == sorted(steps)


def test_a_crowded_expert_fills_its_rank():
    """Defends: more rows than there are, a rank of one expert that shares its load with others."""
    config, sizes = sized("sigma-moe-tiny")
    for expert_ranks, load in itertools.product((1, 8, 32, 96), LOADS):
        where = Layout(96, expert_ranks, 8)
        here = 96 // expert_ranks
        busiest, others = load, (96 - load) / 95
        found = crowd(config, sizes, where, load)
        assert found * here == pytest.approx(busiest + (here - 1) * others)
        assert found <= expert_ranks + 1e-9
    assert planned("smoke", 1, None, "model.num_experts=1").crowds == []


def test_what_a_busy_expert_does_to_layers_of_several_choices():
    """A rank gets a token once: its messages grow by less than its rows, and never past all tokens."""
    config, sizes = sized("smoke", "model.top_k=[4,1]")
    where, T = Layout(4, 4, 8), 8 * 64
    even, twice, most = (expected(config, sizes, where, T, load) for load in (1, 2, 8))
    several, one = zip(even, twice, most, strict=True)
    assert [layer.rows for layer in several] == sorted(layer.rows for layer in several)
    assert several[1].received < several[0].received * several[1].rows / several[0].rows
    assert several[2].received == 4 * T, "all tokens of four ranks"
    assert several[2].rows == several[1].rows, "no token chooses an expert twice: 8 times the mean is 2"
    assert one[2].received == one[2].rows == 4 * T
    assert all(layer.received == layer.rows for layer in one)


def test_the_plan_as_json(cache):
    args = ["--preset", "smoke", "--set", "model.top_k=[2,1]", "--ranks", "16", "--expert-ranks", "4"]
    result = sigma("plan", *args, "--batch-size", "5", "--dtype", "bf16", "--accelerator", "mi300x", "--network-gb-s",
                   "25", "--efficiency", "0.5", "--tflops", "1000", "--json", env=cache)  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["tokens_per_step"] == 16 * 5 * 64
    assert found["layout"] == {"ranks": 16, "expert_ranks": 4, "node_ranks": 8, "replicas": 4}
    assert found["accelerator"]["network_gb_s"] == 25
    assert found["accelerator"]["memory_gb"] == 192
    assert found["accelerator"]["bf16_tflops"] == 1000
    assert found["accelerator"]["f32_tflops"] == 163.4, "of the router, which is f32"
    assert found["shares"]["experts"] == 0.5
    kinds = found["memory_bytes"]
    assert kinds.pop("total") == sum(kinds.values())
    seconds = found["seconds"]
    assert sum(seconds["parts"].values()) == pytest.approx(seconds["in_order"])


def test_the_plan_as_tables(cache):
    result = sigma("plan", "--preset", "sigma-moe-200b", "--ranks", "256", "--expert-ranks", "32",
                   env={**cache, "COLUMNS": "120"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    for part in ("199.46 B parameters", "20.24 B of the layers", "DOES NOT FIT", "in 32 nodes", "32 ranks share",
                 "dispatch, backward", "MFU", "a model on paper", "measured on one H200"):  # fmt: skip
        assert part in result.stdout, part


WRONG = [
    (["--preset", "smoke"], "--ranks must be given, the number of devices to plan for"),
    (["--ranks", "2", "--accelerator", "H20"], "unknown accelerator 'H20'; did you mean 'H200'?"),
    (
        ["--ranks", "64", "--preset", "sigma-moe-tiny"],
        "--expert-ranks, all ranks where it is not given, must divide the 64 ranks and model.num_experts = 96, "
        "found 64; the largest that does is 32",
    ),
    (
        ["--ranks", "2", "--expert-ranks", "2", "--preset", "smoke-dense"],
        "--expert-ranks must be 1 for a dense model, found 2",
    ),
    (["--ranks", "2", "--tflops", "nan"], "--tflops must be a number above 0, found nan"),
    (["--ranks", "2", "--memory-gb", "-1"], "--memory-gb must be a number above 0, found -1.0"),
    (
        ["--ranks", "2", "--efficiency", "1.5"],
        "--efficiency must be a number above 0 and at most 1, found 1.5",
    ),
    (["--ranks", "2", "--latency-us", "inf"], "--latency-us must be a number of at least 0, found inf"),
    (["--ranks", "2", "--dtype", "f8"], "train.dtype must be 'f32' or 'bf16', found 'f8'"),
    (["--page", "plan.txt"], "--page must name a .md file, found plan.txt"),
    (["--page", "no/plan.md"], "--page: there is no folder no"),
    (
        ["--page", "plan.md", "--ranks", "8"],
        "--page plans its own settings: it takes options of the accelerator and shares alone",
    ),
]


@pytest.mark.parametrize("args, message", WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_wrong_input_is_one_sentence(monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", *args])
    assert isinstance(result.exception, WrongInput)
    assert (str(result.exception), result.output) == (message, "")
    assert not list(tmp_path.iterdir())


def test_wrong_input_ends_with_code_2(cache, tmp_path):
    args, message = WRONG[1]
    assert_one_sentence(sigma("plan", *args, env=cache, cwd=tmp_path), 2, message)


def test_the_page_is_whole_and_what_its_command_writes(tmp_path, monkeypatch):
    """docs/results/plan.md is of this model, not of an older one; a full disk leaves no part of it."""

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    plans = plan_page.sweep(H200, MEASURED["bf16"])
    monkeypatch.setattr(plan_page, "sweep", lambda *_: plans)
    monkeypatch.chdir(tmp_path)
    page = Path("docs/results/plan.md")
    page.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        patch.setattr(plan_page, "figure", lambda *_: plt.figure())
        with pytest.raises(OSError, match=r"cannot write .*plan\.png: No space left"):
            plan_page.write_page(page, H200, MEASURED["bf16"])
    assert not list(page.parent.iterdir())
    plan_page.write_page(page, H200, MEASURED["bf16"])
    assert {path.name for path in page.parent.iterdir()} == {"plan.md", "plan.png"}
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert page.read_text() == (ROOT / page).read_text()
