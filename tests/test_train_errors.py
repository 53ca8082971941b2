"""Whatever ends a command badly is one sentence and a documented exit code; other people's files stay as they are."""

import fcntl
import signal
import subprocess
import sys
import time

import forked
import pytest
import rank_faults
from rich.console import Console
from sigma_train.config import ConfigError, load_config
from sigma_train.console import say
from sigma_train.errors import verdict
from sigma_train.generate import generate
from sigma_train.tokenizer import train_tokenizer
from support import assert_one_sentence, sigma

TRAIN = ["train", "--preset", "smoke"]
WRONG = [
    (["--preset", "smok"], "unknown preset 'smok'; did you mean 'smoke'?"),
    (["--set", "optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
    (["--set", "optim.lr=-1"], "optim.lr must be a number above 0, found -1"),
    (["--set", "steps=1"], "--set wants section.key=value, found 'steps=1'; did you mean train.steps?"),
    (["--dtype", "f64"], "train.dtype must be 'f32' or 'bf16', found 'f64'"),
    (["--steps", "0"], "train.steps must be an integer from 1 to 1000000000, found 0"),
    (["--data", "/no/such/file"], "data.paths: no file matches '/no/such/file'"),
    (["--config", "/no/such.toml"], "cannot read config file /no/such.toml: No such file or directory"),
    (["--out", ""], "train.out must be the name of a folder, found ''"),
    (["--out", "\udcff"], "train.out must be the name of a folder, found '\\udcff'"),
    (
        ["--set", "train.threads=100000"],
        "train.threads must be an integer from 1 to 1024, or none, found 100000",
    ),
    (
        ["--set", "model.vocab_size=4294967296"],
        "model.vocab_size must be an integer from 257 (every byte and the end of text) to 16777216, "
        "found 4294967296",
    ),
    (
        ["--set", "train.seed=99999999999999999999"],
        "train.seed must be an integer from 0 to 9223372036854775807, found 99999999999999999999",
    ),
    (
        ["--set", "model.hidden_size=100000000"],
        "model.hidden_size must be an integer from 1 to 1048576, found 100000000",
    ),
    (
        ["--set", "train.batch_size=100000000"],
        "train.batch_size must be an integer from 1 to 1048576, found 100000000",
    ),
    (
        [f"--set=model.{key}=1048576" for key in ("num_experts", "hidden_size", "intermediate_size")],
        "not enough memory for this; lower the sizes of [model] or train.batch_size",
    ),
    (
        [f"--set=model.{key}=1048576" for key in ("num_experts", "intermediate_size")],
        "not enough memory for 1688850397366016 bytes at once; lower the sizes of [model] or train.batch_size",
    ),
]


@pytest.mark.parametrize("args, message", WRONG, ids=[ascii(" ".join(args)) for args, _ in WRONG])
def test_wrong_settings_are_named(cache, tmp_path, args, message):
    result = sigma("train", "--preset", "smoke", "--out", str(tmp_path / "run"), *args, env=cache)
    assert_one_sentence(result, 1 if "memory" in message else 2, message)


@pytest.mark.parametrize("more", [["--steps", "2"], ["--set", "train.steps=2"], []], ids=str)
def test_a_section_that_is_no_table_is_named(cache, tmp_path, more):
    (tmp_path / "wrong.toml").write_text("train = 3\n")
    result = sigma("train", "--config", str(tmp_path / "wrong.toml"), *more, env=cache, cwd=tmp_path)
    assert_one_sentence(result, 2, "train must be a table of settings, found 3")


def test_an_integer_of_thousands_of_digits_is_no_traceback(tmp_path):
    (tmp_path / "wrong.toml").write_text(f"[train]\nsteps = {'9' * 5000}\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(None, tmp_path / "wrong.toml", [])
    with pytest.raises(ConfigError, match=r"train\.steps must be an integer from 1 to"):
        load_config(None, None, [f"train.steps={'9' * 5000}"])


ENVIRONMENT = [
    (["doctor"], "SIGMA_ISA", "vax"),
    ([*TRAIN, "--out", "run"], "SIGMA_BACKEND", "foo"),
    ([*TRAIN, "--out", "run"], "SIGMA_ISA", "vax"),
]


@pytest.mark.parametrize("args, name, value", ENVIRONMENT)
def test_a_wrong_environment_is_named(cache, tmp_path, args, name, value):
    result = sigma(*args, env={**cache, name: value}, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {name}")
    assert value in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run" / "config.toml").exists()


def test_an_empty_environment_variable_is_not_set(cache):
    assert sigma("doctor", env={**cache, "SIGMA_ISA": ""}).returncode == 0


def test_without_the_train_extra_the_extra_is_named(cache):
    code = "import sys; sys.modules['typer'] = None; import sigma_cli; sigma_cli.main()"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, "doctor"], env=cache, capture_output=True, text=True, check=False
    )
    message = "the module typer is not installed; pip install 'sigma-kernels[train]' brings it"
    assert_one_sentence(result, 1, message)


@pytest.mark.parametrize("error", [RuntimeError("other"), ValueError("other"), KeyError("other")], ids=repr)
def test_what_nobody_foresaw_keeps_its_traceback(error):
    assert verdict(error) is None


def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in ("/proc", "No such file or directory"), (f"{tmp_path}/file/x", "Not a directory"):
        result = sigma(*TRAIN, "--out", str(tmp_path / "run"), env={**cache, "SIGMA_CACHE": folder})
        message = f"data.cache_dir, or SIGMA_CACHE: cannot write in {folder}: {why}; name another folder"
        assert_one_sentence(result, 2, message)


def test_a_disk_that_fills_while_the_cache_is_built(cache, tmp_path):
    """A limit on the size of files stands for the disk."""
    args, env = [*TRAIN, "--out", str(tmp_path / "run")], {**cache, "SIGMA_CACHE": str(tmp_path / "cache")}
    with forked.Running(args, env, fault=rank_faults.disk_is_full) as process:
        result = process.result()
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot write {tmp_path}/cache/tokens-")
    assert result.stderr.endswith(".bin: File too large\n")
    assert not list((tmp_path / "cache").glob(".tmp-*"))


ONE_STEP = [*TRAIN, "--steps", "1", "--set", "data.max_bytes=200000"]


@pytest.fixture(scope="module")
def two_layers(cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("errors") / "run"
    result = sigma(*ONE_STEP, "--out", str(run), env=cache, fault=rank_faults.nothing)
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture
def run(two_layers, tmp_path):
    """A run of two layers, to be spoilt."""
    subprocess.run(["cp", "-r", two_layers, tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_a_report_that_cannot_be_written_is_one_sentence(cache, run):
    (run / "report.html").mkdir()
    result = sigma(*ONE_STEP, "--out", str(run), "--resume", env=cache, fault=rank_faults.no_sample)
    assert_one_sentence(result, 1, f"cannot write {run}/report.html: Is a directory")


MISFITS = [
    (
        "num_layers = 2",
        "num_layers = 3",
        "layers.2.input_layernorm.weight is missing, and 10 more do not fit",
    ),
    (
        "num_layers = 2",
        "num_layers = 1",
        "layers.1.input_layernorm.weight is unexpected, and 10 more do not fit",
    ),
    ("max_seq_len = 64", "max_seq_len = 64\ntie_embeddings = false", "lm_head.weight is missing"),
    (
        "head_dim = 32",
        "head_dim = 16",
        "layers.0.self_attn.q_proj.weight has shape [64, 64] instead of [32, 64], and 11 more do not fit",
    ),
]


@pytest.mark.parametrize("old, new, message", MISFITS)
@pytest.mark.parametrize("command", ["generate", "export"])
def test_a_model_that_does_not_fit_is_named(cache, run, tmp_path, command, old, new, message):
    """Defends: weights that stay random where the checkpoint has none for them."""
    settings = (run / "config.toml").read_text().replace("tie_embeddings = true\n", "")
    assert old in settings
    (run / "config.toml").write_text(settings.replace(old, new))
    result = sigma(command, str(run), *([str(tmp_path / "out")] if command == "export" else []), env=cache)
    checkpoint = run / "checkpoints" / "step-00000001"
    assert_one_sentence(result, 2, f"{checkpoint} does not fit the model of the settings: {message}")
    assert not (tmp_path / "out").exists()


FOREIGN = train_tokenizer(["a tokenizer of another run, with more tokens than the model has " * 50], 600)
BROKEN = [
    (lambda path: path.write_text('{"version"'), "is not a tokenizer: "),
    (lambda path: path.write_bytes(b"\xff"), "is not a tokenizer: "),
    (
        lambda path: path.write_text(FOREIGN._serialized.replace("endoftext", "end")),
        "is not the tokenizer of a run: ",
    ),
    (lambda path: path.unlink(), "is missing"),
]


@pytest.mark.parametrize("spoil, message", BROKEN)
@pytest.mark.parametrize("command", ["generate", "export"])
def test_a_broken_tokenizer_is_named(cache, run, tmp_path, command, spoil, message):
    spoil(run / "tokenizer.json")
    result = sigma(command, str(run), *([str(tmp_path / "out")] if command == "export" else []), env=cache)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {run}/tokenizer.json {message}")
    assert len(result.stderr.splitlines()) == 1


def test_a_tokenizer_larger_than_the_model_is_named(cache, run):
    (run / "config.toml").write_text(
        (run / "config.toml").read_text().replace("vocab_size = 512", "vocab_size = 300")
    )
    result = sigma("generate", str(run), env=cache)
    assert_one_sentence(result, 2, f"{run}/tokenizer.json has 512 tokens, more than model.vocab_size = 300")


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--seed", "99999999999999999999"],
            "--seed must be an integer from 0 to 9223372036854775807, found 99999999999999999999",
        ),
        (["--seed", "-1"], "--seed must be an integer from 0 to 9223372036854775807, found -1"),
        (["--prompt", "\udcff"], "--prompt must be UTF-8 text, found '\\udcff'"),
    ],
)
def test_wrong_options_of_generate_are_named(cache, two_layers, args, message):
    assert_one_sentence(sigma("generate", str(two_layers), *args, env=cache), 2, message)


def test_the_lowest_temperature_takes_the_likeliest(two_layers):
    from sigma_train.generate import load_run

    _, model, tokenizer = load_run(two_layers)
    greedy, coldest = (generate(model, tokenizer, "def ", 20, temperature) for temperature in (0, 1e-320))
    assert coldest == greedy


def test_an_export_to_a_place_that_cannot_be_written(cache, run, tmp_path):
    (tmp_path / "file").write_text("")
    result = sigma("export", str(run), str(tmp_path / "file" / "out"), env=cache)
    assert_one_sentence(
        result, 2, f"export: cannot write in {tmp_path}/file: Not a directory; name another folder"
    )


def test_a_foreign_folder_is_left_alone(cache, tmp_path):
    (tmp_path / "config.toml").write_text("mine")
    for more in [], ["--resume"]:
        result = sigma(*TRAIN, "--out", str(tmp_path), *more, env=cache)
        message = f"train.out: {tmp_path} holds config.toml and no run; name a new or an empty folder"
        assert_one_sentence(result, 2, message)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.toml", "mine")]


def test_a_folder_that_cannot_be_written_is_named(cache, tmp_path):
    (tmp_path / "file").write_text("")
    result = sigma(*TRAIN, "--out", str(tmp_path / "file" / "run"), env=cache)
    message = f"train.out: cannot write in {tmp_path}/file/run: Not a directory; name another folder"
    assert_one_sentence(result, 2, message)


def test_other_settings_on_resume_are_named(cache, two_layers):
    args = [*ONE_STEP, "--out", str(two_layers), "--resume"]
    result = sigma(*args, "--steps", "7", "--set", "optim.lr=1.0", env=cache)
    message = (
        f"{two_layers} holds a run of other settings: optim.lr was 0.003 and is 1.0, train.steps was 1 and is 7; "
        "give them again or name another --out"
    )
    assert_one_sentence(result, 2, message)


def wait_for(path, process) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def test_a_folder_has_one_run_at_a_time(cache, tmp_path):
    """Defends: two runs that sweep each other's files; a lock that outlives its process."""
    run = tmp_path / "run"
    args = [*TRAIN, "--set", "train.save_every=1", "--out", str(run)]
    with forked.Running([*args, "--steps", "5000"], cache) as first:
        wait_for(run / "run.lock", first)
        for more in [], ["--resume"]:
            second = sigma(*args, *more, env=cache)
            message = f"train.out: another process trains in {run}; wait for it or name another folder"
            assert_one_sentence(second, 2, message)
    more = ["--steps", "5000", "--set", "train.time_budget_s=0.01", "--resume"]
    third = sigma(*args, *more, env=cache, fault=rank_faults.nothing)
    assert third.returncode == 0, third.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_preparation(cache, tmp_path, number):
    """The test holds the lock of the cache, so that the run waits there."""
    env = {**cache, "SIGMA_CACHE": str(tmp_path / "cache")}
    first = sigma(*ONE_STEP, "--out", str(tmp_path / "first"), env=env, fault=rank_faults.nothing)
    assert first.returncode == 0, first.stderr
    (lock,) = (tmp_path / "cache").glob("lock-*")
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with forked.Running(
            [*ONE_STEP, "--out", str(tmp_path / "run")], env, fault=rank_faults.heed_signals
        ) as process:
            wait_for(tmp_path / "run" / "run.lock", process)
            process.send_signal(number)
            result = process.result(60)
    assert_one_sentence(result, 128 + number, f"stopped by {number.name} before the work was done")
    again = sigma(*ONE_STEP, "--out", str(tmp_path / "run"), env=env, fault=rank_faults.nothing)
    assert again.returncode == 0, again.stderr


def test_a_signal_while_the_bound_is_timed(cache, tmp_path):
    """Defends: a claim that something was saved."""
    args = [*TRAIN, "--out", str(tmp_path / "run")]
    with forked.Running(args, cache, fault=rank_faults.signalled_while_the_bound_is_timed) as process:
        result = process.result()
    assert_one_sentence(result, 143, "stopped by SIGTERM before the work was done")
    assert "saved" not in result.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_that_python_drops_ends_it_all_the_same():
    """Defends: a run that waits for ever, since SIGTERM met a `__del__`, whose exceptions Python only prints."""
    code = (
        "import os, signal, sys, time, types, sigma_cli\n"
        "class Dropped:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "def app():\n"
        "    Dropped()\n"
        "    print('goes on', flush=True)\n"
        "    time.sleep(60)\n"
        "sys.modules['sigma_cli.commands'] = types.SimpleNamespace(app=app)\n"
        "sigma_cli.main()"
    )
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert result.stdout == "goes on\n"
    assert result.stderr.endswith("error: stopped by SIGTERM before the work was done\n")
    assert result.returncode == 143


def test_a_line_is_told_as_it_is(capsys):
    """Defends: a folder `runs[bold]` told as `runs`, a path that is broken at the width of a terminal."""
    line = f"wrote runs[bold]/{'long' * 50}"
    say(Console(width=40), line)
    assert capsys.readouterr().out == f"{line}\n"
