"""Checks of a machine, against made-up machines that are fit and that are not."""

import json
from pathlib import Path

import noise_gate
import pytest
import test_noise_live as live
import test_noise_train as train
import test_noise_train_loss as loss
from sigma_noise import fitness, inject_cli
from sigma_noise.fitness import Check
from sigma_train.errors import WrongInput


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


SOURCE = "sys/devices/system/clocksource/clocksource0/current_clocksource"
GOVERNOR = "sys/devices/system/cpu/cpu3/cpufreq/scaling_governor"


@pytest.mark.parametrize("source, fit", [("tsc", True), ("hpet", False), ("acpi_pm", False), ("xen", False)])
def test_clock_source(tmp_path, source, fit):
    check = fitness.clock_source(write(tmp_path, SOURCE, source + "\n"))
    assert check.fit is fit
    assert check.value == source
    assert bool(check.remedy) is not fit


def test_what_cannot_be_read_is_not_judged(tmp_path):
    """Defends: a machine called fit or unfit by a file that it does not have."""
    for check in (
        fitness.clock_source(tmp_path),
        fitness.governor(3, tmp_path),
        fitness.quota(tmp_path),
        fitness.isolation(3, tmp_path),
        fitness.load(tmp_path),
        fitness.steal(None, None, 1.0, 1),
    ):
        assert check.fit is None, check.name
        assert check.value is None, check.name


@pytest.mark.parametrize("governor, fit", [("performance", True), ("powersave", False), ("schedutil", False)])
def test_governor(tmp_path, governor, fit):
    assert fitness.governor(3, write(tmp_path, GOVERNOR, governor)).fit is fit


@pytest.mark.parametrize(
    "files, fit, cpus",
    [
        ({"a/b/cpu.max": "max 100000"}, True, None),
        ({"a/b/cpu.max": "150000 100000"}, False, 1.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, False, 0.5),
    ],
)
def test_quota(tmp_path, files, fit, cpus):
    """Defends: a quota of a group above ours, which is where pods have theirs."""
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "proc/self/mountinfo", "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    for name, text in files.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", text)
    check = fitness.quota(tmp_path)
    assert check.fit is fit
    assert check.value == cpus


