"""`sigma experiment`: arms over seeds, kept and gone on with; and each experiment's short form."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from functools import partial

import forked
import pytest
import rank_faults
from rich.console import Console
from sigma_experiments import EXPERIMENTS, grown, growth, lab, page, sparse
from sigma_experiments.cli import module_of
from sigma_experiments.lab import LOCK, SHORT, Lab, Run
from sigma_train.config import ConfigError
from sigma_train.errors import Failure, WrongInput
from sigma_train.files import locked
from sigma_train.model import LanguageModel
from support import assert_one_sentence, sigma

SMALL = {**SHORT, "model.num_layers": 2, "model.num_experts": 4, "train.steps": 4, "train.eval_every": 2}


@pytest.fixture
def make_lab(cache, tmp_path, monkeypatch):
    """Trainings in forked processes, whose start takes a tenth of a second."""
    env = {**cache, "OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("SIGMA_CACHE", cache["SIGMA_CACHE"])
    running = []

    class Started(forked.Running):
        """What it said is in its log when it has ended."""

        def __init__(self, args, log):
            super().__init__(args, env, fault=rank_faults.nothing)
            self.log = log
            running.append(self)

        def wait(self, timeout=None):
            code = super().wait(timeout)
            self.log.write_text("".join(file.read_text() for file in self._files))
            return code

    monkeypatch.setattr(lab, "started", Started)
    yield lambda seeds=1: Lab(tmp_path, seeds, True, 2, Console(quiet=True))
    for process in running:
        process.__exit__()


def test_runs_are_trained_once(make_lab, monkeypatch):
    """Defends: a finished run that is trained again, one of other settings that is kept."""
    runs = [Run("a", seed, SMALL) for seed in range(2)]
    trained = make_lab().train(runs)
    assert [trained[run].validation[-1][0] for run in runs] == [4, 4]
    assert trained[runs[0]].validation != trained[runs[1]].validation
    times = [(trained[run].folder / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    later = make_lab()
    again = later.train(runs)
    assert [(again[run].folder / "metrics.jsonl").stat().st_mtime_ns for run in runs] == times
    assert later.kept == {"a-seed0", "a-seed1"}
    other = Run("a", 0, {**SMALL, "train.eval_batches": 1})
    with pytest.raises(ConfigError, match=r"a-seed0 was trained with train\.eval_batches = 2, wanted is 1"):
        make_lab().train([other, runs[1]])
    shutil.rmtree(trained[runs[0]].folder / "checkpoints")  # killed after its last validation
    make_lab().train(runs)
    assert list((trained[runs[0]].folder / "checkpoints").glob("step-*4"))


@pytest.mark.parametrize(
    "code, told", [(0, "was stopped before its last step"), (-9, "was killed by SIGKILL; see")]
)
def test_a_training_that_somebody_ended_is_not_a_finished_one(tmp_path, monkeypatch, code, told):
    """Defends: a page of unfinished trainings; a line of progress as the reason of a death."""

    class Ended:
        def wait(self, timeout: float | None = None) -> int:
            return code

    monkeypatch.setattr(lab, "started", lambda args, log: Ended())
    with pytest.raises(Failure, match=f"^experiment: a-seed0 {told}"):
        Lab(tmp_path, 1, True, 1, Console(quiet=True)).train([Run("a", 0, SMALL)])


def test_two_experiments_do_not_share_a_folder(tmp_path):
    """Defends: one that writes the settings and logs of another's trainings."""
    with (
        locked(tmp_path / LOCK),
        pytest.raises(WrongInput, match=f"^--out: another experiment trains in {tmp_path}"),
    ):
        Lab(tmp_path, 1, True, 1, Console(quiet=True)).train([Run("a", 0, SMALL)])
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_signal_is_not_raised_again_while_trainings_save():
    """Defends: an experiment that ends before its trainings, whose folders the next call then finds held."""
    former = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        lab._Trainings().stop()
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_after_a_fault_what_waits_is_not_begun(tmp_path):
    """Defends: minutes of measuring after Ctrl-C or an error, which nothing but SIGKILL ends."""
    goes_on = threading.Event()
    one = Lab(tmp_path, 1, True, 1, Console(quiet=True))
    with contextlib.suppress(KeyboardInterrupt), one.threads() as pool:
        futures = [pool.submit(goes_on.wait, 10) for _ in range(3)]
        while not futures[0].running():
            time.sleep(0.001)
        threading.Timer(0.1, goes_on.set).start()
        raise KeyboardInterrupt
    assert [future.cancelled() for future in futures] == [False, True, True]


def test_settings_of_all_are_looked_at_first(make_lab, tmp_path):
    """Defends: an hour of training before a wrong word is found."""
    with pytest.raises(ConfigError, match=r"did you mean model\.top_k"):
        make_lab().train([Run("a", 0, SMALL), Run("b", 0, {**SMALL, "model.topk": 2})])
    assert not list(tmp_path.iterdir())


def test_a_training_that_fails_is_named(make_lab, tmp_path):
    """Defends: a failure that is passed over, others that go on behind one's back."""
    (tmp_path / "bad-seed0").mkdir()
    (tmp_path / "bad-seed0" / "foreign").write_text("")
    with pytest.raises(Failure, match=r"bad-seed0 failed: train.out: .* holds foreign and no run"):
        make_lab().train([Run("bad", 0, SMALL)])


