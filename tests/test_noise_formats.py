"""What `sigma noise` writes for other tools is what they read, and comes back as it was."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noise_samples import same, traces
from prometheus_client.parser import text_string_to_metric_families
from sigma_noise.analysis import Options, analyze
from sigma_noise.formats import FORMATS, chrome, hdr, netgauge, perfetto, prometheus, rank_detours
from sigma_noise.trace import Series, Trace
from sigma_train.errors import Failure, WrongInput

quick = settings(max_examples=60, deadline=None)


def quanta(took_ns: list[int], begin_ns: int = 0, value: float = 1.0) -> Series:
    """Back to back."""
    ends = begin_ns + np.cumsum(np.array(took_ns, np.int64))
    return Series(ends - np.array(took_ns, np.int64), ends, np.full(len(took_ns), value))


def one_rank(rank: int = 0, **rows: Series) -> Trace:
    return Trace(
        {}, {rank: {"host": "a"}}, {(rank, "quantum", name): series for name, series in rows.items()}
    )


@quick
@given(trace=traces(), is_packed=st.booleans())
def test_chrome_json_comes_back_as_it_was(tmp_path_factory, trace, is_packed):
    """Defends: stamps through f64, order of rows that begin together, names with quotes, kinds under one name."""
    path = tmp_path_factory.mktemp("c") / ("t.json.gz" if is_packed else "t.json")
    perfetto.write(trace, path)
    back = chrome.read(path)
    assert (back.run, back.ranks) == (trace.run, trace.ranks)
    assert back.rows.keys() == trace.rows.keys()
    for key, series in trace.rows.items():
        assert same(back.rows[key], series), key


def test_chrome_json_is_what_viewers_want(tmp_path):
    """Defends: slices that overlap on one track, tracks or processes without a name, NaN in JSON."""
    overlapping = Series(np.array([0, 5, 7, 20]), np.array([10, 15, 8, 30]), np.array([1.0, 1, np.inf, 1]))
    trace = Trace(
        {"x": float("nan")},
        {4: {"host": "n1"}},
        {(4, "quantum", "k"): overlapping, (4, "event", "gc"): overlapping},
    )
    counter = Series(np.array([1500, 2**60 + 1]), np.array([1500, 2**60 + 1]), np.array([1.0, np.nan]))
    perfetto.write(
        Trace(trace.run, trace.ranks, {**trace.rows, (4, "counter", "c"): counter}), tmp_path / "t.json"
    )
    told = json.loads((tmp_path / "t.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in told["traceEvents"]:
        if event["ph"] == "X":
            slices.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"])
            )
    for track in slices.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(track))
    named = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in told["traceEvents"] if e["name"] == "thread_name"
    }
    assert named.keys() == slices.keys()
    assert sorted(named.values()) == ["event: gc"] * 3 + ["k"] * 3
    processes = [e["args"]["name"] for e in told["traceEvents"] if e["name"] == "process_name"]
    assert processes == ["rank 4 on n1"]
    counters = [(e["ts"], e["args"]) for e in told["traceEvents"] if e["ph"] == "C"]
    assert counters == [(1.5, {"value": 1.0}), (1152921504606846.977, {})]
    text = (tmp_path / "t.json").read_text()
    assert '"ts":1152921504606846.977,' in text  # whose f64 is 125 ns off


def test_the_same_trace_is_the_same_bytes(tmp_path):
    """Defends: a time or a name within the gzip stream."""
    for name in ("a.json.gz", "b.json.gz"):
        perfetto.write(one_rank(k=quanta([3, 4])), tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes()))["baseTimeNanoseconds"] == 0


@quick
@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=25))
def test_lanes_are_as_few_as_overlap(pairs):
    """Defends: two rows of a lane that overlap; a lane that need not be, as where one ends as the next begins."""
    start, took = np.array(sorted(pairs)).T
    rows = Series(start, start + took, np.ones(len(start)))
    lane = perfetto.lanes(rows)
    for each in np.unique(lane):
        own = lane == each
        assert np.all(rows.start_ns[own][1:] >= rows.end_ns[own][:-1])
    depth = max(np.sum((rows.start_ns <= s) & (rows.end_ns > s)) for s in rows.start_ns)
    assert lane.max() + 1 == depth


def as_loggopsim_reads(text: str) -> list[tuple[int, int]]:
    """Its reader, as Noise.hpp has it: lines of at most 1,023 characters, and a row more after a last newline."""
    rows, pieces = [], text.split("\n")
    assert all(len(piece) < 1024 for piece in pieces), "it would read for ever"
    last = (0, 0)
    for piece in pieces:
        if piece.startswith("#"):
            continue
        cells = piece.split("\t")
        if len(cells) == 2:
            last = round(float(cells[0])), round(float(cells[1]))
        rows.append(last)
    return rows


@quick
@given(
    begin=st.integers(-(2**60), 2**60),
    gaps=st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 2**40)), max_size=20),
    rest=st.integers(0, 2**40),
    rank=st.integers(0, 3),
)
def test_detours_come_back_as_they_were(tmp_path_factory, begin, gaps, rest, rank):
    """Defends: a start that counts from the first detour instead of the window, a window that ends with the last."""
    path = tmp_path_factory.mktemp("n") / "t.tsv"
    at, starts, ends = begin, [], []
    for gap, took in gaps:
        starts.append(at + gap)
        at += gap + took
        ends.append(at)
    events = Series(
        np.array(starts, np.int64),
        np.array(ends, np.int64),
        (np.array(ends, np.int64) - np.array(starts, np.int64)) / 1e9,
    )
    window = [begin, at + rest + (not gaps)]
    trace = Trace(
        {},
        {rank: {"host": "n1", "measured": {"detour": rank_detours.facts(window, events, 5e-6)}}},
        {(rank, "event", "detour"): events},
    )
    netgauge.write(trace, path)
    back = netgauge.read(path)
    assert list(back.ranks) == [rank]
    told = back.ranks[rank]
    assert told["host"] == "n1"
    assert told["measured"]["detour"] == rank_detours.facts((0, window[1] - window[0]), events, 5e-6)
    got = back.get(rank, "event", "detour")
    assert np.array_equal(got.start_ns, events.start_ns - begin)
    assert np.array_equal(got.end_ns, events.end_ns - begin)
    assert np.array_equal(got.value, events.value)
    rows = as_loggopsim_reads(path.read_text())
    assert rows[:-1] == [(s - begin, e - s) for s, e in zip(starts, ends, strict=True)]
    assert rows[-1] == (window[1] - begin, 0)


def test_detours_of_quanta_are_what_they_took_over_their_floor(tmp_path):
    """Defends: a detour that lacks its floor, one at the threshold, starts from the wrong end of a quantum."""
    took = [10_000] * 100
    took[7], took[30], took[99] = 15_000, 11_999, 110_000
    trace = one_rank(spin=quanta(took, begin_ns=500), gemm=quanta([7] * 3))
    netgauge.write(trace, tmp_path / "t.tsv", name="spin", threshold_s=2e-6)
    back = netgauge.read(tmp_path / "t.tsv")
    got = back.get(0, "event", "detour")
    assert got.start_ns.tolist() == [70_000, 99 * 10_000 + 6_999]
    assert (got.end_ns - got.start_ns).tolist() == [5_000, 100_000]
    assert back.ranks[0]["measured"]["detour"]["window_ns"] == [0, sum(took)]
    assert rank_detours.of(trace, 0, "spin").threshold_s == 2e-6  # the least, as 6 deviations are 0 here
    jittery = one_rank(spin=quanta([10_000 + 1_000 * (i % 5) for i in range(100)] + [30_000]))
    found = rank_detours.of(jittery)
    assert found.threshold_s == pytest.approx(6 * 1.4826 * 1_000 * 1e-9)
    assert found.length_ns.tolist() == [20_000]


def test_detours_are_over_the_floor_of_their_time(tmp_path):
    """Defends: one floor for a whole run, over which every quantum is a detour once the clock has slowed down."""
    rng = np.random.default_rng(5)
    took = (1_000_000 * (1 + 0.001 * rng.random(4000))).astype(int)
    took[2000:] = took[2000:] * 1.2
    took[1000::1000] += 300_000
    trace = one_rank(spin=quanta(took.tolist()))
    (shown,) = analyze(trace).series
    assert shown.noise.share < 0.002
    for threshold_s in (None, 1e-4):
        (shown,) = analyze(trace, Options(tau_s=threshold_s)).series
        found = rank_detours.of(trace, threshold_s=threshold_s)
        assert found.start_ns.tolist() == trace.get(0, "quantum", "spin").start_ns[1000::1000].tolist()
        assert found.threshold_s == shown.noise.tau_s
        np.testing.assert_allclose(found.length_ns, shown.noise.detours.length_s * 1e9, atol=0.5)
        prometheus_figures = figures_of(trace, tmp_path, threshold_s)
        spin = ("kernel", "spin")
        assert prometheus_figures["sigma_noise_ratio", spin] == pytest.approx(shown.noise.share, rel=1e-12)
        assert prometheus_figures["sigma_noise_detour_seconds_count", spin] == 3
        assert prometheus_figures["sigma_noise_observed_rank_seconds_total", spin] == pytest.approx(
            took.sum() / 1e9
        )


def test_detours_of_fixed_time_are_of_its_counts(tmp_path):
    """Defends: quanta of fixed time that are left out, or whose equal lengths are taken for what they lost."""
    count = np.full(400, 1000.0)
    count[[50, 51, 300]] = 500.0, 900.0, 0.0
    starts = 1_000_000 * np.arange(400)
    trace = one_rank(spin_ftq=Series(starts, starts + 1_000_000, count))
    found = rank_detours.of(trace)
    assert found.start_ns.tolist() == [50_000_000, 300_000_000]
    assert found.length_ns.tolist() == [600_000, 1_000_000]
    figures = figures_of(trace, tmp_path)
    spin = ("kernel", "spin_ftq")
    assert figures["sigma_noise_ratio", spin] == pytest.approx(1.6 / 400)
    assert figures["sigma_noise_detour_seconds_sum", spin] == pytest.approx(1.6e-3)
    hdr.write(trace, tmp_path / "t.hlog")
    lines = [line for line in (tmp_path / "t.hlog").read_text().splitlines() if line.startswith("Tag=")]
    assert [line.split(",")[:4] for line in lines] == [
        ["Tag=rank0.spin_ftq", "0.000000", "1.000000", "1.000"]
    ]


def test_detours_of_a_loop_are_shorter_than_its_gaps(tmp_path):
    """Defends: gaps for lengths; a window of what else the rank measured; one that ends at the last detour."""
    gaps = Series(np.array([5_000, 90_000]), np.array([5_120, 95_000]), np.array([100e-9, 4_980e-9]))
    about = {"mode": "detours", "threshold_s": 1e-7, "observed_s": 0.002, "least_gap_s": 2e-8}
    told = {"measured": {"detour": about}}
    rows = {(0, "event", "detour"): gaps, (0, "quantum", "spin"): quanta([10_000] * 900, begin_ns=10**9)}
    trace = Trace({}, {0: told}, rows)
    netgauge.write(trace, tmp_path / "t.tsv")
    assert as_loggopsim_reads((tmp_path / "t.tsv").read_text()) == [(0, 100), (85_000, 4_980), (2_000_000, 0)]
    netgauge.write(trace, tmp_path / "t.tsv", threshold_s=1e-6)
    assert as_loggopsim_reads((tmp_path / "t.tsv").read_text()) == [(85_000, 4_980), (2_000_000, 0)]
    back = netgauge.read(tmp_path / "t.tsv")
    assert back.get(0, "event", "detour").end_ns.tolist() == [90_000]  # of the gap, with the least gap again
    figures = prometheus.figures(analyze(trace))
    assert list(figures) == ["spin", "detour"]
    assert figures["detour"].noise_ratio == {0: pytest.approx(5_080e-9 / 0.002)}
    assert figures["detour"].threshold_s == 1e-7
    assert figures["detour"].detours_s.tolist() == pytest.approx([100e-9, 4_980e-9])
    about["observed_s"] = 1e-6
    with pytest.raises(WrongInput, match=r"detour of rank 0: .* window_s hold all gaps \(5.12e-06 s\)"):
        netgauge.write(trace, tmp_path / "t.tsv")


def test_which_detours_is_asked_where_it_is_not_plain(tmp_path):
    """Defends: a rank or kernel that is chosen silently."""
    two = Trace(
        {}, {0: {}, 1: {}}, {(0, "quantum", "a"): quanta([1, 2]), (1, "quantum", "a"): quanta([1, 2])}
    )
    for trace, options, message in [
        (two, {}, "--rank wants one of 0, 1, found None"),
        (two, {"rank": 7}, "--rank wants one of 0, 1, found 7"),
        (one_rank(a=quanta([1]), b=quanta([1])), {}, "--name wants one of a, b, found None"),
        (one_rank(a=quanta([1])), {"name": "c"}, "--name wants one of a, found c"),
        (one_rank(a_ftq=quanta([1], value=0.0)), {}, "a_ftq of rank 0: count must be positive"),
        (Trace({}, {}, {}), {}, "--rank wants one of none: nothing was measured"),
    ]:
        with pytest.raises(WrongInput, match=message):
            netgauge.write(trace, tmp_path / "t.tsv", **options)
    assert not (tmp_path / "t.tsv").exists()


FIGURES = {
    "gemm": prometheus.Figures(
        observed_s={0: 10.0, 1: 30.0},
        noise_ratio={0: 0.08, 1: 0.04},
        straggler_what_if_ratio={0: 0.01, 1: 0.25},
        projected_slowdown_ratio={8: 1.001, 2048: 1.087},
        detours_s=np.array([0.5e-6, 2e-6, 3e-6, 0.004, 20.0]),
        threshold_s=1e-6,
    ),
    "spin": prometheus.Figures(observed_s={0: 1.5}),
}


def figures_of(trace, folder, threshold_s=None) -> dict[tuple, float]:
    FORMATS["prometheus"].write(trace, folder / "n.prom", threshold_s)
    return samples(folder / "n.prom")


def samples(path) -> dict[tuple, float]:
    families = list(text_string_to_metric_families(path.read_text()))
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


@pytest.mark.parametrize("per_rank", [False, True])
def test_prometheus_figures(tmp_path, per_rank):
    """Defends: per cent for ratios, a mean of ranks that forgets how long each was watched, labels without bound."""
    prometheus.write(FIGURES, tmp_path / "n.prom", per_rank)
    got = samples(tmp_path / "n.prom")
    gemm = ("kernel", "gemm")
    if per_rank:
        assert got["sigma_noise_ratio", gemm, ("rank", "1")] == 0.04
        assert got["sigma_noise_straggler_what_if_ratio", gemm, ("rank", "0")] == 0.01
        assert got["sigma_noise_observed_rank_seconds_total", gemm, ("rank", "1")] == 30
    else:
        assert got["sigma_noise_ratio", gemm] == pytest.approx((0.8 + 1.2) / 40)
        assert got["sigma_noise_straggler_what_if_ratio", gemm] == 0.25
        assert got["sigma_noise_observed_rank_seconds_total", gemm] == 40
        assert not any(label[0] == "rank" for key in got for label in key[1:])
    assert got["sigma_noise_projected_slowdown_ratio", gemm, ("ranks", "2048")] == 1.087
    assert got["sigma_noise_detour_threshold_seconds", gemm] == 1e-6
    bucket = {key[2][1]: n for key, n in got.items() if key[0] == "sigma_noise_detour_seconds_bucket"}
    assert [bucket[edge] for edge in ("1e-06", "2e-06", "5e-06", "10", "+Inf")] == [1, 2, 3, 4, 5]
    assert list(bucket.values()) == sorted(bucket.values())
    assert got["sigma_noise_detour_seconds_count", gemm] == 5
    assert got["sigma_noise_detour_seconds_sum", gemm] == pytest.approx(20.0040055)
    assert not any(key[0] == "sigma_noise_ratio" and ("kernel", "spin") in key for key in got)


def test_prometheus_lint(tmp_path):
    """Defends: what `promtool check metrics` refuses: help, units, reserved endings, names and types of each."""
    prometheus.write(FIGURES, tmp_path / "n.prom")
    families = {
        family.name: family for family in text_string_to_metric_families((tmp_path / "n.prom").read_text())
    }
    assert len(families) == 6
    for name, family in families.items():
        assert family.documentation.endswith("."), name
        assert name.startswith("sigma_noise_"), name
        assert name == name.lower(), name
        assert name.rpartition("_")[2] in ("seconds", "ratio"), name
        assert not any(
            word in name.split("_") for word in ("gauge", "counter", "histogram", "ms", "us", "ns")
        ), name
        is_counter = any(sample.name.endswith("_total") for sample in family.samples)
        assert is_counter == (family.type == "counter"), name
    assert families["sigma_noise_detour_seconds"].type == "histogram"


def test_prometheus_file_is_whole_at_any_moment(tmp_path, monkeypatch):
    """Defends: a file that a scrape sees half written, or that a failed write takes away."""
    path = tmp_path / "n.prom"
    prometheus.write(FIGURES, path)
    before = path.read_text()
    monkeypatch.setattr("os.rename", lambda a, b: 1 / 0)
    monkeypatch.setattr("os.replace", lambda a, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prometheus.write({"spin": FIGURES["spin"]}, path)
    assert path.read_text() == before
    with pytest.raises(OSError, match="cannot write"):
        prometheus.write(FIGURES, tmp_path / "no" / "n.prom")


def test_figures_of_quanta(tmp_path):
    """Defends: noise against the mean instead of the floor; figures of quanta too few for any."""
    took = [1000] * 99 + [101_000]
    trace = one_rank(spin=quanta(took), few=quanta([1000] * 9))
    figures = prometheus.figures(analyze(trace))
    assert list(figures) == ["spin"]
    assert figures["spin"].observed_s == {0: pytest.approx(200e-6)}
    assert figures["spin"].noise_ratio == {0: pytest.approx(0.5)}
    assert figures["spin"].detours_s.tolist() == [pytest.approx(100e-6)]
    assert figures["spin"].threshold_s == pytest.approx(2e-6)


def test_hdr_log_is_read_by_its_library(tmp_path):
    """Defends: counts of an interval in another, values in another unit, tags that end early, times out of order."""
    log = pytest.importorskip("hdrh.log")
    from hdrh.histogram import HdrHistogram

    first = quanta([10_000_000] * 250, begin_ns=10**18)  # 2.5 s
    other = Series(np.array([10**18 + 10**9]), np.array([10**18 + 10**9 + 7200 * 10**9]), np.ones(1))
    trace = Trace(
        {},
        {0: {}, 1: {}},
        {(0, "quantum", "a b,c"): first, (1, "quantum", "x"): other, (1, "counter", "n"): other},
    )
    hdr.write(trace, tmp_path / "t.hlog")
    reader = log.HistogramLogReader(str(tmp_path / "t.hlog"), HdrHistogram(1, 2**43, 3))
    found = []
    while (each := reader.get_next_interval_histogram()) is not None:
        at = (each.get_start_time_stamp() / 1e3 - 10**9, each.get_end_time_stamp() / 1e3 - 10**9)
        found.append((each.get_tag(), *at, each.get_total_count(), each.get_max_value() / 1e9))
    reader.input_file.close()
    assert [row[:4] for row in found] == [
        ("rank0.a_b_c", 0, 1, 100),
        ("rank0.a_b_c", 1, 2, 100),
        ("rank1.x", 1, 2, 1),
        ("rank0.a_b_c", 2, 3, 50),
    ]
    assert [row[4] for row in found] == pytest.approx([0.01, 0.01, 7200, 0.01], rel=1e-3)
    detour = Series(np.array([7]), np.array([207]), np.array([150e-9]))
    trace.rows[1, "event", "detour"] = trace.rows[1, "event", "gc"] = detour
    trace.ranks[1]["measured"] = {"detour": rank_detours.facts((0, 300), detour, least_gap_s=50e-9)}
    hdr.write(trace, tmp_path / "t.hlog", name="detour", interval_s=60)
    lines = [line for line in (tmp_path / "t.hlog").read_text().splitlines() if line.startswith("Tag=")]
    assert [line.rpartition(",")[0] for line in lines] == ["Tag=rank1.detour,0.000000,60.000000,0.000"]
    assert HdrHistogram.decode(lines[0].rpartition(",")[2]).get_max_value() == 150


def test_hdr_log_wants_its_library_and_something_to_write(tmp_path, monkeypatch):
    with pytest.raises(WrongInput, match="no quanta or detours called 'y'"):
        hdr.write(one_rank(x=quanta([1])), tmp_path / "t.hlog", name="y")
    with pytest.raises(WrongInput, match="--interval must be positive"):
        hdr.write(one_rank(x=quanta([1])), tmp_path / "t.hlog", interval_s=0.0)
    monkeypatch.setitem(__import__("sys").modules, "hdrh.histogram", None)
    with pytest.raises(Failure, match="pip install hdrhistogram"):
        hdr.write(one_rank(x=quanta([1])), tmp_path / "t.hlog")
