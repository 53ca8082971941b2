"""The benchmark's own promises: everyone in turns, nobody wrong, pages that say what was run."""

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import pytest
import torch
from sigma_cli import bench
from sigma_cli.bench import lines, page, remarks, rich_table
from sigma_cli.bench_plots import apart, pictures
from sigma_train.errors import Stopped, WrongInput
from support import NO_OTHER_PLUGINS, OF_BENCH

from sigma_kernels import nn

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import layer
import oracle
import shapes
import test_decode
import train_step
from race import OURS, CannotRun, Race, absent, first_calls, record

ROOT = Path(__file__).parent.parent


def test_everyone_runs_once_a_round_in_turns():
    ran = []
    clock = itertools.count().__next__
    race = Race(
        {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, rounds=20, limits={"b": 3}, clock=clock
    )
    for _ in range(20):
        race.until_ours()
        ran.append(OURS)
    race.finish()
    assert [ran.count(name) for name in (OURS, "a", "b")] == [20, 20, 3]
    assert race.times == {"a": [1] * 20, "b": [1] * 3}
    assert {tuple(ran[i : i + 2]) for i in range(9, 43, 2)} == {(OURS, "a"), ("a", OURS)}, "the order changes"


def test_those_with_threads_of_their_own_run_between_rests():
    told = []
    race = Race({"a": lambda: told.append("a"), "b": lambda: told.append("b")}, rounds=3, apart={"b"},
                rest=lambda _: told.append("rest"))  # fmt: skip
    for _ in range(3):
        race.until_ours()
    race.finish()
    assert "".join(t[0] for t in told).count("rbr") == 3
    assert told.count("rest") == 6


def test_a_rival_that_cannot_run_is_a_line_with_its_reason():
    def refuses():
        raise CannotRun("no f32")

    times, reasons, _ = first_calls({"sigma": lambda: 1, "them": refuses}, None)
    assert (times, reasons) == ({}, {"them": "no f32"})
    race = a_race(candidates=[record("sigma", [0.1, 0.3, 0.2]), absent("them", reasons["them"])])
    assert lines(race)[0][1:5] == ("200.0", "100.0", "300.0", "3")
    assert lines(race)[1] == ("them", "no f32", "", "", "", "", "", "")
    assert "| them | no f32 |" in page(document(race))


def test_a_wrong_candidate_ends_the_race_and_bounds_are_not_asked():
    def check(who, result):
        assert result == 1, who

    first_calls({"right": lambda: 1, "bound_dense": lambda: 2}, check)
    with pytest.raises(AssertionError, match="wrong"):
        first_calls({"right": lambda: 1, "wrong": lambda: 2}, check)


def test_those_too_slow_are_timed_in_their_first_call():
    clock = itertools.count().__next__
    times, _, slow = first_calls({"slow": lambda: 1, "fast": lambda: 1}, None, {"slow"}, clock)
    assert slow == []
    assert times == {"slow": [1]}


def test_a_run_that_is_stopped_writes_its_races(tmp_path, monkeypatch):
    """Defends: an hour of races lost to a signal, or a page that does not say what it lacks."""

    def stopped(command, **_):
        target = Path(command[command.index("--race-json") + 1])
        target.write_text(json.dumps({"races": [a_race()]}))
        raise Stopped(15)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench.subprocess, "run", stopped)
    with pytest.raises(Stopped):
        bench.run("layer", True, 1, None, tmp_path / "page.md", tmp_path / "page.json")
    assert json.loads((tmp_path / "page.json").read_text())["stopped"]
    text = (tmp_path / "page.md").read_text()
    assert "The run was stopped; the races that it did not come to are missing." in text
    assert "## layer/forward/f32, A, balanced" in text


def test_those_that_need_seconds_run_in_few_rounds():
    clock = itertools.count(0, 4).__next__
    _, _, slow = first_calls({"sigma": lambda: 1, "them": lambda: 1}, None, clock=clock)
    assert slow == ["them"], "ours runs in all rounds, however slow"


