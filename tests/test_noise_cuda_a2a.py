"""The all-to-all on GPUs that are fakes: queues on this CPU, whose collective is gloo's or takes a given time."""

from dataclasses import replace
from types import SimpleNamespace

import forked
import noise_ranks
import numpy as np
import pytest
import torch
from noise_fake_gpu import FakeGpu, spun
from sigma_noise import a2a, cuda, cuda_a2a, gpu, loops
from sigma_noise.a2a import Values
from sigma_noise.cuda_clock import EventClock
from sigma_noise.plan import Plan
from sigma_noise.work import work
from sigma_train.errors import Failure, WrongInput
from sigma_train.ranks import Ranks

PLAN = Plan(kernels=("a2a",), modes=("fwq",), backend="cuda")
ONE = Ranks(0, 1)


class Enqueued(FakeGpu):
    """Its collective takes `transfer_ns` of the queue, as a real one does, and not of the host."""

    def __init__(self, work_ns, transfer_ns):
        super().__init__(work_ns)
        self.transfer_ns, self.exchanged, self.most_ahead_ns = transfer_ns, 0, 0

    def exchange(self, received, sent):
        self.at_ns = max(self.at_ns, loops.now_ns()) + int(self.transfer_ns(self.exchanged))
        self.exchanged += 1
        self.most_ahead_ns = max(self.most_ahead_ns, self.at_ns - loops.now_ns())
        received.copy_(sent)


def rounds_of(fake, ranks=ONE):
    values = Values(ranks, 64, 1, torch.device("cpu"))
    return cuda_a2a.Rounds(fake.gpu(), ranks, fake.captured(lambda: None), fake.exchange, values)


def test_a_late_rank_of_two_is_named(tmp_path):
    """Defends: an arrival stamped after the collective; stamps of ranks that do not compare, or rounds."""
    forked.spawn(noise_ranks.check_late_gpu, (2, str(tmp_path / "ranks")), 2)


def test_local_work_and_transfer_are_the_queues():
    """Defends: a collective that is enqueued beside the work, an event recorded again before it is read, and first
    rounds that are kept, which the host may be late for.
    """
    rng = np.random.default_rng(2)
    work_ns, transfer_ns = rng.integers(100_000, 300_000, 500), rng.integers(200_000, 500_000, 500)
    fake = Enqueued(lambda i: work_ns[i], lambda i: transfer_ns[i])
    rounds = rounds_of(fake)
    before = loops.now_ns()
    local, collective = rounds(200)
    after = loops.now_ns()
    assert len(local) == len(collective) == 200
    assert (local.end_ns == collective.start_ns).all()
    assert (collective.end_ns[:-1] <= local.start_ns[1:]).all()
    residual_ns = max(found.residual_ns for found in rounds.offsets)
    assert before - residual_ns <= local.start_ns[0] < collective.end_ns[-1] <= after + residual_ns
    between_ns = rounds.offsets[1].at_ns - rounds.offsets[0].at_ns
    stretch = 1e-6 + 2 * residual_ns / between_ns  # of a drift by offsets that are wrong by their residuals
    for series, want in ((local, work_ns), (collective, transfer_ns)):
        took_ns = series.end_ns - series.start_ns
        # Longer where this CPU was late to enqueue what follows.
        kept = want[cuda_a2a.BATCH : cuda_a2a.BATCH + 200]
        assert (took_ns >= kept * (1 - stretch) - 8).all()
        assert np.mean(took_ns <= kept * (1 + stretch) + 8) >= 0.5


def test_rounds_are_enqueued_ahead_and_no_further_than_two_batches():
    """Defends: a host that waits for each collective; a queue without end, of a run that is to be stopped."""
    fake = Enqueued(lambda i: 200_000, lambda i: 100_000)
    rounds = rounds_of(fake)
    rounds(8 * cuda_a2a.BATCH)
    assert fake.most_ahead_ns <= 2 * cuda_a2a.BATCH * 300_000
    assert fake.most_ahead_ns >= 1.5 * cuda_a2a.BATCH * 300_000, "two batches"


def test_rounds_that_found_no_work_are_counted():
    fake = Enqueued(lambda i: 0, lambda i: 0)
    rounds = rounds_of(fake)
    rounds(100)
    assert 50 <= rounds.dry <= 100


@pytest.mark.parametrize(
    "slow, work_ns, transfer_ns", [("replay", 50_000, 10_000), ("exchange", 100_000, 10_000)]
)
def test_rounds_that_found_no_work_while_more_was_enqueued_are_counted(slow, work_ns, transfer_ns):
    """Defends: a look at the queue before the host enqueues local work or the collective, which takes it 200 us."""
    fake = Enqueued(lambda i: work_ns, lambda i: transfer_ns)
    rounds = rounds_of(fake)
    setattr(rounds, slow, spun(2e-4, getattr(rounds, slow)))
    rounds(100)
    assert rounds.dry == 100


