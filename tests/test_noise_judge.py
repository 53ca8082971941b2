"""What gates read of `sigma noise`: one threshold for all runs of a comparison, exit codes, and JSON by its schema."""

import json
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from noise_samples import write
from sigma_noise import judge, many_ranks, reading, selftest
from sigma_noise.judge import Options, judged
from sigma_noise.trace import Series
from sigma_train.errors import Failure, LostRank, WrongInput
from test_noise_analysis import arms, invoke, measured, quanta
from test_noise_compare import CHANGED, generator, most, samples

US = 1e-6


def schema(name: str) -> jsonschema.Draft202012Validator:
    found = json.loads((files("sigma_noise") / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def jittery(seed: int, sigma_s: float, detour_s: float, share: float = 0.01) -> Series:
    """Quanta of 1 ms, of which a `share` is interrupted for `detour_s`."""
    rng = np.random.default_rng(seed)
    took = 1e-3 + sigma_s * rng.standard_normal(4000)
    took[rng.permutation(4000)[: round(4000 * share)]] += detour_s
    ends = np.rint(np.cumsum(took) * 1e9).astype(np.int64)
    return Series(np.append(0, ends[:-1]), ends, np.ones(4000))


def arm(folder: Path, sigma_s: float, detour_s: float, share: float = 0.01) -> Path:
    for run in range(5):
        write(measured({0: jittery(run, sigma_s, detour_s, share)}), folder / f"run{run}")
    return folder


def verdict_of(metric: str, base: Path, new: Path, **options: float) -> str:
    (found,) = judged(base, new, Options(metrics=(metric,), **options)).comparison.metrics
    return found.verdict


def test_detours_are_counted_above_one_threshold(tmp_path):
    """Defends: a threshold that grows with each run's own jitter, so that the same detours of 15 us are fewer where
    jitter is more, which would be called an improvement.
    """
    still, rough = arm(tmp_path / "a", 0.3 * US, 15 * US), arm(tmp_path / "b", 5 * US, 15 * US)
    assert verdict_of("detours_per_s", still, rough) != "improved"
    assert verdict_of("detours_per_s", rough, still) != "regressed"
    assert judged(still, rough, Options()).tau_s == pytest.approx(30 * US, rel=0.05)
    assert judged(still, rough, Options(tau_s=2e-5)).tau_s == 2e-5
    long = arm(tmp_path / "c", 0.3 * US, 90 * US), arm(tmp_path / "d", 5 * US, 90 * US)
    assert verdict_of("detours_per_s", *long) == "equivalent"
    assert verdict_of("noise_share", *long) == "regressed"


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_equal_code_raises_no_alarm_by_its_projection(tmp_path):
    """Acceptance 7, of the product.  Defends: S(2048) as `compare` takes it, from files to verdicts: a fitted tail of
    1,000 quanta, AR(1) of 0.5, whose noise differs from run to run by 10 %.

    Without a margin, so that the rate is the test's own.
    """
    rng, alarms = generator(105), 0
    asked = Options(metrics=("slowdown_2048",), margins={"slowdown_2048": 0.0})
    for pair in range(200):
        noise = 0.05 * np.exp(0.1 * rng.standard_normal((10, 1)))
        for run, took in enumerate(samples(rng, 10, 1000, 0.5, sigma=noise)):
            ends = np.rint(np.cumsum(took) * 1e9).astype(np.int64)
            one = Series(np.append(0, ends[:-1]), ends, np.ones(len(ends)))
            write(measured({0: one}), tmp_path / f"{pair}" / "ab"[run % 2] / f"run{run}")
        (found,) = judged(tmp_path / f"{pair}" / "a", tmp_path / f"{pair}" / "b", asked).comparison.metrics
        assert found.runs == (5, 5)
        alarms += found.verdict in CHANGED
    assert 0 < alarms <= most(200, 0.085)


def test_one_run_does_not_set_the_threshold(tmp_path):
    """Defends: ten times the detours called equivalent because one run of the base, or of the calibration, jitters."""
    base, new = arm(tmp_path / "a", 0.3 * US, 90 * US), arm(tmp_path / "b", 0.3 * US, 90 * US, share=0.1)
    write(measured({0: jittery(9, 50 * US, 90 * US)}), base / "run5")
    own = arm(tmp_path / "c", 50 * US, 90 * US)
    for options in (Options(), Options(calibration=own)):
        found = judged(base, new, options)
        assert found.tau_s < 5 * US
        assert found.threshold.run != "run5"
    assert verdict_of("detours_per_s", base, new) == "unfit"
    quiet = arm(tmp_path / "d", 0.3 * US, 90 * US)
    assert verdict_of("detours_per_s", quiet, new) == "regressed"


def test_the_rank_with_most_jitter_sets_the_threshold(tmp_path):
    for run in range(5):
        ranks = {rank: jittery(10 * rank + run, (0.3, 5)[rank] * US, 90 * US) for rank in range(2)}
        write(measured(ranks), tmp_path / f"run{run}")
    found = judged(tmp_path, tmp_path, Options()).threshold
    assert (found.folder, found.rank) == (tmp_path, 1)
    assert found.tau_s == pytest.approx(30 * US, rel=0.05)


def test_detours_below_the_threshold_are_no_equivalence(tmp_path):
    """Defends: no detours on both sides, as none is so long, called equivalent."""
    base, new = arm(tmp_path / "a", 0.3 * US, 90 * US), arm(tmp_path / "b", 0.3 * US, 90 * US, share=0.1)
    result = invoke("compare", base, new, "--metric", "detours_per_s", "--tau", "1000000s")
    assert result.exit_code == 3, result.output
    told = " ".join(result.output.split())
    assert "no run has a detour above 1e+06 s, though some have one above their own threshold" in told
    still = arm(tmp_path / "c", 0.3 * US, 0.0)
    assert verdict_of("detours_per_s", still, still, tau_s=1e-3) == "equivalent"


def test_a_metric_that_runs_do_not_tell_is_named(tmp_path):
    for name in ("a", "b"):
        write(measured({0: quanta(0, 40)}), tmp_path / name / "run0")
    error = invoke("compare", tmp_path / "a", tmp_path / "b", "--metric", "slowdown_2048").exception
    assert isinstance(error, WrongInput)
    assert str(error) == (
        "--metric must be one that all these runs tell, of median_s, p99_s, noise_share, detours_per_s, "
        "found 'slowdown_2048'"
    )


def test_a_margin_of_what_a_calibration_does_not_tell_stays(tmp_path, monkeypatch):
    """Defends: a margin that was asked for and silently is the default."""
    own = judge.arm_of(arms(tmp_path, 1.0)[0], None)
    told = {"median_s": own.numbers(1e-3)["median_s"]}
    monkeypatch.setattr(judge.Arm, "numbers", lambda *_: told)
    found = judge.calibrated(own, 1e-3, Options(margins={"slowdown_2048": 0.2}))
    assert found["slowdown_2048"] == 0.2
    assert found["median_s"] > 0


def test_a_calibration_of_one_run_is_refused(tmp_path):
    a, b = arms(tmp_path, 1.0)
    error = invoke("compare", a, b, "--calibrate", a / "run0").exception
    assert isinstance(error, WrongInput)
    assert str(error) == f"--calibrate {a / 'run0'} must have 2 runs or more, found 1"


def test_a_run_that_is_the_working_folder_has_a_name(tmp_path, monkeypatch):
    """Defends: a run named "" in the file of the verdict."""
    a, _ = arms(tmp_path, 1.0, runs=1)
    monkeypatch.chdir(a / "run0")
    assert invoke("compare", ".", a, "--json", tmp_path / "c.json").exit_code == 3
    told = json.loads((tmp_path / "c.json").read_text())
    assert list(told["base"]["runs"]) == ["run0"]
    told["base"]["runs"] = {"": told["base"]["runs"]["run0"]}
    assert not schema("compare").is_valid(told)


def test_the_threshold_is_told_and_may_be_given(tmp_path):
    a, b = arms(tmp_path, 1.0)
    result = invoke("compare", a, b, "--tau", "250us", "--json", tmp_path / "c.json")
    assert "above 250 us, as asked" in result.output
    assert json.loads((tmp_path / "c.json").read_text())["tau_s"] == 250e-6
    told = " ".join(invoke("compare", a, b).output.split())
    found = judged(a, b, Options()).threshold
    assert f"by the jitter of rank 0 in {found.run} of {found.folder}, the middle run" in told
    assert "--tau must be more than 0 s, found 0" in str(invoke("compare", a, b, "--tau", "0s").exception)


def test_a_comparison_is_of_its_schema(tmp_path):
    """Defends: verdicts of which nobody can say of what files, or with which seed."""
    a, b = arms(tmp_path, 1.10)
    result = invoke("compare", a, b, "--calibrate", a, "--seed", "7", "--json", tmp_path / "c.json")
    assert result.exit_code in (1, 3, 4), result.output
    told = json.loads((tmp_path / "c.json").read_text())
    check = schema("compare")
    check.validate(told)
    assert told["seed"] == 7
    assert told["new"]["folder"] == str(b)
    file = next((b / "run3").glob("*.parquet"))
    assert told["new"]["runs"]["run3"] == {file.name: sha256(file.read_bytes()).hexdigest()}
    assert told["calibration"] == told["base"]
    for name in told:
        assert not check.is_valid({k: v for k, v in told.items() if k != name}), f"{name} may be missing"
    few = tmp_path / "few.json"
    assert invoke("compare", a / "run0", b / "run0", "--json", few).exit_code == 3
    check.validate(json.loads(few.read_text()))


@pytest.mark.parametrize(
    ("fail_on", "code"),
    [
        ("regressed", 1),
        ("unfit,regressed", 1),
        ("inconclusive, unfit", 0),
        ("regressed,inconclusive,unfit", 1),
    ],
)
def test_only_verdicts_that_are_named_fail(tmp_path, fail_on, code):
    a, b = arms(tmp_path, 1.10)
    to = tmp_path / "c.json"
    result = invoke("compare", a, b, "--metric", "median_s", "--fail-on", fail_on, "--json", to)
    assert result.exit_code == code, result.output
    told = json.loads(to.read_text())
    assert (told["verdict"], told["exit"]) == ("regressed", code)
    assert told["fail_on"] == [name.strip() for name in fail_on.split(",")]


def test_a_verdict_without_a_code_cannot_fail(tmp_path):
    error = invoke("compare", tmp_path, tmp_path, "--fail-on", "improved").exception
    assert isinstance(error, WrongInput)
    assert str(error) == "--fail-on must be of regressed, inconclusive, unfit by commas, found 'improved'"


@pytest.mark.parametrize("error", [ZeroDivisionError(), Failure("no"), LostRank("gone"), OSError("full")])
@pytest.mark.parametrize("verb", ["compare", "project"])
def test_a_failure_is_no_verdict(tmp_path, monkeypatch, verb, error):
    """Defends: exit codes 1 and 3 of a failure, which a gate would read as a regression, a budget or a lack of data."""

    def fails(*_, **__):
        raise error

    write(measured({0: quanta(0, 500)}), tmp_path / "run")
    monkeypatch.setattr(judge, "judged", fails)
    monkeypatch.setattr(many_ranks, "projections", fails)
    arguments = {"compare": ("run", "run"), "project": ("run", "--budget", "1.1")}[verb]
    result = invoke(verb, *(tmp_path / a if a == "run" else a for a in arguments))
    assert result.exit_code == 5, result.output
    told = f"error: {error}" if str(error) else "ZeroDivisionError"
    assert told in result.stderr


def test_wrong_input_of_a_verdict_is_usage(tmp_path):
    """Defends: 5 for what the user can mend."""
    for arguments in (("compare", tmp_path, tmp_path), ("project", tmp_path)):
        assert isinstance(invoke(*arguments).exception, WrongInput)


@pytest.mark.parametrize("verb", ["analyze", "project", "compare", "selftest"])
@pytest.mark.parametrize("to", ["", ".", "..", "/dev/null"])
def test_a_file_that_cannot_be_is_refused_before_the_work(monkeypatch, tmp_path, verb, to):
    """Defends: a traceback, or a regression that ends with 2, once all is measured."""
    for owner, name in (
        (reading, "read_any"),
        (reading, "read_quanta"),
        (judge, "judged"),
        (selftest, "curve"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("the work was begun"))
    monkeypatch.chdir(tmp_path)
    arguments = {"compare": [tmp_path, tmp_path], "selftest": []}.get(verb, [tmp_path])
    error = invoke(verb, *arguments, "--json", to).exception
    assert isinstance(error, WrongInput), error
    assert str(error) == f"--json must be a file, found {to or '.'!r}"
    for long in ("x" * 240, "x" * 300):  # the unfinished file has a longer name
        error = invoke(verb, *arguments, "--json", long).exception
        assert isinstance(error, WrongInput), error
        assert "--json: cannot write in .: File name too long" in str(error)
    error = invoke(verb, *arguments, "--json", tmp_path / "none" / "c.json").exception
    assert isinstance(error, WrongInput), error
    assert f"--json: cannot write in {tmp_path / 'none'}: No such file or directory" in str(error)


def test_a_file_that_could_not_be_written_is_no_wrong_input(tmp_path, monkeypatch):
    a, b = arms(tmp_path, 1.10)
    to = tmp_path / "out" / "c.json"
    to.parent.mkdir()
    monkeypatch.setattr(judge, "show", lambda _: to.parent.rmdir())  # while it works
    assert invoke("compare", a, b, "--metric", "median_s", "--json", to).exit_code == 5


def test_projections_are_of_their_schema(tmp_path):
    """Defends: a field that was renamed, a refusal that is NaN, a budget of which the file says nothing."""
    check, to = schema("project"), tmp_path / "p.json"
    series = jittery(0, 5 * US, 8e-3)
    hit = series.end_ns[series.seconds > 5e-3]
    trace = measured({0: series, 1: jittery(1, 5 * US, 8e-3)})
    trace.rows[0, "event", "gc"] = Series(hit - 8_000_000, hit, np.zeros(len(hit)))
    write(trace, tmp_path / "run")
    one = ("project", tmp_path / "run", "--window", "2ms", "--json", to)
    result = invoke(*one, "--without", "gc", "--ranks", "8,16384", "--budget", "1.0001")
    assert result.exit_code == 3, (result.output, result.exception)
    told = json.loads(to.read_text())
    check.validate(told)
    assert told["is_over_budget"] is None
    assert [p["model"] for p in told["projections"]] == ["ecdf", "gpd"]
    assert told["projections"][0]["refusals"][1]
    assert told["regained"][0]["seconds"][0] > 0
    assert set(told["files"]) == {"rank00000.parquet", "rank00001.parquet"}
    assert told["options"]["without"] == "gc"
    for name in told:
        assert not check.is_valid({k: v for k, v in told.items() if k != name}), f"{name} may be missing"
    result = invoke(*one, "--model", "replay", "--cosched", "--ranks", "8", "--budget", "1.0001")
    told = json.loads(to.read_text())
    check.validate(told)
    assert told["is_over_budget"] is (result.exit_code == 1)
    assert told["options"]["is_cosched"] is True


def test_schemas_agree_on_what_they_share():
    """Defends: a projection that is told in one way by `analyze` and in another by `project`."""
    of_analysis, of_project = schema("analysis").schema["$defs"], schema("project").schema["$defs"]
    for name in ("tail", "number", "count", "positive", "numbers"):
        assert of_analysis[name] == of_project[name]
    assert of_analysis["projection"]["required"] == of_project["projection"]["required"]
