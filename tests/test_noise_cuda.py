"""`sigma noise run --backend cuda` on a GPU that is a fake: a queue on this CPU, whose clock runs apart.

What a real one does with a graph and its timer no test here can see.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sigma_noise import cuda, loops
from sigma_noise.measure import Plan
from sigma_train.errors import WrongInput
from sigma_train.ranks import Ranks

AHEAD_NS = 1_700_000_000_123_456_789  # of the device's timer


class FakeGpu:
    """Work takes the time that `work` gives it, in order of enqueuing; now is when the host last looked."""

    def __init__(self, work_ns):
        self.at_ns, self.work_ns, self.replayed, self.captures = 0, work_ns, 0, []
        fake = self

        class Event:
            def record(self):
                fake.at_ns = max(fake.at_ns, loops.now_ns())
                self.ns = fake.at_ns

            def elapsed_time(self, end):
                return float(np.float32((end.ns - self.ns) * 1e-6))

            def synchronize(self):
                while loops.now_ns() < self.ns:
                    pass

            def query(self):
                return loops.now_ns() >= self.ns

        self.event = Event

    def captured(self, step):
        step()
        self.captures.append(step)

        def replay():
            self.at_ns = max(self.at_ns, loops.now_ns()) + int(self.work_ns(self.replayed))
            self.replayed += 1

        return replay

    def run_arithmetic(self, blocks, rounds, steps, stamps, sums, stream):
        """Rounds of 1 us a step, on multiprocessors 5, 6, ..., by a timer of 32 ns."""
        out = np.frombuffer((ctypes.c_int64 * (blocks * rounds * 4)).from_address(stamps), np.int64)
        out = out.reshape(blocks, rounds, 4)
        begin = loops.now_ns()
        for block in range(blocks):
            edges = begin + 1000 * steps * np.arange(rounds + 1)
            out[block, :, 0], out[block, :, 1] = edges[:-1], edges[1:]
            out[block, :, 3] = block + 5
        while loops.now_ns() < begin + 1000 * steps * rounds:
            pass
        out[..., :2] = (out[..., :2] + AHEAD_NS) // 32 * 32

    def gpu(self, native=True):
        kernels = SimpleNamespace(run_arithmetic=self.run_arithmetic, work_threads=256)
        return cuda.Gpu(
            device=torch.device("cpu"), about={"name": "fake"}, processors=2, event=self.event,
            captured=self.captured, synchronize=lambda: None, stream=lambda: 0,
            native=kernels if native else None,
        )  # fmt: skip


def test_edges_of_replays_are_the_events():
    """Defends: the sum of what lies between events off by one, an event recorded again before it is read."""
    work_ns = np.random.default_rng(1).integers(20_000, 60_000, 10_000)
    fake = FakeGpu(lambda i: work_ns[i])
    replay = fake.captured(lambda: None)
    before = loops.now_ns()
    edges, _ = cuda.replays(fake.gpu(), replay, 1500, 0.0)
    after = loops.now_ns()
    assert len(edges) - 1 >= 1500 - cuda.BATCH
    assert before < edges[0] < edges[-1] < after
    assert len(edges) - 1 == fake.replayed - cuda.BATCH
    took = np.diff(edges)
    want = work_ns[cuda.BATCH : cuda.BATCH + len(took)]
    # Equal but where this CPU was too late to enqueue the next, which makes a quantum longer.
    assert np.mean(np.abs(took - want) <= 8) >= 0.5
    assert (took - want >= -8).all()


def test_a_queue_that_ran_dry_is_counted():
    fake = FakeGpu(lambda i: 0)
    _, dry = cuda.replays(fake.gpu(), fake.captured(lambda: None), 2000, 0.0)
    assert dry >= 1


@pytest.mark.parametrize("kernel", ["copy", "gemm", "grouped"])
def test_steps_of_a_quantum_are_captured_together(kernel, monkeypatch):
    sizes = {
        "copy": {"bytes": 64},
        "gemm": {"R": 2, "N": 3, "K": 4},
        "grouped": {"R": 6, "E": 2, "N": 3, "K": 4},
    }
    fake = FakeGpu(lambda i: 50_000)
    calls, made = [], cuda.STEPS[kernel]

    def counted(*args):
        step = made(*args)
        return lambda: (calls.append(1), step())

    monkeypatch.setitem(cuda.STEPS, kernel, counted)
    plan = Plan(kernels=(kernel,), modes=("fwq",), quantum_s=2e-4, duration_s=0.02, warm_up_s=0, sizes=sizes)
    trace = cuda.measure(plan, Ranks(), fake.gpu())
    how = trace.ranks[0]["measured"][kernel]
    assert how["steps"] == 4
    assert len(calls) == 1 + 4, "captured once alone and once as a quantum"
    assert how["sizes"] == sizes[kernel]
    series = trace.get(0, "quantum", kernel)
    assert series.end_ns[-1] - series.start_ns[0] >= 0
    assert (series.end_ns[:-1] == series.start_ns[1:]).all()
    assert trace.ranks[0]["gpu"] == {"name": "fake"}


def test_stamps_of_the_device_come_to_the_hosts_clock():
    """Defends: an offset of the wrong sign, rounds of one multiprocessor under another."""
    fake = FakeGpu(lambda i: 0)
    plan = Plan(kernels=("spin",), modes=("fwq",), quantum_s=1e-4, duration_s=5e-3, warm_up_s=0)
    before = loops.now_ns()
    trace = cuda.measure(plan, Ranks(), fake.gpu())
    after = loops.now_ns()
    how = trace.ranks[0]["measured"]["spin"]
    assert how["steps"] == 100
    assert how["timer_step_ns"] == 32
    assert abs(how["offset_ns"] + AHEAD_NS) <= how["residual_ns"] + 32
    assert trace.names() == ["spin_mp005", "spin_mp006"]
    for name in trace.names():
        series = trace.get(0, "quantum", name)
        assert len(series) == 50
        assert np.abs(series.seconds - 1e-4).max() <= 33e-9
        assert series.start_ns[0] > before - how["residual_ns"] - 32
        assert series.end_ns[-1] < after + how["residual_ns"] + 32


@pytest.mark.parametrize(
    "plan, message",
    [
        (Plan(modes=("ftq",)), "--mode ftq is of the CPU alone"),
        (Plan(kernels=("a2a",), modes=("fwq",)), "--kernel a2a is of the CPU alone"),
        (Plan(modes=("fwq",)), "--kernel spin: the CUDA kernels were not built here"),
        (Plan(kernels=("gemm",), modes=("fwq",), threads=2), "--threads is of the CPU alone"),
        (Plan(kernels=("gemm",), modes=("fwq",), threshold_s=1.0), "--threshold is of the CPU alone"),
        (
            Plan(kernels=("copy",), modes=("fwq",), sizes={"copy": {"slice": 3}}),
            "--size copy.slice: on a GPU it takes bytes",
        ),
    ],
)
def test_what_a_gpu_is_not_asked_for(plan, message):
    with pytest.raises(WrongInput, match=message):
        cuda.measure(plan, Ranks(), FakeGpu(lambda i: 0).gpu(native=False))
