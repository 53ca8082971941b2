"""`sigma noise run --backend cuda` on a GPU that is a fake: a queue on this CPU, whose clock runs apart.

What a real one does with a graph and its timer no test here can see.
"""

import noise_spins
import numpy as np
import pytest
from noise_fake_gpu import AHEAD_NS, FakeGpu, spun
from sigma_noise import cuda, cuda_clock, cuda_replays, loops
from sigma_noise import measure as measure_module
from sigma_noise.offset import Offset
from sigma_noise.plan import Plan
from sigma_train.errors import WrongInput
from sigma_train.ranks import Ranks


def on_gpu(**settings) -> Plan:
    return Plan(**{"modes": ("fwq",), "backend": "cuda"} | settings)


def test_edges_of_replays_are_the_events():
    """Defends: the sum of what lies between events off by one, an event recorded again before it is read."""
    work_ns = np.random.default_rng(1).integers(20_000, 60_000, 10_000)
    fake = FakeGpu(lambda i: work_ns[i])
    replay = fake.captured(lambda: None)
    before = loops.now_ns()
    edges = cuda_replays.replays(fake.gpu(), replay, 1500, 0.0).edges_ns
    after = loops.now_ns()
    assert len(edges) - 1 >= 1500 - cuda_replays.BATCH
    assert before < edges[0] < edges[-1] < after
    assert len(edges) - 1 == fake.replayed - cuda_replays.BATCH
    took = np.diff(edges)
    want = work_ns[cuda_replays.BATCH : cuda_replays.BATCH + len(took)]
    # Equal but where this CPU was too late to enqueue the next, which makes a quantum longer.
    assert np.mean(np.abs(took - want) <= 8) >= 0.5
    assert (took - want >= -8).all()


def test_spins_between_replays_are_found():
    """Defends what test_noise_gpu.py asserts on a GPU: a spin counted in the replay after it, or before the first."""
    fake = FakeGpu(lambda i: 50_000)

    def spin(begin, end):
        begin.record()
        fake.at_ns += 2_000_000
        end.record()

    quanta, spins = noise_spins.measured(fake.gpu(), fake.captured(lambda: None), spin, 0.3)
    found, _ = noise_spins.found(quanta, spins)
    assert len(spins) == len(quanta) // noise_spins.EVERY
    assert spins.seconds.tolist() == pytest.approx([0.002] * len(spins), rel=1e-6)
    assert found.recall >= 0.95
    assert np.median(found.length_s) == pytest.approx(0.002, rel=0.05)


def test_a_queue_that_ran_dry_is_counted():
    fake = FakeGpu(lambda i: 0)
    found = cuda_replays.replays(fake.gpu(), fake.captured(lambda: None), 2000, 0.0)
    assert len(found.is_dry) == len(found.edges_ns) - 1
    assert found.is_dry.any()


def test_a_queue_that_runs_dry_while_more_is_enqueued_is_dry():
    """Defends: a look at the queue before a replay is enqueued, which takes the host longer than the work."""
    fake = FakeGpu(lambda i: 100_000)
    replay = spun(2e-4, fake.captured(lambda: None))
    assert cuda_replays.replays(fake.gpu(), replay, 1, 0.0).is_dry.all()


@pytest.mark.parametrize("kernel", ["copy", "gemm", "grouped"])
def test_steps_of_a_quantum_are_captured_together(kernel, monkeypatch):
    sizes = {
        "copy": {"bytes": 64},
        "gemm": {"R": 2, "N": 3, "K": 4},
        "grouped": {"R": 6, "E": 2, "N": 3, "K": 4},
    }
    fake = FakeGpu(lambda i: 50_000)
    calls, made = [], cuda_replays.STEPS[kernel]

    def counted(*args):
        step = made(*args)
        return lambda: (calls.append(1), step())

    monkeypatch.setitem(cuda_replays.STEPS, kernel, counted)
    plan = on_gpu(
        kernels=(kernel,), quantum_s=2e-4, duration_s=0.02, warm_up_s=0, sizes={kernel: sizes[kernel]}
    )
    trace = cuda.measure(plan, Ranks(), fake.gpu())
    how = trace.ranks[0]["measured"][kernel]
    assert how["steps"] == 4
    assert fake.captured_steps[-1] == 4
    assert len(calls) == sum(fake.captured_steps)
    assert how["sizes"] == sizes[kernel]
    assert sum(how.get("tokens_of_expert", [6])) == 6
    assert ("tokens_of_expert" in how) is (kernel == "grouped")
    series = trace.get(0, "quantum", kernel)
    assert series.end_ns[-1] - series.start_ns[0] >= 0
    assert (series.end_ns[:-1] == series.start_ns[1:]).all()
    assert trace.ranks[0]["gpu"] == {"name": "fake", "uuid": "fake"}