def test_the_page_begins_with_our_share_of_the_higher_bound():
    candidates = [record("sigma", [0.1]), record("bound_dense", [0.09]), record("bound_read", [0.02])]
    candidates += [record("slower", [0.4]), record("faster", [0.2]), absent("gone", "no")]
    rows = bench.shares([a_race(candidates=candidates), a_race()])
    assert rows == [("layer/forward/f32, A, balanced", "100.0", "90.0", "dense", "90%", "faster", "2.00")]
    assert "| 90% | faster | 2.00 |" in page(document(a_race(candidates=candidates)))


def test_the_oracle_knows_right_from_slightly_wrong():
    shape = shapes.Shape("test", E=4, k=2, H=64, I=32, T=50)
    x, weights, gate_up, down = shapes.layer_inputs(shape, torch.float32)
    index = shapes.choices(shape, "zipf")
    want = oracle.layer(x, weights, gate_up, down, index, torch.ones(50, 64))
    doubles = oracle.layer(
        *(t.double() for t in (x, weights, gate_up, down)), index, torch.ones(50, 64).double()
    )
    oracle.assert_agrees("same", want, [t.float() for t in doubles], shape.H)
    wrong = want[0].clone()
    wrong[3, 5] += 0.01 * want[0].abs().max()
    with pytest.raises(AssertionError, match="them: output 0 is off by"):
        oracle.assert_agrees("them", [wrong], want[:1], shape.H)
    halves = [want[0].bfloat16()]
    oracle.assert_agrees("same", halves, halves, 1024)
    with pytest.raises(AssertionError, match="nothing: output 0 is off by 100% as a whole"):
        oracle.assert_agrees("nothing", [torch.zeros_like(halves[0])], halves, 1024)


def a_race(**changed):
    return {
        "group": "layer/forward/f32", "shape": "A", "load": "balanced", "memory": "", "flops": 2e9, "moved": 1e9,
        "calls": 1, "note": "", "sizes": None, "rows": None, "candidates": [record("sigma", [0.1])],
    } | changed  # fmt: skip


def document(*races):
    return {"schema": 1, "environment": bench.environment("sigma bench forward", 2), "races": list(races)}


