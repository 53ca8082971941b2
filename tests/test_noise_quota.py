"""A CPU quota as a disturbance: whatever happens, no control group stays, and nobody is in a wrong one."""

import os
import signal
import subprocess
from pathlib import Path

import noise_victims
import pytest
from noise_victims import Watching, eventually
from sigma_noise import quota as quota_module
from sigma_noise import watchdog
from sigma_noise.inject import Plan, TargetGone, Waiter, inject
from sigma_noise.quota import Quota
from sigma_train.errors import Failure, WrongInput


@pytest.fixture
def victim():
    with noise_victims.sleeping() as pid:
        yield pid


@pytest.fixture
def injector():
    with noise_victims.injectors() as start:
        yield start


def quota(pid: int) -> Quota:
    return Quota(pid, length_s=0.05, period_s=0.1)


@pytest.fixture
def groups(victim):
    """The folder in which a group for the victim would be made; skips where none can be."""
    try:
        with quota(victim) as target:
            home = target.made.parent
    except WrongInput as reason:
        pytest.skip(str(reason))
    return lambda: sorted(home.glob("sigma-noise-*"))


def membership(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


def test_a_quota_is_lifted_again(victim, groups):
    """Defends: a control group that is left behind, and a process in it."""
    home, before, during = membership(victim), groups(), []
    with Watching(victim, lambda _: during.append(membership(victim))) as waiter:
        trace = inject(quota(victim), Plan(0.1), waiter)
    assert any("sigma-noise" in text for text in during)
    assert membership(victim) == home
    assert groups() == before
    assert trace.run["quota_us"] == 50_000
    assert len(trace.get(0, "event", "cgroup quota")) == 1
    with pytest.raises(WrongInput, match="--period must lie"):
        Quota(victim, length_s=0.1, period_s=0.1)


def test_a_quota_of_a_target_with_children(groups):
    """Defends: a group that cannot be removed, as what the target started meanwhile is still in it."""
    before = groups()
    script = "read go; sleep 300 & echo $!; wait"
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        home, children = membership(parent.pid), []

        def start(sleep: int) -> None:
            if sleep == 1:
                print("go", file=parent.stdin, flush=True)
                children.append(int(parent.stdout.readline()))
                assert membership(children[0]) != home

        with Watching(parent.pid, start) as waiter:
            inject(quota(parent.pid), Plan(0.1), waiter)
        assert membership(children[0]) == membership(parent.pid) == home
        os.kill(children[0], signal.SIGKILL)
    assert groups() == before


def test_a_quota_whose_target_has_ended(groups):
    """Defends: a number that is another process's by now, moved about between control groups."""
    before = groups()
    with subprocess.Popen(["sleep", "300"]) as process, quota(process.pid) as target:
        process.kill()
        process.wait()
        target.pid = os.getpid()  # as if it had been given to this process
        home = membership(os.getpid())
        with Waiter() as waiter, pytest.raises(TargetGone):
            target.disturb(1000, waiter)
        assert membership(os.getpid()) == home
    assert membership(os.getpid()) == home
    assert groups() == before


@pytest.mark.parametrize("where", ["make", "watchdog"])
def test_a_quota_that_cannot_be_set_leaves_no_group(victim, groups, monkeypatch, where):
    before, open_files = groups(), len(os.listdir("/proc/self/fd"))
    if where == "make":
        monkeypatch.setattr(quota_module, "MOST_SHARES", "not a number")
        monkeypatch.setattr(quota_module, "MOST_WEIGHT", "not a number")
    else:
        monkeypatch.setattr(watchdog, "__file__", "/dev/null")
    with pytest.raises((WrongInput, Failure), match=r"no CPU quota can be set|did not start"), quota(victim):
        pytest.fail("it was set")
    assert groups() == before
    assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_injector_of_a_quota_that_is_ended(victim, groups, injector, tmp_path, number):
    """Defends: a control group, and a process in it, left behind by a signal."""
    home, before = membership(victim), groups()
    times = (
        "--length",
        "50ms",
        "--period",
        "100ms",
        "--duration",
        "90s",
        "--truth",
        str(tmp_path / "t.parquet"),
    )
    process = injector("--target", "quota", "--pid", str(victim), *times)
    eventually(lambda: membership(victim) != home, "no quota was set")
    process.send_signal(number)
    process.communicate(timeout=60)
    eventually(lambda: groups() == before, "the group was left behind")
    assert membership(victim) == home
