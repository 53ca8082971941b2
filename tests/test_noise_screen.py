"""The first screen: whose causes it names, and what it leaves out."""

import json
import re
from dataclasses import replace
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
from noise_samples import everything, spun
from sigma_noise import screen
from sigma_noise.analysis import Analysis, Options, analyze
from sigma_noise.as_json import as_json
from sigma_noise.changes import Sides
from sigma_noise.page import rendered
from sigma_noise.trace import Key, Series, Trace
from test_noise_analysis import invoke, measured, write
from test_noise_intervals import ar1

MS, N = 1_000_000, 4000


def quanta(rank: int, *, slow: float = 1.0, hit: np.ndarray | None = None) -> Series:
    """1 ms with 1 % of noise, 5 ms more where `hit`."""
    took = MS * slow * (1 + 0.01 * np.random.default_rng(rank).exponential(size=N))
    if hit is not None:
        took[hit] += 5 * MS
    ends = np.cumsum(np.rint(took).astype(np.int64))
    return Series(np.append(0, ends[:-1]), ends, np.ones(N))


def waits(series: Series, hit: np.ndarray) -> Series:
    """What the kernel counts of a thread that waited for a CPU in the quanta `hit`, read every 100."""
    at = np.append(series.start_ns[::100], series.end_ns[-1])
    waited = 5.0 * MS * np.bincount(hit // 100, minlength=N // 100)
    return Series(at, at, np.concatenate([[0.0], np.cumsum(waited)]))


def two_kinds(slow: float = 1.0, *, is_recorded: bool = True) -> Trace:
    """Rank 3 is `slow` or, at 1, collects garbage in 1 % of its quanta; rank 0 waits for a CPU in the first quarter
    alone and is the noisiest, and as that does not recur it does not stand out.
    """
    early, rare = np.arange(5, N // 4, 10), np.arange(7, N, 100)
    ranks = {0: quanta(0, hit=early)} | {rank: quanta(rank) for rank in range(1, 8)}
    ranks[3] = quanta(3, hit=rare) if slow == 1 else quanta(3, slow=slow)
    trace = measured(ranks)
    if is_recorded:
        more: dict[Key, Series] = {}
        for rank, series in ranks.items():
            more[rank, "counter", "run_delay_ns"] = waits(series, early if rank == 0 else early[:0])
        if slow == 1:
            ends = ranks[3].end_ns[rare]
            more[3, "event", "gc"] = Series(ends - 5 * MS, ends, np.zeros(len(rare)))
        trace = replace(trace, rows={**trace.rows, **more})
    return trace


def causes(found: Analysis) -> list[str]:
    return [line.removeprefix("causes").strip() for line in screen.lines(found) if line.startswith("causes")]


def test_the_rank_that_stands_out_has_its_own_cause():
    """Defends: the cause of the noisiest rank below a verdict that names another."""
    found = analyze(two_kinds())
    assert (found.scores.flagged, found.worst.rank) == ([3], 0)
    first, second = causes(found)
    assert first.startswith("rank 3: cause: gc")
    assert second.startswith("rank 0: cause: run-queue wait")
    table = rendered(found, {}).split("<h2>Ranks</h2>")[1].split("</table>")[0]
    assert all(
        cell in table for cell in ("<td>gc</tr>", "<td>run-queue wait</tr>", "<td>no single cause</tr>")
    )


@pytest.mark.parametrize("reference, than", [("median", "the median rank's"), ("min", "the fastest rank's")])
def test_a_slow_rank_is_said_to_be_slow(reference, than):
    """Defends: lost time given as the reason of a rank that loses none."""
    found = analyze(two_kinds(1.05), Options(reference=reference))
    assert found.scores.flagged == [3]
    first = causes(found)[0]
    assert first.startswith("rank 3: all its steps are slow, the usual one ")
    assert f"longer than {than}, of unknown cause" in first
    assert causes(analyze(two_kinds(1.05, is_recorded=False)))[1].startswith("not recorded;")


def test_a_rank_of_which_nothing_was_recorded_is_unknown():
    trace = two_kinds()
    rows = {key: s for key, s in trace.rows.items() if key[0] != 3 or key[1] == "quantum"}
    assert causes(analyze(replace(trace, rows=rows)))[0] == "rank 3: unknown: nothing was recorded of it"


def test_fixed_time_is_not_said_to_be_unwatched():
    """Defends: the advice to read counters to one who did."""
    assert causes(analyze(everything(2), Options(kernel="spin_ftq"))) == [
        "rank 1: fixed time is not attributed"
    ]
    trace = everything(2)
    bare = replace(trace, rows={key: s for key, s in trace.rows.items() if key[1] != "counter"})
    assert causes(analyze(bare, Options(kernel="spin_ftq"))) == ["rank 1: fixed time is not attributed"]
    assert causes(analyze(bare, Options(kernel="spin")))[0].startswith("not recorded;")


def test_the_page_tells_why_a_rank_has_no_cause():
    trace = two_kinds()
    rows = {key: s for key, s in trace.rows.items() if key[0] != 3 or key[1] == "quantum"}
    table = rendered(analyze(replace(trace, rows=rows)), {}).split("<h2>Ranks</h2>")[1].split("</table>")[0]
    assert table.count("<td>nothing was recorded of it</tr>") == 1


def test_collectives_are_explained_by_what_ranks_are_scored_by():
    """Defends: causes of the first kernel beside scores of the local time before collectives."""
    found = analyze(everything(2))
    assert found.windows.kernel == "a2a_local"
    assert found.scored(1).kernel == "a2a_local"
    assert found.scored(1).causes is not None


def test_ranks_that_stand_out_are_named_and_counted():
    assert screen.standing_out([]) == "no rank stands out"
    assert screen.standing_out([4, 7]) == "ranks 4 and 7 stand out"
    assert screen.standing_out([4, 7, 1, 2]) == "ranks 4, 7 and 2 more stand out"


def test_the_verdict_has_the_doubt_of_its_figure():
    """Defends: S of the largest N as if it were measured, on the line that most people read, and on the page."""
    trace = two_kinds(is_recorded=False)
    found = analyze(trace, Options(ranks=(8, 2048), window_s=1e-3))
    p = found.projections[0]
    flags, error = p.flags[1], p.backtest_error
    assert "extrapolated" in flags
    figure = (
        f"2,048 ranks would take {p.slowdown[1]:.2f} [{p.low[1]:.2f}, {p.high[1]:.2f}] times as long as one"
    )
    assert screen.lines(found)[0].endswith(f"; {figure} ({', '.join(flags)}; back-test {error:+.1%})")
    rows = rendered(found, {}).split("<h2>Many ranks</h2>")[1].split("</table>")[0].split("<tr>")[1:]
    assert [row.count("<th>") + row.count("<td") for row in rows] == [7] * len(rows)
    assert "<th>back-test<th>" in rows[0]
    assert f"<td>{error:+.1%}\n" in rows[1]
    alone = analyze(measured({0: trace.get(0, "quantum", "spin")}), Options(ranks=(8,)))
    assert alone.projections[0].backtest_error is None
    assert "back-test" not in screen.lines(alone)[0]


def test_warnings_that_have_no_room_are_counted():
    """Defends: a screen that is cut where nobody sees it."""
    found = analyze(everything(2))
    for n in (0, 1, 4, 5, 30):
        lines = screen.lines(replace(found, warnings=tuple(f"w{i}" for i in range(n))))
        assert len(lines) <= screen.MOST_LINES
        told = [line for line in lines if line.startswith("warning")]
        assert len(told) == min(n, 5), n
        if n > 4:
            assert told[-1] == f"warning     and {n - 4} more, in --report and --json"


def test_location_may_be_relative_to_the_fastest(tmp_path):
    """Defends: an option that changes nothing; NVRx's score is 1 of the fastest rank and less of all others."""
    found = analyze(two_kinds(1.05), Options(reference="min")).scores.ranks
    assert max(r.location for r in found) == 1.0
    assert sum(r.location == 1.0 for r in found) == 1
    write(two_kinds(1.05), tmp_path / "run")
    assert invoke("analyze", tmp_path / "run", "--reference", "min").exit_code == 0
    error = invoke("analyze", tmp_path / "run", "--reference", "mean").exception
    assert "--reference must be one of median, min, found 'mean'" in str(error)


def test_a_change_of_level_is_shown_with_the_clock():
    """Defends: a level that changed with the clock, of which the screen does not say so."""
    series = spun(np.random.default_rng(3), N)  # slower from the middle on
    at = series.start_ns[::50]
    khz = np.where(at < series.start_ns[N // 2], 3.0e6, 2.7e6)
    later = series.end_ns[-1] + 50 * MS * np.arange(N)  # of another kernel, by another clock
    at, khz = np.append(at, later), np.append(khz, np.full(N, 1.2e6))
    trace = measured({0: series})
    (line,) = [text for text in screen.lines(analyze(trace)) if text.startswith("level")]
    assert line.startswith("level       changed 1 time; most at")
    assert line.endswith("; clocks were not recorded")
    trace = replace(trace, rows={**trace.rows, (0, "counter", "cpu_khz"): Series(at, at, khz)})
    found = analyze(trace)
    (line,) = [text for text in screen.lines(found) if text.startswith("level")]
    assert line.endswith("; clock of cpu 3.00 to 2.70 GHz")
    (change,) = as_json(found)["series"][0]["changes"]
    assert change["clocks"] == {"cpu_khz": {"before": 3.0e6, "after": 2.7e6}}
    (of_cpu,) = found.worst.changes
    many = {f"gpu{i}_sm_mhz": Sides(1980.0, 1980.0 - 100 * (i == 3)) for i in range(8)}
    told = screen.clocks_of(replace(of_cpu, clocks=many | {"cpu_khz": Sides(3e6, float("nan"))}))
    assert told == "clock of gpu3 sm 1.98 to 1.88 GHz, which changed most of 8"
    asleep = {"gpu1_sm_mhz": Sides(0.0, 0.0), "gpu0_sm_mhz": Sides(0.0, 1980.0), "cpu_khz": Sides(3e6, 2e6)}
    assert "clock of gpu0 sm 0.00 to 1.98 GHz" in screen.clocks_of(replace(of_cpu, clocks=asleep))
    unread = {"cpu_khz": Sides(3e6, float("nan"))}
    assert screen.clocks_of(replace(of_cpu, clocks=unread)) == "clocks were not read on both sides"


def test_a_change_of_level_in_fixed_time_is_shown_with_the_clock():
    """Defends: fixed time of which a change of level shapes the floor and is told nowhere; fewer chunks as faster."""
    at = MS * np.arange(N)
    count = 1000.0 - np.random.default_rng(5).poisson(5, N)
    count[N // 2 :] = np.rint(count[N // 2 :] * 0.9)
    about = {0: {"host": "a", "measured": {"spin_ftq": {"mode": "ftq"}}}}
    khz = np.where(np.arange(0, N, 50) < N // 2, 3.0e6, 2.7e6)
    gauge = Series(at[::50], at[::50], khz)
    rows = {(0, "quantum", "spin_ftq"): Series(at, at + MS, count), (0, "counter", "cpu_khz"): gauge}
    found = analyze(Trace({"kernels": ["spin"]}, about, rows))
    (change,) = found.worst.changes
    assert found.worst.bounds.tolist() == [0, change.index, N]
    assert abs(change.index - N // 2) <= 8
    assert (change.before, change.after) == (pytest.approx(995, abs=1), pytest.approx(895.5, abs=1))
    assert change.shift.estimate == pytest.approx(-0.1, abs=1e-3)
    (line,) = [text for text in screen.lines(found) if text.startswith("level")]
    assert line.startswith("level       changed 1 time; most at 2.0 s, by -10.0% [-9.99 %, -9.9")
    assert line.endswith("] of the work in a quantum; clock of cpu 3.00 to 2.70 GHz")
    told = as_json(found)
    schema = json.loads((files("sigma_noise") / "analysis.schema.json").read_text())
    jsonschema.validate(json.loads(json.dumps(told, allow_nan=False)), schema)
    assert told["series"][0]["changes"][0]["before"] == change.before
    table = rendered(found, {}).split("<h2>Changes of level</h2>")[1].split("</table>")[0]
    assert re.search(r"<td>spin_ftq<td>0<td>2\.0 s\s+<td>99[45][.\d]* chunks<td>89[56][.\d]* chunks", table)
    assert "<td>clock of cpu 3.00 to 2.70 GHz</tr>" in table
    fixed_work = rendered(analyze(measured({0: spun(np.random.default_rng(3), N)})), {})
    assert re.search(r"<td>spin<td>0<td>2\.3 s\s+<td>1\.01 ms<td>1\.11 ms\s*<td>\+10\.0%", fixed_work)


def test_few_independent_quanta_are_told():
    """Defends: acceptance 6.  An interval of 2,000 quanta that are worth 105, without a word about it."""
    took = np.rint(MS * np.exp(0.01 * ar1(np.random.default_rng(4), 0.9, 2000)[0])).astype(np.int64)
    ends = np.cumsum(took)
    found = analyze(measured({0: Series(ends - took, ends, np.ones(2000))}))
    n_eff = found.worst.median.n_eff
    assert 60 < n_eff < 200
    first = "\n".join(screen.lines(found))
    assert f"n 2,000, worth {n_eff:.0f} independent ones" in first
    note = f"2000 quanta are worth {n_eff:.0f} independent ones, so intervals may be short; measure longer"
    assert note in first
    assert note in rendered(found, {})