def test_clocks_of_events_that_drift():
    """Defends: collectives at the end of a long run that are late by what the two clocks have drifted."""
    fake = Enqueued(lambda i: 100_000, lambda i: 100_000)
    event = fake.event

    class Slow(event):
        def elapsed_time(self, end):
            return super().elapsed_time(end) * 0.999

    fake.event = Slow
    rounds = rounds_of(fake)
    local, collective = rounds(400)
    seconds = (collective.end_ns[-1] - local.start_ns[0]) * 1e-9
    residual_s = 2e-9 * max(found.residual_ns for found in rounds.offsets)
    assert seconds >= 400 * 200e-6 - residual_s, "by its own clock it would be 80 us less"


def test_events_tell_no_more_than_what_lies_between_them():
    """Defends: the time since a long time ago, which f32 has in steps of microseconds."""
    fake = FakeGpu(lambda i: 0)
    clock = EventClock(fake.gpu())
    asked = []
    for k in range(1, 4):
        event = fake.event()
        event.ns = clock.last.ns + 1_000_000_007 * k
        event.elapsed_time = lambda end, asked=asked, event=event: (
            asked.append(end.ns - event.ns), (end.ns - event.ns) * 1e-6
        )[1]  # fmt: skip
        if k == 1:
            clock.last.elapsed_time = lambda end, begin=clock.last: (end.ns - begin.ns) * 1e-6
        clock.read(event)
    assert clock.ns == 1_000_000_007 * 6
    assert asked == [2_000_000_014, 3_000_000_021]


def test_what_came_as_something_else_is_a_failure():
    fake = Enqueued(lambda i: 0, lambda i: 0)
    rounds = rounds_of(fake)
    rounds.exchange = lambda received, sent: received.zero_()
    with pytest.raises(Failure, match="a2a: what rank 0 sent to rank 0 came as something else"):
        rounds(2)


def only_once(exchange):
    """An exchange that does nothing from the second time on."""
    left = [exchange]
    return lambda *args: left.pop()(*args) if left else None


def test_an_exchange_that_does_nothing_later_is_a_failure(monkeypatch):
    """Defends: a check passed by what the call before had received."""
    rounds = rounds_of(Enqueued(lambda i: 0, lambda i: 0))
    rounds.exchange = only_once(rounds.exchange)
    on_cpu = a2a.AllToAll(ONE, work("spin"), 64, 1)
    fake = {
        "barrier": lambda: None,
        "all_to_all_single": only_once(lambda received, sent: received.copy_(sent)),
    }
    monkeypatch.setattr(a2a, "dist", SimpleNamespace(**fake))
    for of_device in (rounds, on_cpu.rounds):
        of_device(1)
        with pytest.raises(Failure, match="a2a: what rank 0 sent to rank 0 came as something else"):
            of_device(1)


@pytest.mark.parametrize("lack", ["gpu", "spin", "a2a"])
def test_what_one_rank_lacks_both_refuse(tmp_path, lack):
    """Defends: ranks that wait in a collective for one that has refused alone."""
    forked.spawn(noise_ranks.check_refused_by_both, (2, str(tmp_path / "ranks"), lack), 2)


def test_what_an_all_to_all_of_gpus_wants(monkeypatch):
    """Defends: a traceback of NCCL's; a default size of local work that an all-to-all cannot be told."""
    two, fake = Ranks(0, 2), FakeGpu(lambda i: 0).gpu()
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value] * self.size)
    with pytest.raises(WrongInput, match="--kernel a2a: torch was built without NCCL or RCCL here"):
        cuda.measure(PLAN, two, replace(fake, exchange=None))
    with pytest.raises(
        WrongInput, match="--kernel a2a wants a GPU for each rank, found ranks 0 and 1 on fake"
    ):
        cuda.measure(PLAN, two, fake)
    with pytest.raises(WrongInput, match="--kernel a2a wants at least 2 ranks, found 1"):
        cuda.measure(PLAN, ONE, fake)
    with pytest.raises(WrongInput, match="--kernel a2a is fixed work"):
        replace(PLAN, modes=("ftq",)).check(2)
    replace(PLAN, sizes={"gemm": {"R": 2}}).check(2)
    with pytest.raises(WrongInput, match="--size gemm: no such kernel is measured"):
        replace(PLAN, sizes={"gemm": {"R": 2}}, backend="cpu").check(2)
    with pytest.raises(WrongInput, match="--size: gemm takes R, N, K on a GPU, found 'threads'"):
        replace(PLAN, sizes={"gemm": {"threads": 2}}).check(2)


def test_the_group_of_nccl_goes_with_the_measurement(monkeypatch):
    """Defends: a collective over the ranks' own gloo; a watchdog that wakes while other kernels are measured."""
    done = []
    fake = {
        "new_group": lambda backend: (done.append(backend), "group")[1],
        "all_to_all_single": lambda received, sent, group: done.append((received, sent, group)),
        "destroy_process_group": lambda group: done.append(f"without {group}"),
    }
    for name, function in fake.items():
        monkeypatch.setattr(gpu.dist, name, function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    with gpu._nccl() as exchange:
        exchange("received", "sent")
    assert done == ["nccl", ("received", "sent", "group"), "synchronized", "without group"]