@pytest.mark.parametrize("limit, fit", [("-1", True), ("25000", False)])
def test_quota_of_version_1(tmp_path, limit, fit):
    write(tmp_path, "proc/self/cgroup", "4:cpu,cpuacct:/a\n")
    write(
        tmp_path, "proc/self/mountinfo", "31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    )
    write(tmp_path, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", limit)
    write(tmp_path, "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000")
    assert fitness.quota(tmp_path).fit is fit


@pytest.mark.parametrize("running, fit", [(1, True), (400, False)])
def test_load(tmp_path, running, fit):
    write(tmp_path, "proc/loadavg", f"9.0 9.0 9.0 {running}/500 77\n")
    write(tmp_path, "proc/pressure/cpu", "some avg10=0 total=1000\n")

    def half_a_second(_: float) -> None:
        write(tmp_path, "proc/pressure/cpu", "some avg10=0 total=126000\n")

    check = fitness.load(tmp_path, half_a_second)
    assert check.fit is fit
    assert "waited 25%" in check.sentence


def test_steal():
    assert fitness.steal(0.0, 10e6, 2.0, 1).fit is True
    assert fitness.steal(0.0, 100e6, 2.0, 1).fit is False
    assert fitness.steal(0.0, 100e6, 2.0, 4).fit is True
    assert fitness.steal(5e6, 105e6, 2.0, 1).value == pytest.approx(0.05)


def test_steal_is_a_share_of_the_time_it_was_counted_over(monkeypatch):
    """Defends: steal of 2.5 s set beside the 2 s of one check; of all CPUs beside those that this process may use."""
    monkeypatch.setattr(fitness, "find", lambda: ([], {}))
    now, stolen, cpus = [0], iter([0.0, 75e6, 0.0, 8 * 75e6]), 8
    monkeypatch.setattr(fitness, "_steal_ns", lambda cpu, root: next(stolen))
    monkeypatch.setattr(fitness.time, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(fitness.os, "cpu_count", lambda: cpus)
    for name, seconds in (("load", 0.5), ("baseline", 2.0)):

        def check(*_, name=name, seconds=seconds):
            now[0] += round(seconds * 1e9)
            return Check(name, True, 0.0, "quiet")

        monkeypatch.setattr(fitness, name, check)
    for cpu in (3, None):
        steal = {c.name: c for c in fitness.examine(cpu=cpu, seconds=2.0)}["steal"]
        assert steal.value == pytest.approx(0.03)


def test_a_duration_that_is_none_is_refused_by_a_sentence():
    with pytest.raises(WrongInput, match="--duration must be seconds above 0, found 0"):
        fitness.examine(seconds=0.0)


def test_a_pressure_without_its_line_is_not_judged(tmp_path):
    """Defends: a kernel whose file is empty, as where pressure is switched off."""
    write(tmp_path, "proc/loadavg", "9.0 9.0 9.0 1/500 77\n")
    write(tmp_path, "proc/pressure/cpu", "full avg10=0 total=1000\n")
    assert fitness.load(tmp_path).fit is None


def test_isolation_is_told_and_not_judged(tmp_path):
    write(tmp_path, "sys/devices/system/cpu/isolated", "2-3\n")
    assert "CPU 3 is isolated" in fitness.isolation(3, tmp_path).sentence
    assert "only 2-3" in fitness.isolation(1, tmp_path).sentence
    assert fitness.isolation(1, tmp_path).fit is None


def test_this_machine(monkeypatch, capsys):
    """Defends: a check that fails on a real machine; JSON with NaN; a verdict other than the worst check's."""
    checks = fitness.examine(seconds=0.05)
    names = [c.name for c in checks]
    assert names == [
        "clock source", "clock reading", "isolation", "frequency governor", "CPU quota", "load",
        "baseline noise", "steal", "accelerators",
    ]  # fmt: skip
    noise = checks[names.index("baseline noise")]
    assert 0 <= noise.value <= 1
    assert noise.fit is (noise.value <= fitness.BASELINE)
    assert all(c.remedy for c in checks if c.fit is False)
    assert json.loads(json.dumps(fitness.to_json(checks), allow_nan=False))["fit"] is fitness.is_fit(checks)

    import typer

    fit = [Check("a", True, 1.0, "good"), Check("b", None, None, "not readable")]
    monkeypatch.setattr(fitness, "examine", lambda **_: fit)
    inject_cli.doctor(as_json=True)
    assert json.loads(capsys.readouterr().out)["fit"] is True
    monkeypatch.setattr(fitness, "examine", lambda **_: [*fit, Check("c", False, 0.3, "bad", "do this")])
    with pytest.raises(typer.Exit) as ended:
        inject_cli.doctor()
    assert ended.value.exit_code == 4
    told = capsys.readouterr().out
    assert "UNFIT c" in told
    assert "to mend it: do this" in told
    assert told.endswith("unfit\n")


def test_live_tests_skip_with_their_figure(tmp_path, monkeypatch):
    """Defends: acceptance 23.  A measurement of what others did, or a skip that does not say how noisy it was."""
    monkeypatch.setattr(live, "AUTOGROUP", tmp_path / "autogroup")
    monkeypatch.setattr(noise_gate, "baseline_noise", lambda *_: 0.273)
    with pytest.raises(pytest.skip.Exception, match=rf"27\.3% of CPU {live.CPU} is lost .* at most 20%"):  # noqa: SIM117
        with live.quiet_cpu():
            pytest.fail("the test went on")
    monkeypatch.setattr(noise_gate, "baseline_noise", lambda *_: 0.2)
    with live.quiet_cpu():
        went_on = True
    assert went_on


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (train, "test_the_rank_that_is_stopped_is_named"),
        (loss, "test_the_rank_the_cause_and_the_loss_are_told"),
    ],
)
def test_live_trainings_skip_before_they_train(owner, name, tmp_path, monkeypatch):
    """Defends: acceptance 23, of the two that train for minutes before they look at what they measured."""
    monkeypatch.setattr(noise_gate, "baseline_noise", lambda *_: 0.273)
    monkeypatch.setattr(owner, "disturbed", lambda *_: pytest.fail("it trained"))
    with pytest.raises(pytest.skip.Exception, match=r"27\.3% of CPU .* at most 20%"):
        getattr(owner, name)({}, tmp_path)
    monkeypatch.setattr(noise_gate, "baseline_noise", lambda *_: 0.2)
    with pytest.raises(pytest.fail.Exception, match="it trained"):
        getattr(owner, name)({}, tmp_path)
