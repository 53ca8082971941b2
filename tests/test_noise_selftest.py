"""The self-test: what it finds is set beside the injector's log by overlap in time."""

import numpy as np
import pytest
from sigma_cli.commands import app
from sigma_noise import selftest
from sigma_noise.selftest import Cell, injecting, judge, limits
from sigma_noise.trace import Series
from sigma_train.errors import Failure, WrongInput
from typer.testing import CliRunner

MS = 1_000_000


def test_a_failed_injector_is_told(tmp_path):
    """Defends: a self-test whose injector did nothing, and that says the machine sees nothing."""
    with pytest.raises(Failure, match=r"the injector failed: .*--pid is missing"):  # noqa: SIM117
        with injecting(tmp_path / "t", "--target", "proc", "--duration", "1s"):
            pytest.fail("nothing was injected")


@pytest.mark.parametrize(
    "lengths, rates, message",
    [
        ([0.01], [0.0], "--rate must be stops a second above 0, found 0"),
        ([0.01], [5.0, float("inf")], "--rate must be stops a second above 0, found inf"),
        ([0.0], [5.0], "--length 0 s at --rate 5: length_s must be seconds above 0"),
        (
            [0.01, 0.3],
            [2.0, 5.0],
            r"--length 0.3 s at --rate 5: length_s \+ 2 jitter_s must be below period_s",
        ),
    ],
)
def test_stops_that_cannot_be_are_refused_before_any(lengths, rates, message, monkeypatch):
    monkeypatch.setattr(selftest, "measure_cell", lambda *_, **__: pytest.fail("something was injected"))
    with pytest.raises(WrongInput, match=message):
        selftest.curve(lengths, rates)


def stamps(pairs) -> Series:
    start, end = np.array(pairs, np.int64).reshape(-1, 2).T * MS
    return Series(start.copy(), end.copy(), np.ones(len(start)))


def test_a_cell_is_judged_by_overlap():
    stops = stamps([(0, 20), (100, 120), (200, 220), (300, 320)])
    found = stamps([(0, 20), (50, 65), (101, 121), (200, 209), (240, 241), (301, 322)])
    cell = judge(stops, found, 0.02, 10.0)
    assert cell.recall == 0.75  # the third was seen for 9 of 20 ms
    assert cell.found == 4
    assert cell.precision == 0.75
    assert cell.mean_length_s == pytest.approx((20 + 20 + 21) / 3 * 1e-3)
    assert cell.recall_low < 0.75 < cell.recall_high
    later = stamps(
        [(0, 20), (100, 120), (200, 220), (301, 322), (330, 350)]
    )  # the injector's own work at its end
    assert (judge(stops, later, 0.02, 10.0).found, judge(stops, later, 0.02, 10.0).precision) == (4, 1.0)
    assert selftest.to_json([judge(stamps([]), stamps([]), 0.02, 10.0)])["cells"][0]["recall"] is None


def test_a_cell_tells_the_error_of_its_period():
    """Defends: a self-test that certifies what was found and not its rhythm."""
    at = 100 * np.arange(30)
    stops = stamps(list(zip(at, at + 20, strict=True)))
    late = stamps([(t + 2 * (i % 3 == 0), t + 20) for i, t in enumerate(at)])
    assert abs(judge(stops, late, 0.02, 10.0).period_error) < 2e-3
    every_other = stamps([(t, t + 20) for t in at[::2]])
    assert judge(stops, every_other, 0.02, 10.0).period_error == pytest.approx(1.0, abs=0.01)
    few = stamps([(t, t + 20) for t in at[:7]])
    assert np.isnan(judge(stops, few, 0.02, 10.0).period_error)
    assert np.isnan(judge(stamps([]), late, 0.02, 10.0).period_error)
    assert selftest.to_json([judge(stops, few, 0.02, 10.0)])["cells"][0]["period_error"] is None


@pytest.mark.parametrize("jitter_s", [0.0, 10e-6, 100e-6, 2e-3])
@pytest.mark.parametrize("rate_hz", [1.0, 2.0, 5.0, 10.0])
def test_the_period_of_a_train_is_its_fundamental(rate_hz, jitter_s):
    """Defends: the 29th harmonic of a train that is nearly exact, on which all multiples are alike."""
    for seed in range(2):
        late_s = jitter_s * np.random.default_rng(seed).standard_normal(20)
        begin = np.rint(1e9 * (np.arange(1, 21) / rate_hz + late_s)).astype(np.int64)
        stops = Series(begin, begin + 20 * MS, np.ones(20))
        cell = judge(stops, stops, 0.02, rate_hz)
        assert cell.recall == 1.0
        assert abs(cell.period_error) < max(1e-4, jitter_s * rate_hz)


def test_the_limit_is_where_all_longer_ones_are_good():
    """Defends: a limit taken from one lucky short cell."""

    def cell(length_s, recall, precision=1.0):
        return Cell(length_s, 5.0, 20, recall, 0.0, 1.0, 20, precision, length_s, 0.0)

    assert limits([cell(1e-3, 1.0), cell(5e-3, 0.9), cell(20e-3, 1.0)]) == {5.0: 20e-3}
    assert limits([cell(1e-3, 0.96), cell(5e-3, 0.97), cell(20e-3, 1.0)]) == {5.0: 1e-3}
    assert limits([cell(1e-3, 1.0), cell(20e-3, 1.0, precision=0.5)]) == {5.0: None}


def test_the_table_has_the_period(monkeypatch):
    cells = [
        Cell(0.02, 2.0, 6, 1.0, 0.6, 1.0, 6, 1.0, 0.02, float("nan")),
        Cell(0.02, 10.0, 30, 1.0, 0.9, 1.0, 30, 1.0, 0.02, -2e-5),
    ]
    monkeypatch.setattr(selftest, "curve", lambda *_, **__: cells)
    told = CliRunner().invoke(app, ["noise", "selftest"]).output.splitlines()
    assert told[0].endswith("period error")
    assert told[1].endswith("  -")
    assert told[2].endswith("-0.002%")