def test_the_page_names_command_environment_and_ratios(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    race = a_race(
        rows={"mean": 2.0, "most": 5, "idle": 1},
        candidates=[
            record("sigma", [0.1]),
            record("bound_dense", [0.05]),
            record("beside_layer", [2.0]),
            record("peer", [0.3, 0.2, 0.4]),
        ],
    )
    text = page(document(race), ["x-roofline.png"])
    assert "`MALLOC_TOP_PAD_=7 OMP_WAIT_POLICY=passive sigma bench forward`" in text
    assert "2 threads, huge pages: " in text
    assert "![roofline](x-roofline.png)" in text
    assert "| peer | 300.0 | 200.0 | 400.0 | 3 | 3.00 | 7 | 3.3 |" in text
    assert [row[0] for row in lines(race)] == ["sigma", "beside: layer", "bound: dense", "peer"]
    assert "at most (skew 2.50), 1 experts idle. Ours takes 5.0% of the time of the layer" in remarks(race)
    assert rich_table(race).row_count == 4


def test_times_of_short_calls_are_of_one():
    assert record("sigma", [0.2, 0.1, 0.3], calls=20)["median_s"] == pytest.approx(0.01)


def a_run():
    """Races of every kind that a picture is drawn from, with figures that grow as they should."""
    races = []
    for dtype in ("f32", "bf16"):
        for family, group in (
            (shapes.LAYERS, "layer"),
            (shapes.DECODE, "decode"),
            (shapes.SWEEP_T, "sweep-T"),
            (shapes.SWEEP_E, "sweep-E"),
        ):
            for shape in family:
                dense, read = shape.flops / 2e11, shape.weights / 1e10
                ours = max(dense, read) * 1.2
                candidates = [record("sigma", [ours]), record("peer", [2 * ours]), absent("them", "why"),
                              record("bound_dense", [dense]), record("bound_read", [read])]  # fmt: skip
                races.append(
                    a_race(
                        group=f"{group}/forward/{dtype}", shape=str(shape), flops=shape.flops, moved=4 * shape.weights,
                        sizes=asdict(shape), candidates=candidates,
                    )
                )  # fmt: skip
    return document(*races)


@pytest.mark.parametrize("option, name", [("output", "--output"), ("json_file", "--json")])
def test_a_place_that_cannot_be_written_is_named_before_the_races(option, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("raced"))
    place = {"output": None, "json_file": None} | {option: Path("/proc/none/page.md")}
    with pytest.raises(WrongInput, match=f"^{name}: cannot write in /proc/none: No such file"):
        bench.run("router_end", True, 1, None, **place)


def test_pictures_show_something_and_stand_beside_the_page(tmp_path):
    written = bench.write_page(a_run(), tmp_path / "cpu.md")
    assert [path.name for path in written] == ["cpu.md", "cpu-roofline.png", "cpu-scaling.png"]
    for path in written[1:]:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert 0.002 < (pixels < 0.9).any(-1).mean() < 0.5, f"{path.name} is blank, or black"


def test_what_is_faster_than_the_dense_rate_is_in_the_picture():
    """Defends: torch's bf16 product without instructions for it is four times slower than ours."""
    races = a_run()["races"]
    for race in races:
        race["candidates"][0] |= {"median_s": 1e-6, "min_s": 1e-6, "max_s": 1e-6}
    figure = pictures(document(*races))["roofline"]
    fastest = max(race["flops"] / 1e-6 / 1e9 for race in races if race["group"].startswith("layer/forward/"))
    assert min(axes.get_ylim()[1] for axes in figure.axes) > fastest


def test_the_roof_of_bf16_is_the_faster_of_two_dense_rates():
    races = [r for r in a_run()["races"] if r["group"] == "layer/forward/bf16"]
    for race in races:
        race["candidates"].append(record("bound_dense_f32", [race["flops"] / 9e11]))
    (axes,) = pictures(document(*races))["roofline"].axes
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(900)


def test_no_picture_without_points():
    assert pictures(document(a_race())) == {}


def test_labels_keep_their_distance():
    places = apart([0.1, 0.1, 0.11, 0.9, 0.99, 1.0], 0.05)
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert min(gaps) >= 0.05 - 1e-9
    assert min(places) >= 0
    assert max(places) <= 1


def test_the_sweep_over_experts_keeps_the_bytes_and_memory_stays_below_16_gib():
    assert {shape.weights for shape in shapes.SWEEP_E} == {shapes.A.weights}
    # Weights, gradients, the oracle's, a peer's fresh ones, what a bound writes and as much of temporaries, in f32.
    largest = max(shape.weights for shape in shapes.LAYERS + shapes.SWEEP_T + shapes.SWEEP_E)
    assert 6 * 4 * largest < 16 * 2**30


class Entered:
    """A race that is not run: what its candidates answer, each as the race would call it."""

    def __call__(self, group, ours, *, check, missing=None, **others):
        self.group, self.others, self.check = group, others, check
        self.calls = {OURS: ours} | {name: call for name, call in others.items() if callable(call)}

    def examine(self, *names):
        first_calls({name: self.calls[name] for name in names}, self.check)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.short)