def test_stamps_of_the_device_come_to_the_hosts_clock():
    """Defends: an offset of the wrong sign, rounds of one multiprocessor under another."""
    fake = FakeGpu(lambda i: 0)
    plan = on_gpu(quantum_s=1e-4, duration_s=5e-3, warm_up_s=0)
    before = loops.now_ns()
    trace = cuda.measure(plan, Ranks(), fake.gpu())
    after = loops.now_ns()
    assert trace.names() == ["spin_mp005", "spin_mp006"]
    assert sorted(trace.ranks[0]["measured"]) == trace.names(), "facts of a series stand under its name"
    for name in trace.names():
        how = trace.ranks[0]["measured"][name]
        assert (how["mode"], how["kernel"], how["steps"]) == ("fwq", "spin", 100)
        assert how["timer_step_ns"] == 32
        for offset in how["offsets"]:
            assert abs(offset["offset_ns"] + AHEAD_NS) <= offset["residual_ns"] + 32
        residual_ns = max(offset["residual_ns"] for offset in how["offsets"])
        series = trace.get(0, "quantum", name)
        assert len(series) == 50
        # A drift of two offsets that are wrong by their residuals stretches what lies between them.
        between_ns = how["offsets"][1]["at_ns"] - how["offsets"][0]["at_ns"]
        assert np.abs(series.seconds - 1e-4).max() <= 33e-9 + 1e-4 * 2 * residual_ns / between_ns
        assert series.start_ns[0] > before - residual_ns - 32
        assert series.end_ns[-1] < after + residual_ns + 32


def test_clocks_that_drift():
    """Defends: stamps at the end of a long measurement that are late by what the clocks have drifted."""
    stamps = AHEAD_NS + np.array([0, 1_000_000, 5_000_000_000, 10_000_000_000])
    before = Offset(AHEAD_NS, 77 - AHEAD_NS, 5)
    after = Offset(AHEAD_NS + 10_000_000_000, 77 - AHEAD_NS + 100_000, 5)  # 10 us a second
    assert cuda_clock.on_the_host(stamps, before, after).tolist() == [
        77,
        1_000_087,
        5_000_050_077,
        10_000_100_077,
    ]
    assert (
        cuda_clock.on_the_host(stamps, before, before.__class__(after.at_ns, before.offset_ns, 5))[3]
        == 10_000_000_077
    )


def test_ranks_begin_together_and_know_their_offsets(monkeypatch):
    """Defends: GPUs of which one is timed while others still warm up, stamps of two hosts that do not compare."""
    done = []
    fake = FakeGpu(lambda i: 50_000)
    monkeypatch.setattr(measure_module.dist, "barrier", lambda: done.append("together"))
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value] * self.size)
    monkeypatch.setattr(
        cuda, "offset", lambda ranks, identity: (done.append("offset"), Offset(len(done), 7, 1))[1]
    )
    real = cuda_replays.replays
    monkeypatch.setattr(cuda_replays, "replays", lambda *args: (done.append(args[3]), real(*args))[1])
    plan = on_gpu(kernels=("copy",), duration_s=0.02, warm_up_s=0.01, sizes={"copy": {"bytes": 64}})
    trace = cuda.measure(plan, Ranks(1, 2), fake.gpu())
    calibrated = done.count(0.0)
    assert done == ["offset", *[0.0] * calibrated, 0.01, "together", 0.02, "offset"]
    assert [o["offset_ns"] for o in trace.ranks[1]["clock"]["offsets"]] == [7, 7]


def test_sizes_are_of_the_gpu():
    """Defends: the caches of the CPU, and what it copies at once, where a GPU is measured."""
    plan = on_gpu(kernels=("copy",), sizes={"copy": {"bytes": 4096}})
    plan.check(1)
    assert cuda_replays.sizes_of("copy", plan) == {"bytes": 4096}
    assert cuda_replays.sizes_of("gemm", plan) == {"R": 4096, "N": 4096, "K": 4096}


@pytest.mark.parametrize(
    "plan, message",
    [
        (on_gpu(modes=("detours",)), "--mode detours is gaps of a loop that reads the CPU's clock"),
        (on_gpu(kernels=("a2a",)), "--kernel a2a wants at least 2 ranks, found 1"),
        (on_gpu(), "--kernel spin: the CUDA kernels were not built here"),
        (on_gpu(kernels=("gemm",), threads=2), "--threads is of the CPU alone"),
        (on_gpu(kernels=("gemm",), threshold_s=1.0), "--threshold is of the CPU alone"),
        (
            on_gpu(kernels=("copy",), sizes={"copy": {"slice": 3}}),
            "--size: copy takes bytes on a GPU, found 'slice'",
        ),
        (
            on_gpu(kernels=("gemm",), sizes={"gemm": {"threads": 3}}),
            "--size: gemm takes R, N, K on a GPU, found 'threads'",
        ),
    ],
)
def test_what_a_gpu_is_not_asked_for(plan, message):
    with pytest.raises(WrongInput, match=message):
        cuda.measure(plan, Ranks(), FakeGpu(lambda i: 0).gpu(native=False))
