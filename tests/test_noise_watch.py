"""`run --attribute`: counters and causes in the file of a measurement."""

from types import SimpleNamespace

import numpy as np
import pytest
from sigma_cli.commands import app
from sigma_noise import inject_cli, online_cli, watch
from sigma_noise.accelerators import Poller
from sigma_noise.attribution import Attribution
from sigma_noise.trace import Series, Trace, read
from sigma_noise.watch import causes
from typer.testing import CliRunner


def test_a_run_that_is_watched(tmp_path):
    """Defends: counters that stay out of the file, causes of another rank or series, a table without them."""
    common = ["noise", "run", "--duration", "300ms", "--warm-up", "0s", "--out"]
    told = CliRunner().invoke(app, [*common, str(tmp_path / "a"), "--attribute"], catch_exceptions=False)
    assert told.exit_code == 0
    trace = read(tmp_path / "a")
    assert {"run_delay_ns", "on_cpu_ns", "steal_ns", "interrupts"} <= set(trace.names("counter"))
    quanta, cpu = trace.get(0, "quantum", "spin"), trace.get(0, "counter", "on_cpu_ns")
    assert cpu.start_ns[0] < quanta.start_ns[0]
    assert cpu.start_ns[-1] > quanta.end_ns[-1]
    about = trace.ranks[0]
    assert about["sampler"]["cost_s"] > 0
    assert about["fault_cost_s"]["minor_faults"] > 0
    assert about["accelerators"]["ticks"] >= 0
    found = dict(causes(trace, 0))
    assert set(found) == {"spin", "detour"}
    for name, of in found.items():
        assert sum(s.share for s in of.shares) + of.unknown.share == pytest.approx(1.0)
        assert of.sentence in " ".join(told.output.split()), name
    floor = np.quantile(quanta.seconds, 0.05)
    assert found["spin"].lost_s == pytest.approx(np.maximum(quanta.seconds - floor, 0).sum())
    detours = trace.get(0, "event", "detour")
    assert found["detour"].lost_s == pytest.approx(detours.value.sum())
    assert found["detour"].share("detour") == 0.0


def test_what_was_opened_is_closed_where_the_next_fails(monkeypatch):
    """Defends: a thread that polls on through what comes after a measurement that failed to begin, or to end."""
    polls = []
    poller = Poller([SimpleNamespace(name="gpu0", unread={}, gauges=dict, reasons=set)], period_s=0.01)
    monkeypatch.setattr(watch, "Poller", lambda **_: poller)
    monkeypatch.setattr(poller, "close", lambda: polls.append("closed"))

    def fail(*_):
        raise RuntimeError("no thread for it")

    monkeypatch.setattr(watch.Sampler, "__enter__", fail)
    with pytest.raises(RuntimeError, match="no thread"), watch.Watch(0):
        pytest.fail("it began")
    assert polls == ["closed"]
    assert not poller._ticker._thread.is_alive()
    monkeypatch.undo()
    poller = Poller([SimpleNamespace(name="gpu0", unread={}, gauges=dict, reasons=set)], period_s=0.01)
    monkeypatch.setattr(watch, "Poller", lambda **_: poller)
    exit_ = watch.Sampler.__exit__
    monkeypatch.setattr(watch.Sampler, "__exit__", lambda *args: (exit_(*args), fail()))
    with pytest.raises(RuntimeError, match="no thread"), watch.Watch(0):
        pass
    assert not poller._ticker._thread.is_alive()


def test_a_run_that_is_not_watched_has_no_causes():
    series = Series(np.array([0, 10]), np.array([10, 30]), np.ones(2))
    trace = Trace({}, {0: {"measured": {"spin": {"mode": "fwq"}}}}, {(0, "quantum", "spin"): series})
    assert causes(trace, 0) == []
    trace.ranks[0]["sampler"] = {}
    ((name, found),) = causes(trace, 0)
    assert name == "spin"
    assert isinstance(found, Attribution)
    assert found.unknown.share == 1.0


def test_the_verbs_are_commands_of_sigma():
    shown = CliRunner().invoke(app, ["noise", "--help"]).output
    for verb in (inject_cli.inject, inject_cli.doctor, inject_cli.selftest, online_cli.watch):
        assert verb.__name__ in shown
