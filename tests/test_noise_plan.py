"""What `sigma noise run` is asked for: times, and options that cannot be or would change nothing."""

import pytest
from sigma_cli.commands import app
from sigma_noise.options import seconds
from sigma_noise.plan import Plan
from sigma_train.errors import WrongInput
from typer.testing import CliRunner


@pytest.mark.parametrize(
    "settings, given, option",
    [
        ({"modes": ("detours",)}, "kernel", "kernel"),
        ({"modes": ("detours",)}, "warm-up", "warm-up"),
        ({"modes": ("detours",)}, "seed", "seed"),
        ({"modes": ("detours",), "attribute": True}, "seed", None),
        ({"modes": ("detours",)}, "duration", None),
        ({"modes": ("fwq",)}, "threshold", "threshold"),
        ({"modes": ("fwq", "detours")}, "threshold", None),
        ({}, "threads", "threads"),
        ({"kernels": ("spin", "gemm")}, "threads", None),
        ({"kernels": ("gemm",), "sizes": {"gemm": {"threads": 2}}}, "threads", "threads"),
        ({"kernels": ("gemm",), "modes": ("fwq",), "backend": "cuda"}, "threads", "threads"),
        ({}, "quantum", None),
    ],
)
def test_options_that_would_change_nothing_are_refused(settings, given, option):
    """Defends: a quantum, a threshold or threads that somebody asked for and that nothing heeds."""
    plan = Plan(**settings)
    if option is None:
        plan.check_used([given])
        return
    with pytest.raises(WrongInput, match=f"--{option} would change nothing"):
        plan.check_used(["duration", given])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threads": 2}, "--threads 2 would share the one CPU of --pin"),
        ({"sizes": {"gemm": {"threads": 2}}}, "--size gemm.threads 2 would share the one CPU of --pin"),
        ({"sizes": {"gemm": {"threads": 1}}}, None),
    ],
)
def test_threads_do_not_share_a_pin(settings, message):
    plan = Plan(kernels=("gemm",), pin=(0,), **settings)
    if message is None:
        plan.check(1)
        return
    with pytest.raises(WrongInput, match=message):
        plan.check(1)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("kernels", [("a2a",), ("a2a", "spin"), ("spin", "a2a")])
@pytest.mark.parametrize("modes", [("ftq",), ("fwq", "ftq"), ("ftq", "fwq")])
def test_an_all_to_all_of_fixed_time_is_refused(backend, kernels, modes):
    """Defends: a mode that was asked for and dropped without a word, as other kernels have it."""
    told = f"^--kernel a2a is fixed work: --mode must have fwq and not ftq, found {','.join(modes)}; "
    with pytest.raises(WrongInput, match=told):
        Plan(kernels=kernels, modes=modes, backend=backend).check(2)
    Plan(kernels=kernels, modes=("fwq",), backend=backend).check(2)


@pytest.mark.parametrize("option", ["quantum_s", "duration_s", "warm_up_s", "threshold_s"])
@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_times_of_a_plan_are_checked_before_it_begins(option, seconds):
    """Defends: a threshold that is found to be none when an hour of quanta is over."""
    with pytest.raises(WrongInput, match=f"--{option[:-2].replace('_', '-')} must be seconds"):
        Plan(**{option: seconds}).check(1)


def test_the_loop_that_does_nothing_may_go_on_for_days():
    """Defends: a limit of the stamps of quanta where none are timed."""
    Plan(modes=("detours",), duration_s=5e5).check(1)


@pytest.mark.parametrize("args", [["run", "--out", "x", "--quantum"], ["doctor", "--duration"]])
def test_a_time_beyond_all_is_wrong_usage(args):
    """Defends: a traceback of a number that no float holds."""
    told = CliRunner().invoke(app, ["noise", *args, "1e400"])
    assert told.exit_code == 2
    assert isinstance(told.exception, SystemExit)


def test_nproc_is_not_for_ranks_of_torchrun(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.delenv("SIGMA_RESTART_COUNT", raising=False)
    args = ["noise", "run", "--nproc", "2", "--out", str(tmp_path / "run")]
    told = CliRunner().invoke(app, args)
    assert isinstance(told.exception, WrongInput)
    assert "--nproc starts ranks, and these have been started by torchrun" in str(told.exception)


@pytest.mark.parametrize(
    "text, want", [("250us", 250e-6), ("1ms", 1e-3), ("10", 10), ("1.5s", 1.5), ("2m", 120), ("1h", 3600),
                   ("40ns", 40e-9), ("1e-3", 1e-3)]
)  # fmt: skip
def test_times(text, want):
    assert seconds(text) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "ms", "-1s", "1 min", "1.2.3s", "nan", "inf", "1e400", "1e999999999", "1e7s", "9" * 400 + "s"],
)
def test_what_is_no_time(text):
    with pytest.raises(Exception, match="is no time such as"):
        seconds(text)
