"""Ranks of a training beside one another, and many of them: the scores and the S(N) of a measurement, of its steps."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from noise_samples import write
from sigma_noise import steps, trace
from sigma_noise.analysis import Options
from sigma_noise.project import project
from sigma_noise.scores import score
from sigma_noise.step_ranks import step_ranks, step_windows
from sigma_noise.trace import Trace
from sigma_train.errors import WrongInput
from test_noise_analysis import invoke
from test_noise_steps import Simulated, joined

MS, RANKS, WORST, CALLS = 1_000_000, 4, 2, 2


def run(seed: int = 0, n: int = 1200, size: int = RANKS, tail: float = 0.01, attempt: int = 0) -> Simulated:
    """Steps of 4 ms; the worst rank takes 40 ms more before a collective in a share `tail` of them."""
    rng = np.random.default_rng(seed)
    work = rng.gamma(400, 2 * MS / 400, (n, CALLS, size)).astype(np.int64)
    if size > WORST:
        work[:, 0, WORST] += np.where(rng.random(n) < tail, 40 * MS, 0)
    return Simulated(work, np.full((n, CALLS), MS // 10), attempt=attempt)


def record(folder: Path, of_run: Trace) -> Path:
    write(of_run, folder)
    return folder


def local_of(ran: Simulated) -> np.ndarray:
    """[R, n] s of the steps after the first."""
    return ran.work.sum(1)[1:].T * 1e-9


def test_windows_are_what_each_rank_computed_by_itself():
    """Defends: times of whole steps, which are the same on all ranks; the first step, which touches memory."""
    ran = run()
    windows, left_out = step_windows(ran.trace())
    np.testing.assert_allclose(np.stack(list(windows.rows.values())), local_of(ran), rtol=1e-12)
    assert left_out == ""
    whole = steps.attempts_of(ran.trace())[0].steps
    assert np.ptp([whole[rank].seconds.sum() for rank in range(RANKS)]) == 0


def test_scores_and_projections_are_those_of_local_times():
    """Defends: other figures of a training's ranks than of a measurement with the same windows."""
    found = step_ranks(run().trace(), Options(ranks=(4, 64), seed=3, alpha=0.02))
    local = list(step_windows(run().trace())[0].rows.values())
    assert found.scores == score(local, alpha=0.02, seed=3)
    for projected in found.projections:
        want = project(local, (4, 64), model=projected.model, seed=3)
        np.testing.assert_allclose(projected.slowdown, want.slowdown, rtol=1e-12)
        np.testing.assert_allclose(projected.low, want.low, rtol=1e-12)
        assert (projected.flags, projected.refusals) == (want.flags, want.refusals)


def test_a_rank_with_a_tail_is_named_with_intervals():
    """Defends: rare long steps that are told as a slow rank, or as a sum without an interval."""
    found = step_ranks(run(n=3000).trace())
    worst = found.scores.ranks[0]
    assert found.scores.flagged == [WORST]
    assert worst.kind == "rare long detours"
    assert worst.location == pytest.approx(1.0, abs=0.01)
    assert worst.tail < 0.2
    assert 0 < worst.blame_interval.low < worst.blame < worst.blame_interval.high
    assert 0 < worst.what_if_interval.low < worst.what_if < worst.what_if_interval.high
    ecdf = found.projections[0]
    assert ecdf.low[0] <= ecdf.slowdown[0] <= ecdf.high[0]
    assert ecdf.refusals[-1]


def test_ranks_of_one_host_are_drawn_together():
    ran = run()
    of_run = ran.trace()
    told = {rank: about | {"host": f"node{rank // 2}"} for rank, about in of_run.ranks.items()}
    found = step_ranks(replace(of_run, ranks=told), Options(ranks=(64,)))
    assert [p.measured_hosts for p in found.projections] == [2, 2]
    want = project(local_of(ran), (64,), hosts=["a", "a", "b", "b"])
    np.testing.assert_allclose(found.projections[0].slowdown, want.slowdown, rtol=1e-12)


def test_of_starts_with_different_ranks_the_most_steps_count():
    """Defends: rows of unequal length where ranks came or went; steps that are left out without a word."""
    first, more, fewer = run(0, 300), run(1, 200, attempt=10_000_000), run(2, 101, size=2, attempt=20_000_000)
    of_all = joined(first.trace(), more.trace(), fewer.trace())
    windows, left_out = step_windows(of_all)
    want = np.concatenate([local_of(first), local_of(more)], 1)
    np.testing.assert_allclose(np.stack(list(windows.rows.values())), want, rtol=1e-12)
    assert left_out == "100 steps of other ranks than these 4 left out"
    assert step_ranks(of_all).warnings[0] == left_out