def test_the_figures_of_an_arm_are_of_all_looks(make_lab):
    """Defends: a page whose JSON has the last look alone, and lacks what its table shows."""
    made = make_lab(2)
    trained = list(made.train(sparse.arm("a", made, {})).values())
    found = json.loads(json.dumps(sparse.data(trained, "router_top1")))
    assert (found["steps"], found["validation_steps"]) == ([2, 4, 6], [3, 6])
    assert [curve[-1] for curve in found["validation_bits_per_byte"]] == found["bits_per_byte"]
    of_layers = {
        "load_most",
        "load_entropy",
        "load_cv",
        "experts_dead",
        "router_entropy_of_mean",
        "balance_loss",
        "router_top1",
    }
    assert of_layers <= found.keys()
    for name in of_layers:
        assert [looks[-1] for looks in found[name]] == [each.layers(name)[1][-1] for each in trained]
        assert [len(looks) for looks in found[name]] == [3, 3]


def test_each_growth_stands_beside_no_growth(tmp_path):
    """Defends: growth that looks good because the weights that it began with are; a budget of another model."""
    arms = {arm.name: arm for arm in grown.arms(grown.FULL, 4)}
    growing = [arm for arm in arms.values() if arm.target != "small"]
    assert {arm.target for arm in growing} == {"deep", "wide"}
    for arm in growing:
        same = arms[growth.same_of(arm.name, grown.FULL)]
        assert (same.target, same.point, same.growth.experts) == ("small", arm.point, 1)
        assert same.growth.layers.sources == (0, 1, 2, 3)
    active = LanguageModel(config := Run("small", 0, grown.BASE).config(tmp_path)).active_parameters()
    assert grown.chinchilla_flops(config) == (active, 120 * active**2)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_in_short(name, make_lab, tmp_path, cache):
    """Defends: an experiment that no longer runs, a page whose pictures are not there, numbers JSON cannot hold."""
    found = module_of(name).run(make_lab())
    written = page.write(found, tmp_path / "page", name, "test", 1.0, 1.0)
    text = written.read_text()
    assert found.figures
    for key in found.figures:
        assert f"({name}-{key}.png)" in text
        assert (written.parent / f"{name}-{key}.png").read_bytes().startswith(b"\x89PNG")
    assert "nan" not in text.lower().split()
    json.loads((written.parent / f"{name}.json").read_text(), parse_constant=pytest.fail)


def test_an_unknown_experiment(cache, tmp_path):
    """Defends: a folder that is made before the name is looked at."""
    result = sigma("experiment", "balanse", "--out", str(tmp_path / "out"), env=cache)
    assert_one_sentence(result, 2, "unknown experiment 'balanse'; did you mean 'balance'?")
    assert not (tmp_path / "out").exists()


def test_a_page_that_cannot_be_written_is_told_first(cache, tmp_path):
    """Defends: an hour of training for a page that has no place."""
    (tmp_path / "file").write_text("")
    args = (
        "experiment",
        "balance",
        "--short",
        "--out",
        str(tmp_path / "out"),
        "--page",
        str(tmp_path / "file"),
    )
    told = f"--page: cannot write in {tmp_path / 'file'}: File exists; name another folder"
    assert_one_sentence(sigma(*args, env=cache), 2, told)
    assert not list(tmp_path.glob("out/*/*"))


def test_a_page_says_what_its_minutes_are_without(tmp_path):
    """Defends: "in 0.1 minutes" of an experiment that was gone on with."""
    written = page.write(
        page.Page("A", "text", {}, {}), tmp_path, "a", "sigma experiment a", 6.0, 12.0, kept=3
    )
    assert "trainings of 0.2 core-minutes in them, without 3 of calls before: " in written.read_text()


def test_trainings_end_with_a_killed_experiment(cache, tmp_path):
    """Defends: trainings that hold cores and folders when nobody waits for them."""
    run = Run("a", 0, {**SMALL, "train.steps": 1_000_000})
    settings, log, metrics = (tmp_path / name for name in ("a.toml", "a.log", f"{run.name}/metrics.jsonl"))
    settings.write_text(run.config(tmp_path).to_toml())
    deadline = time.monotonic() + 200
    starts = partial(rank_faults.starts_a_training, ["train", "--config", str(settings)], log)
    with forked.Running([], cache, fault=starts) as process:
        while not process.said():
            assert process.poll() is None
            time.sleep(0.01)
        training = int(process.said())
        try:
            while not (metrics.exists() and metrics.read_text()):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            process.kill()
            while "saved, continue with --resume" not in log.read_text():
                assert time.monotonic() < deadline, "it trains on"
                time.sleep(0.1)
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(training, signal.SIGKILL)


def test_the_command_from_its_start(tmp_path, cache):
    """Defends: a program that only works where the tests start trainings for it."""
    result = sigma(env=cache, fault=partial(rank_faults.trains_in_a_lab, tmp_path, Run("a", 0, SMALL)))
    assert result.stdout.split()[-1] == "4", result.stderr
