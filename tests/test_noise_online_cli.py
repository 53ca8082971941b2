"""`sigma noise watch`: medians of fixed work as they come, and what it says when their level changes."""

import re
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from sigma_noise import loops, online, online_cli
from sigma_noise.trace import Series
from sigma_train.errors import Stopped, WrongInput
from test_noise_analysis import invoke
from test_noise_changes import levels

MS = 1_000_000


def measured(monkeypatch, factors: np.ndarray) -> None:
    """In place of the loop: stretches of 16 quanta of 1 ms times each factor, of which every fifth has a detour; a
    second of the clock each.
    """
    stretches, clock = iter(factors), iter(range(10_000))

    def stretch(made: object, *, quantum_s: float, duration_s: float) -> Series:
        took = np.full(16, round(MS * next(stretches)))
        took[::5] *= 30
        ends = np.cumsum(took)
        return Series(ends - took, ends, np.ones(16))

    monkeypatch.setattr(loops, "run_fixed_work", stretch)
    monkeypatch.setattr(online_cli.time, "monotonic", lambda: float(next(clock)))


@pytest.mark.parametrize(
    "factor, shift, code, word", [(1.1, "0.02", 1, "longer"), (0.9, "0.02", 0, "less"), (1.1, "0.2", 0, "")]
)
def test_a_level_that_changes_is_told_while_it_is_watched(monkeypatch, factor, shift, code, word):
    """Defends: a verb that does not feed the detector, means that detours move, a machine that got faster and fails."""
    measured(monkeypatch, levels(np.random.default_rng(1), 200, (100, factor), sigma=0.003))
    result = invoke("watch", "--duration", "150s", "--shift", shift)
    assert result.exit_code == code, result.output
    first, *changes, last = result.output.splitlines()
    assert re.fullmatch(r"spin: (1 ms|99\d us) a quantum; watching", first)
    assert last == f"149 medians of 1 s, {len(changes)} change{'' if changes else 's'} of level"
    assert len(changes) == bool(word)
    for line in changes:
        assert re.fullmatch(
            rf"[\d:]{{8}}  spin takes (9\.|10\.)\d% {word} since \d+ s ago: [\d.]+ [um]s to [\d.]+ [um]s a quantum "
            r"\(p [01]\.\d{3}\)",
            line,
        )


def test_a_watch_that_a_signal_ends_sums_up(monkeypatch, capsys):
    """Defends: days of medians without a last line, as without --duration nothing but a signal ends it."""

    def until_a_signal(*_: object) -> Iterator[float]:
        yield from np.random.default_rng(1).normal(1e-3, 1e-6, 30)
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(online_cli, "medians_of", until_a_signal)
    with pytest.raises(Stopped):
        online_cli.watch(quantum=1e-3, every=1.0)
    assert capsys.readouterr().out.splitlines()[-1] == "30 medians of 1 s, 0 changes of level"


def test_the_loop_itself_is_watched():
    """Defends: arguments that the loop does not take."""
    result = invoke("watch", "--every", "4ms", "--quantum", "100us", "--duration", "120ms", "--shift", "9")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].endswith("medians of 4 ms, 0 changes of level")


@pytest.mark.parametrize(
    "options, text",
    [
        (["--every", "10us"], "--every must hold a quantum, 0.001 s, found 1e-05 s"),
        (["--duration", "10s"], "--duration must be 25 times --every or more, found 10 s"),
        (["--kernel", "a2a"], "--kernel must be one of spin, copy, gemm, grouped, found 'a2a'"),
        (["--pin", "99999"], "--pin must be of the CPUs that this process may use"),
        (["--quantum", "1ns"], "--quantum must be at least 1e-07"),
    ],
)
def test_what_cannot_be_watched_is_refused(options, text):
    error = invoke("watch", *options).exception
    assert isinstance(error, WrongInput), error
    assert str(error).startswith(text)


def test_a_change_is_known_by_25_samples():
    """Defends: the least --duration, should the detector want more or fewer samples."""
    assert online.BURN_IN + online.LEAST_RUN == 25
