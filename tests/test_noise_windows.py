"""From series to windows between barriers: modes, kernels, collectives on clocks that differ, truth logs, budgets."""

import json
from dataclasses import replace

import numpy as np
import pytest
from noise_samples import bernoulli_slowdown, write
from sigma_cli.commands import app
from sigma_noise import screen
from sigma_noise.analysis import Options, analyze
from sigma_noise.as_json import as_json
from sigma_noise.many_ranks import over_budget, projections, replayed, without
from sigma_noise.trace import Series, Trace
from sigma_noise.units import time_of
from sigma_noise.windows import chosen, exchanges_of, is_fixed_time, windows_of
from typer.testing import CliRunner

MS = 1_000_000
BEGIN = 7_000 * MS


def series(took_ns, begin_ns: int = BEGIN, value: float = 1.0) -> Series:
    took = np.rint(np.asarray(took_ns, np.float64)).astype(np.int64)
    end = begin_ns + np.cumsum(took)
    return Series(end - took, end, np.full(len(took), value))


def noisy(seed: int, n: int, tail: float = 0.0):
    rng = np.random.default_rng(seed)
    took = MS * (1 + 0.01 * rng.exponential(size=n))
    took[rng.random(n) < tail] *= 10
    return took


def trace_of(rows: dict, about: dict | None = None, **run: object) -> Trace:
    ranks = sorted({rank for rank, _, _ in rows})
    return Trace(run, {r: {"host": f"node{r}"} | (about or {}).get(r, {}) for r in ranks}, rows)