def test_a_training_step_with_other_experts_is_found(dtype, tmp_path, monkeypatch):
    """Defends: at the first step the loss of 96 experts is the same to 1e-3 whatever they answer, and tells nothing."""
    enter = Entered()
    train_step.race_steps(enter, torch.device("cpu"), tmp_path, True, dtype)
    assert enter.group == f"train_step/{shapes.short(dtype)}"
    enter.examine("hf_grouped_mm", *(["hf_grouped_mm_bf16_weights"] if dtype == torch.bfloat16 else []))
    assert ("bound_hf_dense_f32" in enter.calls) == (dtype == torch.bfloat16)
    loss, gradient = enter.calls[OURS]()
    enter.check(OURS, (loss, gradient))
    for wrong in (0 * gradient, gradient.roll(1, 0)):
        with pytest.raises(AssertionError, match="sigma: the first gradient of experts is off by"):
            enter.check(OURS, (loss, wrong))
    train_step.race_steps(enter, torch.device("cpu"), tmp_path, True, dtype)
    right = nn.experts.experts_of_routing
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.experts, "experts_of_routing",
            lambda x, r, gate_up, down, *dtype: right(x, r, gate_up.roll(1, 0), down.roll(1, 0), *dtype),
        )  # fmt: skip
        with pytest.raises(AssertionError, match=r"sigma: the first (gradient|loss)"):
            enter.examine(OURS)


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.short)
@pytest.mark.parametrize("memory", ["", "fresh", "kept"])
def test_the_layer_is_raced_in_other_ways_and_a_wrong_one_is_found(dtype, memory, monkeypatch):
    shape = shapes.Shape("test", E=4, k=2, H=64, I=32, T=50)
    enter, device = Entered(), torch.device("cpu")
    if memory:
        layer.forward_backward(enter, device, "layer", dtype, shape, memory, "zipf")
    else:
        layer.forward(enter, device, "layer", dtype, shape, "zipf")
    is_f32 = dtype == torch.float32
    ways = ["sigma_permuted"] * is_f32 + [layer.NOTHING_KEPT] * (memory == "fresh")
    assert sorted(n for n in enter.calls if n.startswith("sigma_")) == sorted(ways)
    assert ("bound_dense_f32" in enter.calls) != is_f32
    assert ("bound_read_write" in enter.calls) == bool(memory)
    weights = shape.weights * dtype.itemsize
    assert enter.others["moved"] == {"": 1, "fresh": 3, "kept": 4}[memory] * weights
    enter.examine(OURS, *ways)
    for name, call in enter.calls.items():
        if name.startswith("bound_"):
            call()
    for way in ways:
        wrong = {"sigma_permuted": (layer.sk, "unpermute"), layer.NOTHING_KEPT: (layer.sk, "moe_experts")}[
            way
        ]
        right = getattr(*wrong)
        with monkeypatch.context() as patch:
            patch.setattr(*wrong, lambda *a, right=right: 2 * right(*a))
            if way == layer.NOTHING_KEPT:
                layer.forward_backward(enter, device, "layer", dtype, shape, memory, "zipf")
            with pytest.raises(AssertionError, match=f"{way}: output 0 is off by"):
                enter.examine(way)


def test_what_is_kept_is_given_back_before_that_backward_alone(monkeypatch):
    """Defends: a row that is called nothing kept, and takes its gradients from kept blocks."""
    told, enter = [], Entered()
    experts = layer.sk.moe_experts
    monkeypatch.setattr(layer.sk, "empty_cache", lambda: told.append("given back"))
    monkeypatch.setattr(layer.sk, "moe_experts", lambda *a: told.append("forward") or experts(*a))
    shape = shapes.Shape("test", E=4, k=1, H=32, I=16, T=8)
    layer.forward_backward(enter, torch.device("cpu"), "layer", torch.float32, shape, "fresh", "balanced")
    told.clear()
    enter.calls[OURS]()
    enter.calls[layer.NOTHING_KEPT]()
    assert told == ["forward", "forward", "given back"]


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.short)
def test_decoding_with_weights_of_one_byte_is_checked_against_these_weights(dtype, monkeypatch):
    shape = shapes.Shape("decode", E=4, k=1, H=64, I=32, T=2)
    enter = Entered()
    test_decode.test_decode(enter, torch.device("cpu"), dtype, shape)
    enter.examine(OURS, test_decode.INT8)
    of_scales = 4 * shape.E * (2 * shape.I + shape.H)
    assert enter.others["moved_by"] == {test_decode.INT8: shape.weights + of_scales}
    right = test_decode.sk.moe_experts_int8
    monkeypatch.setattr(test_decode.sk, "moe_experts_int8", lambda *a: 2 * right(*a))
    with pytest.raises(AssertionError, match=f"{test_decode.INT8}: output 0 is off by"):
        enter.examine(test_decode.INT8)