def test_what_a_record_does_not_carry_is_said():
    """Defends: a traceback, or silence, of the first minute of a training and of a single rank."""
    short = step_ranks(run(n=9).trace())
    assert short.scores is None
    assert short.ranked is None
    assert short.warnings == ("8 steps of all ranks, scores want 16; train longer",)
    assert all("wanted 100: measure longer" in reason for p in short.projections for reason in p.refusals)
    alone = step_ranks(run(size=1).trace(), Options(ranks=(8,)))
    assert alone.scores is None
    assert alone.projections[0].slowdown[0] > 1
    assert "few hosts" in alone.projections[0].flags[0]
    with pytest.raises(ValueError, match="must have a step after the first 1, found none"):
        step_windows(Trace({}, {0: {}}, {}))


def test_analyze_tells_scores_and_many_ranks(tmp_path):
    """Defends: a training told by sums alone, of which no interval and no N can be had."""
    path = record(tmp_path / "noise", run().trace())
    to = tmp_path / "t.json"
    result = invoke("analyze", path, "--ranks", "4,8", "--reference", "min", "--alpha", "0.02", "--json", to)
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.output.splitlines()
    assert lines[0].startswith("noise: uneven ranks cost")
    assert any(line.startswith("rank 2      rare long detours: without it S falls by") for line in lines)
    assert any(line.startswith("ranks       4 by local time of a step, 1,199 steps: ") for line in lines)
    assert any(line.startswith("S(N) ecdf   4: 1.") for line in lines)
    told = json.loads(to.read_text())
    schema = json.loads((files("sigma_noise") / "training.schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    check.validate(told)
    assert told["options"] == {"ranks": [4, 8], "alpha": 0.02, "seed": 0, "reference": "min"}
    assert set(told["files"]) == {f"rank0000{rank}.parquet" for rank in range(RANKS)}
    assert told["scores"]["ranks"][0]["rank"] == WORST
    assert [p["model"] for p in told["projections"]] == ["ecdf", "gpd"]
    for name in told:
        assert not check.is_valid({k: v for k, v in told.items() if k != name}), f"{name} may be missing"
    of_analysis = json.loads((files("sigma_noise") / "analysis.schema.json").read_text())["$defs"]
    for name in ("scores", "rank", "pair", "projection", "tail", "known", "number", "numbers"):
        assert schema["$defs"][name] == of_analysis[name]


def test_project_takes_a_training(tmp_path):
    path = record(tmp_path / "noise", run().trace())
    to = tmp_path / "p.json"
    result = invoke("project", path, "--ranks", "4,8", "--budget", "1.001", "--json", to)
    assert result.exit_code == 1, (result.output, result.exception)
    assert "over the budget: S(8) is above 1.001" in result.output
    check = json.loads((files("sigma_noise") / "project.schema.json").read_text())
    told = json.loads(to.read_text())
    jsonschema.Draft202012Validator(check).validate(told)
    want = step_ranks(trace.read(path), Options(ranks=(4, 8))).projections
    assert told["projections"][0]["slowdown"] == want[0].slowdown.tolist()
    assert invoke("project", path, "--ranks", "8", "--budget", "9").exit_code == 0
    short = record(tmp_path / "short", run(n=40).trace())
    assert invoke("project", short, "--ranks", "8192", "--budget", "9").exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--kernel", "spin"), "whose steps take no --kernel; leave it out"),
        (("--window", "1ms"), "whose steps take no --window; leave it out"),
        (("--layers", "4"), "whose steps take no --layers; leave it out"),
        (("--barriers", "4"), "whose steps take no --barriers; leave it out"),
        (("--model", "replay"), "a record of sigma train takes ecdf and gpd, found replay"),
        (("--without", "gc"), "what a step of a training would take less without a cause `sigma noise analyze` says"),
    ],
)  # fmt: skip
def test_options_that_steps_do_not_take_are_refused(tmp_path, arguments, told):
    path = record(tmp_path / "noise", run(n=40).trace())
    error = invoke("project", path, *arguments).exception
    assert isinstance(error, WrongInput), error
    assert told in str(error)


def test_compare_says_what_to_do_instead(tmp_path):
    path = record(tmp_path / "noise", run(n=40).trace())
    error = invoke("compare", path, path).exception
    assert isinstance(error, WrongInput), error
    assert "make runs of both machines with `sigma noise run`, or read each record with" in str(error)
