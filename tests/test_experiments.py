"""`sigma experiment`: arms over seeds, kept and gone on with; and each experiment's short form."""

import json
import os
import subprocess
import sys

import forked
import pytest
from rich.console import Console
from sigma_experiments import EXPERIMENTS, lab, page
from sigma_experiments.cli import module_of
from sigma_experiments.lab import SHORT, Lab, Run
from sigma_train.config import ConfigError
from sigma_train.errors import Failure
from support import assert_one_sentence, sigma

SMALL = {**SHORT, "model.num_layers": 2, "model.num_experts": 4, "train.steps": 4, "train.eval_every": 2}


@pytest.fixture
def make_lab(cache, tmp_path, monkeypatch):
    """Trainings in forked processes, whose start takes a tenth of a second."""
    env = {**cache, "OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("SIGMA_CACHE", cache["SIGMA_CACHE"])
    running = []

    def started(args, log):
        running.append(forked.Running(args, env))
        return running[-1]

    monkeypatch.setattr(lab, "started", started)
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
    again = make_lab().train(runs)
    assert [(again[run].folder / "metrics.jsonl").stat().st_mtime_ns for run in runs] == times


def test_settings_of_all_are_looked_at_first(make_lab, tmp_path):
    """Defends: an hour of training before a wrong word is found."""
    with pytest.raises(ConfigError, match=r"did you mean model\.top_k"):
        make_lab().train([Run("a", 0, SMALL), Run("b", 0, {**SMALL, "model.topk": 2})])
    assert not list(tmp_path.iterdir())


def test_a_training_that_fails_is_named(tmp_path, monkeypatch, cache):
    """Defends: a failure that is passed over, others that go on behind one's back."""
    monkeypatch.setenv("SIGMA_CACHE", cache["SIGMA_CACHE"])
    (tmp_path / "bad-seed0").mkdir()
    (tmp_path / "bad-seed0" / "foreign").write_text("")
    with pytest.raises(Failure, match=r"bad-seed0 failed: train.out: .* holds foreign and no run"):
        Lab(tmp_path, 1, True, 1, Console(quiet=True)).train([Run("bad", 0, SMALL)])


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


def test_the_command_from_its_start(tmp_path, cache):
    """Defends: a program that only works where the tests start trainings for it."""
    code = (
        "import sigma_experiments.lab as lab, sys; from sigma_train.folder import claimed\n"
        "from rich.console import Console; from pathlib import Path\n"
        "done = lab.Lab(Path(sys.argv[1]), 1, True, 1, Console()).train([lab.Run('a', 0, eval(sys.argv[2]))])\n"
        "print(*(each.validation[-1][0] for each in done.values()))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path), repr(SMALL)],
        env={**os.environ, **cache},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split()[-1] == "4"
