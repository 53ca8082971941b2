"""Fixed time on a GPU that is a fake: what ended in a cell counts there, and cells without launches are no noise."""

import math

import numpy as np
import pytest
import torch
from noise_fake_gpu import FakeGpu
from sigma_noise import cuda, cuda_replays, cuda_spin, detours, loops
from sigma_noise.cuda_cells import cells_within, counted
from sigma_noise.cuda_clock import on_the_host
from sigma_noise.cuda_replays import Replays, in_cells
from sigma_noise.loops import Calibration
from sigma_noise.measure import coarse
from sigma_noise.offset import Offset
from sigma_noise.plan import Plan
from sigma_noise.run import rows
from sigma_noise.windows import chosen, is_fixed_time
from sigma_train.ranks import Ranks

MS = 1_000_000
TINY = {"copy": {"bytes": 64}, "gemm": {"R": 2, "N": 3, "K": 4}, "grouped": {"R": 6, "E": 2, "N": 3, "K": 4}}


def on_gpu(**settings) -> Plan:
    return Plan(**{"modes": ("ftq",), "backend": "cuda", "warm_up_s": 0} | settings)


def by_hand(ends, begin, last, quantum):
    """Begins and counts of the cells within begin..last, stamp by stamp."""
    cells = {c * quantum: 0 for c in range(math.ceil(begin / quantum), last // quantum)}
    for end in map(int, ends):
        if end // quantum * quantum in cells:
            cells[end // quantum * quantum] += 1
    return list(cells), list(cells.values())


def test_counts_are_those_of_each_stamp():
    """Defends: a stamp on a boundary in the cell before, cells that are not whole, counts of another block."""
    rng = np.random.default_rng(3)
    ends = np.cumsum(rng.integers(0, 40, (3, 500)), axis=1) + 17
    ends[0] = ends[0] // 100 * 100  # on boundaries
    first, last = cells_within(17, int(ends.max()), 100)
    counts, late = counted(torch.from_numpy(ends), first, last, 100)
    for of_block, count, after in zip(ends, counts, late, strict=True):
        starts, want = by_hand(of_block, 17, int(ends.max()), 100)
        assert starts == [100 * c for c in range(first, last)]
        assert count.tolist() == want
        for end, ns in zip(np.array(starts) + 100, after, strict=True):
            if end <= of_block[-1]:
                assert ns == of_block[of_block >= end][0] - end


def test_cells_of_an_idle_gpu_are_left_out():
    """Defends: a host that came too late taken for noise; the cell in which the late chunk ended kept."""
    edges = np.cumsum([1005, *[10] * 30, 25, *[10] * 30, 190, *[10] * 30])
    is_dry = np.zeros(92, bool)
    is_dry[[30, 61]] = True
    series, late_ns, left_out = in_cells(Replays(edges, is_dry, 0.0), 100, 1000)
    idle = [(edges[i], edges[i + 1]) for i in (30, 61)]
    starts, counts = by_hand(edges, edges[0], int(edges[-1]), 100)
    kept = [all(b < s or a >= s + 100 for a, b in idle) for s in starts]
    assert 0 < sum(kept) < len(kept) - 3
    assert series.start_ns.tolist() == [s for s, keep in zip(starts, kept, strict=True) if keep]
    assert series.value.tolist() == [n for n, keep in zip(counts, kept, strict=True) if keep]
    assert len(late_ns) == len(series) == len(starts) - left_out


def test_delays_in_the_queue_are_in_their_cells(monkeypatch):
    """Defends: counts of another cell, a delay over whole cells that parts the grid or shortens it."""
    late = set(range(700, 100_000, 400))
    fake = FakeGpu(lambda i: 8 * MS if i in late else 100_000)
    found, real = [], cuda_replays.replays
    monkeypatch.setattr(cuda_replays, "replays", lambda *args: (found.append(real(*args)), found[-1])[1])
    monkeypatch.setattr(cuda_replays, "BATCH", 16)
    plan = on_gpu(kernels=("copy",), quantum_s=2e-3, duration_s=0.3, sizes={"copy": TINY["copy"]})
    trace = cuda.measure(plan, Ranks(), fake.gpu())
    series, how = trace.get(0, "quantum", "copy_ftq"), trace.ranks[0]["measured"]["copy_ftq"]
    edges, is_dry = found[-1].edges_ns, found[-1].is_dry
    counts = dict(zip(*by_hand(edges, edges[0], int(edges[-1]), 2 * MS), strict=True))
    assert series.value.tolist() == [counts[start] for start in series.start_ns]
    assert len(series) + how["left_out"] == 150
    assert (series.start_ns % (2 * MS) == 0).all()
    assert (series.end_ns - series.start_ns == 2 * MS).all()
    assert how["skipped"] == np.count_nonzero(series.value == 0)
    assert how["longest_late_s"] >= 0
    number = fake.replayed - len(is_dry)  # of the first replay that is in the edges
    within = []
    for i in range(len(is_dry)):
        if number + i in late and not is_dry[i]:
            assert edges[i + 1] - edges[i] >= 8 * MS - 8
            within += by_hand([], edges[i] + 1, int(edges[i + 1]), 2 * MS)[0]
    empty = series.start_ns[series.value == 0]
    assert len(np.intersect1d(within, empty)) >= 6, "of each delay three cells have nothing"
    assert not set(within) & set(series.start_ns[series.value > 0].tolist())


def spin_plan(**settings) -> Plan:
    return on_gpu(kernels=("spin",), quantum_s=1e-3, duration_s=0.02, **settings)


def test_rounds_of_spin_are_counted_and_gaps_between_launches_are_no_noise(monkeypatch):
    """Defends: a cell in which a launch ended or began taken for a delay, a delay on another multiprocessor."""

    def delayed(number, block):
        return np.where((number % 3500 == 1700) & (block == 1), 700_000, 0)

    fake = FakeGpu(lambda i: 0, delayed)
    monkeypatch.setattr(cuda_spin, "STAMPS_BYTES", 5500 * 2 * cuda_spin.STAMP_BYTES)
    trace = cuda.measure(spin_plan(), Ranks(), fake.gpu())
    assert trace.names() == ["spin_mp005_ftq", "spin_mp006_ftq"] == sorted(trace.ranks[0]["measured"])
    launches = [stamps for stamps in fake.launches if stamps.shape[1] == 5500]
    assert len(launches) >= 5
    for block, name in enumerate(trace.names()):
        series, how = trace.get(0, "quantum", name), trace.ranks[0]["measured"][name]
        starts, counts = [], []
        for stamps in launches:
            of_launch = by_hand(stamps[block, :, 1], int(stamps[block, 0, 0]), int(stamps[block, -1, 1]), MS)
            starts += of_launch[0]
            counts += of_launch[1]
        starts, counts = np.array(starts)[:20], counts[:20]
        assert series.value.tolist() == counts
        offsets = [Offset(**found) for found in how["offsets"]]
        assert series.start_ns.tolist() == on_the_host(starts, *offsets).tolist()
        assert series.end_ns.tolist() == on_the_host(starts + MS, *offsets).tolist()
        assert (how["mode"], how["kernel"], how["chunk"]["steps"]) == ("ftq", "spin", 1)
        assert how["left_out"] == (starts[-1] - starts[0]) // MS + 1 - len(starts) >= 2
        assert how["skipped"] == 0
        noise = detours.fixed_time(series.since(0), series.value, 1e-3, [0, len(series)], 1e-4)
        if block == 0:
            assert set(series.value) <= {999.0, 1000.0, 1001.0}
            assert not len(noise.detours.length_s)
        else:
            assert len(noise.detours.length_s) >= 2
            # Of one at a launch's edge or a cell's, a part may be in cells that are left out, or below tau.
            assert noise.detours.length_s.max() == pytest.approx(7e-4, rel=0.01)


def test_blocks_that_share_a_multiprocessor_count_together():
    """Defends: two rows of one cell, a cell in which one of two blocks was not there yet."""
    stamps = torch.zeros(3, 100, 4, dtype=torch.int64)
    for block, (begin, processor) in enumerate([(0, 7), (250, 7), (40, 8)]):
        edges = begin + 10 * torch.arange(101)
        stamps[block, :, 0], stamps[block, :, 1], stamps[block, :, 3] = edges[:-1], edges[1:], processor
    found = cuda_spin.whole_cells(stamps, 100)
    assert list(found) == [7, 8]
    assert found[7][0].tolist() == [100 * c for c in range(3, 10)]
    assert found[7][1].tolist() == [20] * 7
    assert found[8][0].tolist() == [100 * c for c in range(1, 10)]
    assert found[8][1].tolist() == [10] * 9


def test_a_timer_coarser_than_a_chunk_is_calibrated():
    """Defends: chunks of no length, by a timer of 1 us, as GPUs before Hopper have."""

    def launch(rounds, steps):
        edges = 300 * steps * np.arange(rounds + 1) // 1000 * 1000
        stamps = np.zeros((1, rounds, 4), np.int64)
        stamps[0, :, 0], stamps[0, :, 1] = edges[:-1], edges[1:]
        return stamps

    chunk = cuda_spin.calibrated(launch, 1e-3)
    assert chunk.steps == 3
    assert chunk.quantum_s == pytest.approx(9e-7, rel=0.01)
    long = cuda_spin.calibrated(launch, 1e-4)
    assert (long.steps, long.quantum_s) == (1, pytest.approx(3e-7, rel=0.01))
    assert cuda_spin.calibrated(launch, 1.0).steps == pytest.approx(3333, abs=10)


def test_coarse_and_idle_cells_are_said(monkeypatch):
    """Defends: cells of five chunks without a word, a measurement of which nothing is left without a word."""
    plan = on_gpu(kernels=("gemm",), quantum_s=2e-3, duration_s=0.02, sizes={"gemm": TINY["gemm"]})
    idle = Replays(np.arange(0, 60 * MS, 400_000), np.ones(149, bool), 1e-6)
    monkeypatch.setattr(cuda_replays, "replays", lambda *_: idle)
    trace = cuda.measure(plan, Ranks(), FakeGpu(lambda i: 0).gpu())
    few, left_out = trace.ranks[0]["warnings"]
    assert few == "gemm_ftq: a chunk of 0.0004 s fits only 5 times into a quantum; 0.4 s would hold 1000"
    assert left_out.startswith("gemm_ftq: 10 of 10 cells were left out")
    assert len(trace.get(0, "quantum", "gemm_ftq")) == 0
    assert rows(trace, 0) == []


@pytest.mark.parametrize(
    "chunk_s, advice", [(4e-4, "0.4"), (4.1e-4, "0.5"), (2.05e-4, "0.3"), (9.3e-3, "1e+01"), (3e-5, "0.03")]
)
def test_the_quantum_that_is_advised_would_do(chunk_s, advice):
    """Defends: 0.2 s where chunks of 205 us want 0.205, for which the same is said again."""
    (sentence,) = coarse("gemm_ftq", Calibration(1, chunk_s), 1e-3)
    assert sentence.endswith(f" {advice} s would hold 1000")
    assert coarse("gemm_ftq", Calibration(1, chunk_s), float(advice)) == []


class Modelled(FakeGpu):
    """Its replays follow from what a step takes, and the host for a graph and for each step of it."""

    def __init__(self, monkeypatch, graph_ns, node_ns, step_ns=200):
        super().__init__(lambda i: 0)
        self.graph_ns, self.node_ns, self.step_ns, self.steps_of = graph_ns, node_ns, step_ns, {}
        monkeypatch.setattr(
            cuda_replays, "replays", lambda gpu, replay, *_: self.replays(self.steps_of[replay])
        )

    def captured(self, step):
        replay = super().captured(step)
        self.steps_of[replay] = self.captured_steps[-1]
        return replay

    def enqueue_ns(self, steps):
        return self.graph_ns + steps * self.node_ns

    def replays(self, steps):
        gap_ns = max(self.step_ns * steps, self.enqueue_ns(steps))
        return Replays(np.arange(0, 101 * gap_ns, gap_ns), np.zeros(100, bool), self.enqueue_ns(steps) * 1e-9)


@pytest.mark.parametrize(
    "graph_ns, node_ns, steps", [(5000, 0, 50), (5000, 60, 204), (300, 0, 5), (5000, 150, 4096)]
)
def test_a_chunk_is_longer_than_enqueuing_it(graph_ns, node_ns, steps, monkeypatch):
    """Defends: chunks of a thousandth of a quantum, or of steps timed by the host's loop, that are over before the
    host has enqueued more, so that every cell is left out; graphs without end where no graph is long enough.
    """
    fake = Modelled(monkeypatch, graph_ns, node_ns)
    plan = on_gpu(kernels=("gemm",), quantum_s=1e-3, duration_s=1e-3, sizes={"gemm": TINY["gemm"]})
    how = cuda.measure(plan, Ranks(), fake.gpu()).ranks[0]["measured"]["gemm_ftq"]
    assert how["chunk"]["steps"] == pytest.approx(steps, abs=2)
    assert (how["chunk"]["quantum_s"] >= 1.99e-9 * fake.enqueue_ns(how["chunk"]["steps"])) == (steps < 4096)


def test_a_host_that_waits_for_each_replay_is_not_waited_for(monkeypatch):
    """Defends: graphs of seconds, as with CUDA_LAUNCH_BLOCKING=1, where none is ever long against enqueuing it."""
    fake = Modelled(monkeypatch, 5000, 200_000, 200_000)
    made = cuda_replays.Replayed(fake.gpu(), "gemm", on_gpu(sizes={"gemm": TINY["gemm"]}))
    assert made.steps_ahead(1e-6) * 2e-4 < 2 * loops.LONG_ENOUGH_S
    assert max(fake.captured_steps) * 2e-4 < 2 * loops.LONG_ENOUGH_S


def test_quanta_of_steps_shorter_than_the_hosts_loop(monkeypatch):
    """Defends: quanta and local work of a 25th of what was asked for: the host's loop of 5 us taken for a step."""
    plan = on_gpu(kernels=("gemm",), modes=("fwq",), quantum_s=5e-4, sizes={"gemm": TINY["gemm"]})
    measured = cuda.measure(plan, Ranks(), Modelled(monkeypatch, 5000, 0).gpu()).ranks[0]["measured"]
    assert measured["gemm"]["steps"] == 2500


@pytest.mark.parametrize("kernel", TINY)
def test_both_modes_of_a_kernel(kernel, monkeypatch):
    monkeypatch.setattr(cuda_replays, "BATCH", 16)
    plan = on_gpu(
        kernels=(kernel,), modes=("fwq", "ftq"), quantum_s=2e-3, duration_s=0.02, sizes={kernel: TINY[kernel]}
    )
    trace = cuda.measure(plan, Ranks(), FakeGpu(lambda i: 50_000).gpu())
    assert trace.names() == [kernel, f"{kernel}_ftq"]
    measured = trace.ranks[0]["measured"]
    assert [measured[name]["mode"] for name in trace.names()] == ["fwq", "ftq"]
    assert measured[kernel]["sizes"] == measured[f"{kernel}_ftq"]["sizes"] == TINY[kernel]
    assert ("tokens_of_expert" in measured[f"{kernel}_ftq"]) is (kernel == "grouped")


def test_series_of_multiprocessors_are_told_apart_by_mode():
    """Defends: spin_mp005_ftq taken for fixed work, or not found as spin_ftq."""
    trace = cuda.measure(spin_plan(), Ranks(), FakeGpu(lambda i: 0).gpu())
    assert all(is_fixed_time(trace, name) for name in trace.names())
    assert chosen(trace, "spin_ftq") == "spin_mp005_ftq"
    assert np.median(trace.get(0, "quantum", "spin_mp006_ftq").value) >= loops.CHUNKS * 0.99