def exchange(late: int, ahead_ns: dict[int, int], steps: int = 200) -> Trace:
    """Collectives of ranks 0, 3 and 7: 2 ms of work, 1 ms more on `late`, 0.1 ms of transfer; clocks ahead of 0's."""
    rng = np.random.default_rng(0)
    rows, about, at = {}, {}, np.full(3, BEGIN)
    stamps = np.zeros((3, steps, 3), np.int64)
    for t in range(steps):
        arrive = at + 2 * MS + rng.integers(0, MS // 50, 3) + np.array([(r == late) * MS for r in (0, 3, 7)])
        stamps[:, t] = np.stack([at, arrive, np.full(3, arrive.max() + MS // 10)], axis=1)
        at = stamps[:, t, 2]
    ones = np.ones(steps)
    for own, rank in zip(stamps, (0, 3, 7), strict=True):
        begin, arrive, end = (own + ahead_ns.get(rank, 0)).T
        rows[rank, "quantum", "a2a_local"] = Series(begin, arrive, ones)
        rows[rank, "quantum", "a2a"] = Series(arrive, end, ones)
        # As `offset.offset` has it: what is to be added to have the first rank's.
        to_add = [{"at_ns": 0, "offset_ns": -ahead_ns.get(rank, 0), "residual_ns": 1000}]
        about[rank] = {"clock": {"offsets": to_add}}
    return trace_of(rows, about, kernels=["a2a"])


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["noise", *map(str, arguments)])


@pytest.mark.parametrize("ahead_ms", [0, 5, -5, 10_000])
def test_the_last_to_arrive_is_known_on_clocks_that_differ(ahead_ms):
    """Defends: an offset that is taken off where it must be added, which names the wrong rank or none."""
    found, why = exchanges_of(exchange(3, {3: ahead_ms * MS, 7: -3 * ahead_ms * MS}))
    assert why == ""
    assert found.ranks == (0, 3, 7)
    assert found.parts.impossible == 0
    assert found.parts.times_last.tolist() == [0, 200, 0]
    assert found.parts.transfer_s.mean() == pytest.approx(1e-4, rel=0.05)


def test_ranks_keep_their_numbers():
    """Defends: rows of a table for the numbers of ranks."""
    found = analyze(exchange(7, {}))
    assert found.scores.flagged == [7]
    text = "\n".join(screen.lines(found))
    assert "rank 7 stands out" in text
    assert "rank 7 arrived last in 100% of 200" in text
    told = as_json(found)
    assert told["collectives"]["ranks"] == [0, 3, 7]
    assert told["collectives"]["times_last"] == [0, 0, 200]
    assert {r["rank"] for r in told["scores"]["ranks"]} == {0, 3, 7}


def test_collectives_that_cannot_be_are_a_warning(tmp_path):
    """Defends: an analysis that is refused as a whole, for clocks that nobody compared."""
    trace = exchange(3, {3: 50 * MS})
    trace = replace(trace, ranks={r: {"host": m["host"]} for r, m in trace.ranks.items()})
    found = analyze(trace)
    assert found.exchanges is None
    assert any("collectives were left out: no rank may end" in text for text in found.warnings)
    assert found.windows.what == "a2a_local"
    write(trace, tmp_path / "run")
    assert "--kernel names one" in str(invoke("project", tmp_path / "run").exception)
    assert invoke("project", tmp_path / "run", "--kernel", "a2a_local", "--ranks", "2").exit_code == 0


def test_the_kernel_of_a_gpu_is_found_by_its_name():
    """Defends: the first name of the alphabet, where spin was measured on each multiprocessor."""
    rows = {(0, "quantum", name): series(noisy(0, 100)) for name in ("copy", "spin_mp000", "spin_mp001")}
    trace = trace_of(rows, kernels=["spin", "copy"])
    assert chosen(trace, None) == "spin_mp000"
    assert chosen(trace, "spin") == "spin_mp000"
    assert chosen(trace, "spin_mp001") == "spin_mp001"
    with pytest.raises(ValueError, match="kernel must be one of copy, spin_mp000, spin_mp001, found 'gemm'"):
        chosen(trace, "gemm")


def test_fixed_time_is_what_the_file_says():
    """Defends: a mode that is read off a name; a quantum of the plan for a series that has its own."""
    count = Series(np.arange(200) * 2 * MS + BEGIN, np.arange(1, 201) * 2 * MS + BEGIN, np.full(200, 100.0))
    count.value[50] = 50.0
    trace = trace_of(
        {(0, "quantum", "netgauge"): count},
        {0: {"measured": {"netgauge": {"mode": "ftq", "quantum_s": 2e-3}}}},
        quantum_s=7.0,
    )
    assert is_fixed_time(trace, "netgauge")
    (found,) = analyze(trace).series
    assert found.is_fixed_time
    assert found.noise.observed_s == pytest.approx(0.4)
    assert found.noise.detours.length_s == pytest.approx([1e-3])


def test_windows_are_sums_of_quanta():
    took = np.tile([1.0, 1.0, 1.0, 3.0], 25) * MS
    trace = trace_of({(4, "quantum", "spin"): series(took)})
    found = windows_of(trace, "spin", None, 4e-3)
    assert found.rows[4] == pytest.approx(np.full(25, 6e-3))
    assert found.hosts == {4: "node4"}
    with pytest.raises(
        ValueError, match=r"window must be shorter than the 150 ms that were measured, found 1 s"
    ):
        windows_of(trace, "spin", None, 1.0)
    with pytest.raises(ValueError, match="window must be more than 0 s, found 0"):
        windows_of(trace, "spin", None, 0.0)


def test_the_longest_of_a_host_are_of_one_instant():
    rows = {(r, "quantum", "spin"): series(np.full(40, MS * (1 + r))) for r in range(4)}
    about = {r: {"host": "ab"[r // 2]} for r in range(4)}
    found = windows_of(trace_of(rows, about), "spin", None, 2e-3)
    assert np.unique(found.longest_s.round(6)).tolist() == [2e-3, 4e-3]
    assert found.host_names == ["a", "a", "b", "b"]
    del rows[3, "quantum", "spin"]
    assert windows_of(trace_of(rows, about), "spin", None, 2e-3).host_names == ["rank 0", "rank 1", "rank 2"]


def log_of(host: str, begin_ns: int, n: int = 10) -> Trace:
    start = begin_ns + np.arange(n) * 100 * MS
    rows = {(0, "event", "stops"): Series(start, start + 9 * MS, np.ones(n))}
    return Trace({}, {0: {"host": host}}, rows)


def test_a_truth_log_tells_of_its_host_alone(tmp_path):
    """Defends: stamps of one host's clock that explain what another lost."""
    took = np.full(1000, float(MS))
    took[::100] = 10 * MS  # what the log has: a stop of 9 ms at every 109 ms
    start = BEGIN + np.arange(10) * 109 * MS
    truth = Trace({}, {0: {"host": "a"}}, {(0, "event", "stops"): Series(start, start + 9 * MS, np.ones(10))})
    rows = {(r, "quantum", "spin"): series(took) for r in range(2)}
    trace = trace_of(rows, {0: {"host": "a"}, 1: {"host": "b"}})
    told = {s.rank: s.causes for s in analyze(trace, truth=truth).series}
    assert told[0].named == "stops"
    assert told[0].lost_s == pytest.approx(0.09)
    assert told[1] is None
    for log, words in (
        (log_of("c", BEGIN), "injections on a host that was measured, found none of c"),
        (log_of("a", BEGIN + 10**13), "while ranks were measured, found all before or after"),
        (Trace({}, {0: {"host": "a"}}, {}), "found none of a"),
        (trace, "truth must be a log of injections, found quanta of spin"),
    ):
        with pytest.raises(ValueError, match=words):
            analyze(trace, truth=log)
    write(trace, tmp_path / "run")
    log_of("c", BEGIN).write(tmp_path / "log.parquet")
    result = invoke("analyze", tmp_path / "run", "--truth", tmp_path / "log.parquet")
    assert "--truth must log injections on a host" in str(result.exception)


def test_models_project_the_same_windows():
    """Defends: a replay of the kernel's quanta beside models of the time before collectives."""
    trace = exchange(3, {})
    one = {
        "kernel": None, "ranks": (1, 3), "window_s": None, "per_step": 2, "is_cosched": False, "seed": 0,
        "models": ("ecdf", "replay"),
    }  # fmt: skip
    ecdf, replay = projections(trace, **one)
    assert replay.floor_s == pytest.approx(ecdf.floor_s, rel=0.05)
    assert replay.mean_s == pytest.approx(ecdf.mean_s, rel=0.2)
    spin = trace_of({(r, "quantum", "spin"): series(noisy(r, 2000, tail=0.01)) for r in range(2)})
    ecdf, replay = projections(spin, **one | {"window_s": 0.02})
    assert replay.mean_s == pytest.approx(ecdf.mean_s, rel=0.05)


def test_a_budget_without_a_figure_is_not_kept(tmp_path):
    """Defends: exit code 0 of a gate that could not look."""
    write(trace_of({(0, "quantum", "spin"): series(noisy(0, 60))}), tmp_path / "few")
    result = invoke("project", tmp_path / "few", "--window", "1ms", "--ranks", "16384,8", "--budget", "1.1")
    assert result.exit_code == 3, result.output
    assert "no model has a figure for 16,384 ranks" in result.output
    write(trace_of({(0, "quantum", "spin"): series(noisy(0, 4000))}), tmp_path / "run")
    result = invoke("project", tmp_path / "run", "--window", "1ms", "--ranks", "8", "--budget", "9")
    assert result.exit_code == 0, result.output
    found = projections(
        trace_of({(0, "quantum", "spin"): series(noisy(0, 4000))}), kernel=None, ranks=(8,), window_s=1e-3,
        per_step=1, models=("ecdf",), is_cosched=False, seed=0,
    )  # fmt: skip
    assert over_budget(found, 1.0001) is True


@pytest.mark.parametrize(
    ("given", "width", "per_step"),
    [((), 49, 1), (("--layers", 1), 16, 3), (("--barriers", 7), 7, 7), (("--layers", 24), 1, 49)],
)
def test_more_barriers_a_step_cost_more(tmp_path, given, width, per_step):
    """Defends: layers that cancel in S(N), and so in a budget, or change the work of a step.

    Quanta of 100 us, 1 in 1,000 longer by 1 ms, so that of windows of w quanta w in 1,000 are hit: by the closed form a
    step of 4.9 ms takes 64 ranks 1.18 times as long with one barrier and 1.60 times with 49.
    """
    took = np.full((4, 49_000), 0.1 * MS)
    for rank, row in enumerate(took):
        row[7 + rank :: 1000] += MS
    write(trace_of({(r, "quantum", "spin"): series(row) for r, row in enumerate(took)}), tmp_path / "run")
    asked = ("project", tmp_path / "run", "--window", "4.9ms", "--ranks", "64", "--model", "ecdf", *given)
    result = invoke(*asked, "--json", tmp_path / "p.json")
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads((tmp_path / "p.json").read_text())
    (found,) = told["projections"]
    whole = len(took[0]) // width * width
    hit = sum(min(w.max() > 0.5 * MS, 1) for row in took for w in row[:whole].reshape(-1, width))
    want = bernoulli_slowdown(0.1 * width, 1, hit / (4 * whole // width), 64)
    assert found["slowdown"][0] == pytest.approx(float(want), rel=1e-9)
    assert told["options"]["per_step"] == per_step
    assert found["floor_s"] == pytest.approx(1e-4 * width * per_step)
    assert invoke(*asked, "--budget", "1.25").exit_code == (per_step > 1)
    if per_step > 1:
        assert f"in {per_step} windows of {time_of(found['mean_s'] / per_step)}" in " ".join(
            result.output.split()
        )


def test_barriers_nearer_than_quanta_are_refused(tmp_path):
    """Defends: windows of a quantum in place of shorter ones that nobody measured."""
    write(trace_of({(0, "quantum", "spin"): series(noisy(0, 4000))}), tmp_path / "run")
    for given, found in (
        (("--layers", "24"), "found 10 ms, cut by 49 barriers"),
        (("--window", "400us"), "found 400 us"),
    ):
        error = str(invoke("project", tmp_path / "run", *given).exception)
        assert f"--window must hold half a quantum of 1.01 ms between barriers, {found}" in error
    error = str(invoke("project", tmp_path / "run", "--layers", "2", "--barriers", "4").exception)
    assert error == "--layers and --barriers both count the barriers of a step; leave one out"


@pytest.mark.parametrize(
    ("period_s", "window_s"),
    [(0.5, 9.0), pytest.param(15.0, 300.0, marks=pytest.mark.acceptance), (0.1, 300.0), (60.0, 7200.0)],
)
def test_periods_are_found_in_long_measurements(period_s, window_s):
    """Defends: a search that begins at 1 Hz, that asks for more points than it may, or ends below 60 Hz."""
    rng = np.random.default_rng(0)
    at = np.arange(period_s / 3, window_s * 0.99, period_s)
    at += rng.normal(0, period_s / 200, len(at))
    at = np.sort(np.concatenate([at, rng.uniform(0, window_s * 0.99, len(at) // 4)]))
    start = BEGIN + np.rint(at * 1e9).astype(np.int64)
    gaps = Series(start, start + MS // 5, np.ones(len(at)))
    about = {"detour": {"mode": "detours", "least_gap_s": 5e-8, "threshold_s": 1e-6, "observed_s": window_s}}
    trace = trace_of({(0, "event", "detour"): gaps}, {0: {"measured": about}})
    (found,) = analyze(trace).gaps
    assert found.noise.share == pytest.approx(len(at) * 2e-4 / window_s, rel=1e-3)
    assert found.periods[0].period_s == pytest.approx(period_s, rel=1e-3)


def test_detours_of_a_file_that_says_little():
    """Defends: a file of another tool, without the least gap, that ends in a KeyError."""
    start = BEGIN + np.arange(50) * 20 * MS
    gaps = Series(start, start + MS, np.ones(50))
    (found,) = analyze(trace_of({(0, "event", "detour"): gaps}, {0: {"measured": {"detour": {}}}})).gaps
    assert len(found.noise.detours) == 50
    assert found.noise.share == pytest.approx(50e-3 / 0.981, rel=1e-3)


def test_arms_of_different_plans_are_not_compared(tmp_path):
    """Defends: a verdict on other sizes, and a throttled accelerator that nobody mentions."""

    def runs(name: str, quantum_s: float, **about: object) -> None:
        for i in range(5):
            rows = {(0, "quantum", "spin"): series(noisy(i, 300)), **about.get("rows", {})}
            measured = {0: about.get("rank", {})}
            write(
                trace_of(rows, measured, kernels=["spin"], quantum_s=quantum_s), tmp_path / name / f"run{i}"
            )

    hot = {(0, "event", "gpu0 socket thermal"): series([MS]), (0, "event", "gpu0 idle"): series([MS])}
    runs("a", 1e-3)
    runs("b", 2e-3)
    runs("hot", 1e-3, rows=hot, rank={"accelerators": {"devices": ["gpu0"]}})
    assert "runs must measure what" in str(invoke("compare", tmp_path / "a", tmp_path / "b").exception)
    calibrated = invoke("compare", tmp_path / "a", tmp_path / "a", "--calibrate", tmp_path / "b")
    assert "runs must measure what" in str(calibrated.exception)
    result = invoke("compare", tmp_path / "a", tmp_path / "hot", "--json", tmp_path / "c.json")
    assert result.exit_code == 4, result.output
    (reason,) = [text for text in json.loads((tmp_path / "c.json").read_text())["reasons"] if "gpu0" in text]
    assert "gpu0 socket thermal of rank 0" in reason
    assert "idle" not in reason


def test_options_are_checked_and_told():
    with pytest.raises(ValueError, match="tau must be more than 0 s, found 0"):
        Options(tau_s=0.0)
    trace = trace_of({(0, "quantum", "spin"): series(noisy(0, 400))})
    told = as_json(analyze(trace, Options(tau_s=1e-3, ranks=(8,), seed=3)))
    assert told["options"] == {
        "kernel": None, "tau_s": 1e-3, "ranks": [8], "window_s": None, "alpha": 0.01, "seed": 3,
        "reference": "median",
    }  # fmt: skip


@pytest.mark.parametrize("told_by", ["event", "counter"])
def test_what_a_cause_costs_many_ranks(tmp_path, told_by):
    """Defends: a budget of other windows than those projected; a counter's seconds on quanta that lost nothing."""
    n, rows, plain = 4000, {}, {}
    for rank in range(2):
        took = noisy(rank, n)
        plain[rank, "quantum", "spin"] = series(took)
        hit = np.arange(7 + rank, n, 40)
        took[hit] += 5 * MS
        rows[rank, "quantum", "spin"] = quanta = series(took)
        if told_by == "event":
            ends = quanta.end_ns[hit]
            rows[rank, "event", "gc"] = Series(ends - 5 * MS, ends, np.zeros(len(hit)))
        else:
            at = np.append(quanta.start_ns[::100], quanta.end_ns[-1])
            waited = np.concatenate(
                [[0.0], np.cumsum(np.bincount(hit // 100, minlength=n // 100) * 5.0 * MS)]
            )
            rows[rank, "counter", "run_delay_ns"] = Series(at, at, waited)
    cause = {"event": "gc", "counter": "run-queue wait"}[told_by]
    write(trace_of(rows, kernels=["spin"]), tmp_path / "run")
    result = invoke(
        "project", tmp_path / "run", "--window", "4ms", "--ranks", "8", "--model", "ecdf", "--without", cause
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"without {cause}, ecdf" in result.output
    of = {"kernel": None, "ranks": (8,), "window_s": 4e-3, "per_step": 1, "models": ("ecdf",), "seed": 0}
    (gain,) = without(trace_of(rows, kernels=["spin"]), cause, **of)
    with_it, without_it = (
        projections(trace_of(each, kernels=["spin"]), is_cosched=False, **of)[0].step_s[0]
        for each in (rows, plain)
    )
    assert gain.seconds[0] == pytest.approx(with_it - without_it, rel=0.02)
    assert gain.low[0] < gain.seconds[0] < gain.high[0]
    with pytest.raises(
        ValueError, match=f"--without must be a cause that was seen, of {cause}, found 'steal'"
    ):
        without(trace_of(rows, kernels=["spin"]), "steal", **of)


def test_windows_between_collectives_are_what_they_are(tmp_path):
    """Defends: an option that changes nothing; an IndexError where a rank's local quanta are cut."""
    trace = exchange(3, {})
    write(trace, tmp_path / "run")
    assert "--window is of quanta" in str(invoke("project", tmp_path / "run", "--window", "1s").exception)
    of = {
        "kernel": None,
        "ranks": (1, 9),
        "window_s": None,
        "models": ("ecdf",),
        "is_cosched": False,
        "seed": 0,
    }
    (one,), (many,) = (projections(trace, per_step=barriers, **of) for barriers in (1, 49))
    assert many.slowdown == pytest.approx(one.slowdown, rel=1e-12)
    assert many.step_s == pytest.approx(49 * one.step_s, rel=1e-12)
    local = trace.get(3, "quantum", "a2a_local")
    cut = Series(local.start_ns[:50], local.end_ns[:50], local.value[:50])
    waits = {(r, "counter", "run_delay_ns"): Series(*[np.arange(BEGIN, BEGIN + 10**9, 10**8)] * 2, np.arange(10) * 1e8)
             for r in (0, 3, 7)}  # fmt: skip
    short = replace(trace, rows={**trace.rows, (3, "quantum", "a2a_local"): cut, **waits})
    with pytest.raises(ValueError, match="rank 3 has 50 quanta of a2a_local, fewer than its windows hold"):
        without(
            short,
            "run-queue wait",
            kernel=None,
            ranks=(8,),
            window_s=None,
            per_step=1,
            models=("ecdf",),
            seed=0,
        )


def test_a_replay_is_of_local_time():
    """Defends: time within collectives that counts as work without noise."""
    found = []
    for transfer_ns in (MS // 10, 8 * MS):
        rows = {}
        for rank in range(2):
            local = np.rint(2 * noisy(rank, 2000, tail=0.02)).astype(np.int64)
            end = BEGIN + np.cumsum(local + transfer_ns) - transfer_ns
            rows[rank, "quantum", "spin"] = Series(end - local, end, np.ones(2000))
        windows = windows_of(trace_of(rows), "spin", None, 2e-3)
        found.append(replayed(trace_of(rows), windows, 1, (8,), False, 0))
    assert found[0].slowdown[0] > 1.2
    assert found[1].slowdown[0] == pytest.approx(found[0].slowdown[0], rel=1e-6)