def test_bytes_per_second_are_of_what_a_candidate_moves():
    candidates = [record("sigma", [0.1]), record("sigma_int8", [0.05], moved=250_000_000)]
    assert [row[-1] for row in lines(a_race(candidates=candidates))] == ["10.0", "5.0"]
    assert [c["kind"] for c in candidates] == ["ours", "variant"]


def test_a_bound_that_was_measured_in_f32_too_is_the_faster():
    """Defends: a share of 647 % of a product of bf16 on a processor without instructions for it."""
    candidates = [record("sigma", [0.1]), record("bound_dense", [0.6]), record("bound_dense_f32", [0.08])]
    candidates += [
        record("bound_read_write", [0.03]),
        record("sigma_permuted", [0.05]),
        record("peer", [0.2]),
    ]
    (row,) = bench.shares([a_race(candidates=candidates)])
    assert row[2:] == ("80.0", "dense_f32", "80%", "peer", "2.00")
    candidates[2] = record("bound_dense_f32", [0.9])
    assert bench.shares([a_race(candidates=candidates)])[0][3] == "dense"
    assert [row[-2:] for row in lines(a_race(candidates=candidates))][2:5] == [
        ("", "33.3"),
        ("3", ""),
        ("2", ""),
    ]


OF_MODELS = ("align_spans", "aggregate_teacher_loss", "counting_of_neurons", "train_step")


def test_every_group_races_and_is_written(tmp_path, monkeypatch):
    """One race of each test of bench/, too small to measure anything; steps of the trainer take long.

    Of a model's steps those with kept memory, which have every peer; f32 is raced above.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # in its workers pytest-benchmark times nothing
    for name, value in NO_OTHER_PLUGINS.items():
        monkeypatch.setenv(name, value)
    code = bench.run(
        "not train_step_with and not (train_step and f32)",
        False,
        1,
        2,
        tmp_path / "page.md",
        tmp_path / "page.json",
        extra=["--tiny", *OF_BENCH],
    )
    assert code == 0
    found = json.loads((tmp_path / "page.json").read_text())
    assert found["schema"] == 1
    assert found["peak_bytes"] > 0
    assert set(found["environment"]) == {
        "command", "date", "cpu", "machine", "isa", "threads", "thp", "variables", "versions",
    }  # fmt: skip
    groups = {race["group"].rsplit("/", 1)[0] for race in found["races"]}
    assert groups == {
        "layer/forward", "layer/forward+backward", "sweep-T/forward", "sweep-T/forward+backward", "decode/forward",
        "grouped_gemm/x@W.T", "grouped_gemm/a.T@b", "route/forward", "permute/forward", "unpermute/forward",
        "router_end/forward", "route_and_losses/forward+backward", "dispatch and combine/forward",
        "varying_k/forward", "align_spans", "aggregate_teacher_loss", "counting_of_neurons",
        "train_step",
    }  # fmt: skip
    for race in found["races"]:
        assert set(race) == {
            "group", "shape", "load", "memory", "flops", "moved", "calls", "note", "sizes", "rows", "candidates",
        }  # fmt: skip
        if race["group"].startswith(OF_MODELS):
            assert race["rows"] is None, "tokens of two vocabularies, or all layers of a model"
        else:
            assert set(race["rows"]) == {"mean", "most", "idle"}
        assert race["candidates"][0]["kind"] == "ours"
        for candidate in race["candidates"]:
            figures = {"reason"} if "reason" in candidate else {"median_s", "min_s", "max_s", "rounds"}
            own_bytes = {"moved"} if candidate["name"] == "sigma_int8" else set()
            assert set(candidate) == {"name", "kind"} | figures | own_bytes
    raced = {
        r["group"]: {c["name"] for c in r["candidates"] if c["kind"] == "variant"} for r in found["races"]
    }
    assert raced["layer/forward/f32"] == {"sigma_permuted"}
    assert raced["layer/forward+backward/f32"] == {"sigma_permuted", "sigma_nothing_kept"}
    assert raced["decode/forward/f32"] == {"sigma_int8"}
    assert found["races"][-1]["group"] == "train_step/bf16", "those who have malloc keep memory come last"
    assert "unpermute/forward/f32" in (tmp_path / "page.md").read_text()
