"""What noise cost, on traces whose every nanosecond is known, and on four processes of which one is late."""

import json
from pathlib import Path

import forked
import late_rank
import numpy as np
import pytest
from sigma_noise import parts, steps, steps_view
from sigma_noise.step_causes import late
from sigma_noise.step_ranks import step_ranks
from sigma_noise.steps import StepNoise
from sigma_noise.trace import Series, Trace

S = 1e-9


def step_noise(trace: Trace) -> StepNoise:
    """Of all steps."""
    return steps.step_noise(trace, warm_up=0)


def test_the_first_step_of_each_start_is_left_out():
    """Defends: memory that is touched for the first time, taken for noise."""
    rng = np.random.default_rng(2)
    work = rng.integers(1000, 5000, (20, 2, 3))
    one, two = (Simulated(work, np.full((20, 2), 9), 1, attempt) for attempt in (0, 10_000))
    later = Simulated(work[1:], np.full((19, 2), 9))
    want = step_noise(later.trace())
    got = steps.step_noise(joined(one.trace(), two.trace()))
    assert got.steps == 38
    assert got.cost_s == pytest.approx(2 * want.cost_s, rel=1e-12)
    assert got.local_s.tolist() == pytest.approx((2 * want.local_s).tolist(), rel=1e-12)
    assert got.last.tolist() == (2 * want.last).tolist()
    with pytest.raises(ValueError, match="must have a step after the first 20, found none"):
        steps.step_noise(one.trace(), warm_up=20)


class Simulated:
    """Ranks that compute work[s, k, r] ns and then meet, in collective k of step s, which takes transfer[s, k]."""

    def __init__(self, work: np.ndarray, transfer: np.ndarray, first: int = 1, attempt: int = 0) -> None:
        self.steps, self.calls, self.size = work.shape
        self.work, self.transfer, self.first, self.attempt = work, transfer, first, attempt
        self.rows: dict[tuple[int, str, str], list[tuple[int, int, float]]] = {}
        self._run()

    def _run(self) -> None:
        now = [1000 * (1 + self.attempt)] * self.size
        for r in range(self.size):
            self.add(r, "counter", "attempt", now[r], now[r], self.attempt)
        for s in range(self.steps):
            begins = list(now)
            for k in range(self.calls):
                arrivals = [now[r] + int(self.work[s, k, r]) for r in range(self.size)]
                end = max(arrivals) + int(self.transfer[s, k])
                for r in range(self.size):
                    self.add(r, "quantum", "sum", arrivals[r], end)
                    self.add(r, "quantum", "blocked", arrivals[r], end)
                    now[r] = end
            for r in range(self.size):
                self.add(r, "quantum", "step", begins[r], now[r])
                self.add(r, "counter", "step", begins[r], begins[r], self.first + s)
            now = [t + 50 for t in now]
        self.ended = now

    def add(self, rank: int, kind: str, name: str, start: int, end: int, value: float = 1.0) -> None:
        self.rows.setdefault((rank, kind, name), []).append((start, end, value))

    def trace(self, boots: list[str] | None = None, offsets: list[int] | None = None) -> Trace:
        boots, offsets = boots or ["a"] * self.size, offsets or [0] * self.size
        rows = {}
        for key, of_key in self.rows.items():
            table = np.array(sorted(of_key))
            start, end = (table[:, c].astype(np.int64) + offsets[key[0]] for c in (0, 1))
            rows[key] = Series(start, end, table[:, 2])
        groups = {str(self.attempt): {"all": list(range(self.size))}}
        ranks = {
            r: {"boot": boots[r], "groups": groups, "collectives": {"sum": "all"}} for r in range(self.size)
        }
        return Trace({"phases": ["forward"]}, ranks, rows)


def random_run(seed: int, n: int = 40, calls: int = 3, size: int = 4) -> Simulated:
    rng = np.random.default_rng(seed)
    return Simulated(rng.integers(1000, 5000, (n, calls, size)), rng.integers(1, 300, (n, calls)))


def joined(*traces: Trace) -> Trace:
    keys = {key for trace in traces for key in trace.rows}
    ranks = {}
    for trace in traces:
        ranks |= {rank: parts._newer(ranks.get(rank, {}), about) for rank, about in trace.ranks.items()}
    rows = {key: parts._joined([t.rows[key] for t in traces if key in t.rows]) for key in keys}
    return Trace(traces[0].run, ranks, rows)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_sum_is_that_of_what_happened(size):
    """Defends: time of collectives counted as local; a median of sums instead of a sum of medians; wait of the last."""
    run = random_run(size, size=size)
    noise = step_noise(run.trace())
    local = run.work.sum(1)
    arrivals = run.work  # all leave the call before together
    assert noise.steps == 40
    np.testing.assert_allclose(noise.local_s, local.sum(0) * S, rtol=1e-12)
    assert noise.cost_s == pytest.approx((local.max(1) - np.median(local, 1)).sum() * S, rel=1e-12)
    assert noise.slowest_s == pytest.approx(local.max(1).sum() * S, rel=1e-12)
    assert noise.mean_s == pytest.approx(local.mean(1).sum() * S, rel=1e-12)
    np.testing.assert_allclose(noise.excess_s, (local - np.median(local, 1)[:, None]).sum(0) * S, atol=1e-15)
    second = np.sort(local, 1)[:, -2]
    blame = [np.where(local.argmax(1) == r, local.max(1) - second, 0).sum() * S for r in range(size)]
    np.testing.assert_allclose(noise.blame_s, blame, atol=1e-15)
    assert noise.slowest.tolist() == np.bincount(local.argmax(1), minlength=size).tolist()
    wait = (arrivals.max(2)[:, :, None] - arrivals).sum((0, 1))
    np.testing.assert_allclose(noise.wait_s, wait * S, rtol=1e-12)
    np.testing.assert_allclose(noise.transfer_s, run.transfer.sum() * S, rtol=1e-12)
    np.testing.assert_allclose(noise.blocked_s, noise.wait_s + noise.transfer_s, rtol=1e-12)
    assert noise.last.tolist() == np.bincount(arrivals.argmax(2).ravel(), minlength=size).tolist()
    assert noise.collectives == 120
    whole = (run.work.max(2) + run.transfer).sum() * S
    assert noise.steps_s == pytest.approx(whole, rel=1e-12)
    assert noise.cost_share == pytest.approx(noise.cost_s / whole, rel=1e-12)


def test_collective_time_names_the_wrong_rank_and_local_time_the_right_one():
    """Defends: the inversion: the rank that all wait for is in collectives the shortest (PyTorch DDP, MoE dispatch)."""
    work, transfer = np.full((50, 2, 4), 1000), np.full((50, 2), 100)
    work[:, 0, 2] += 200
    noise = step_noise(Simulated(work, transfer).trace())
    assert noise.worst == 2
    assert noise.ranks[int(noise.local_s.argmax())] == 2
    assert noise.last[2] >= 50
    assert noise.blocked_s.argmin() == 2
    assert noise.cost_s == pytest.approx(50 * 200 * S)
    assert noise.blame_s.tolist() == pytest.approx([0, 0, 50 * 200 * S, 0])


def test_what_travels_while_a_rank_computes_is_neither_wait_nor_local_twice():
    """Defends: an exchange that is begun, and waited for later: blocked is from the wait on, arrival is the begin."""
    run = Simulated(np.zeros((1, 0, 2), int), np.zeros((1, 0), int))
    run.rows = {}
    # Rank 0 gives at 10, computes until 40, goes on at 90; rank 1 gives at 60, waits from 70, and goes on at 90.
    for rank, (gives, waits) in enumerate(((10, 40), (60, 70))):
        run.add(rank, "quantum", "sum", gives, 90)
        run.add(rank, "quantum", "blocked", waits, 90)
        run.add(rank, "quantum", "step", 0, 100)
        run.add(rank, "counter", "step", 0, 0, 1)
    noise = step_noise(run.trace())
    assert noise.local_s.tolist() == pytest.approx([50 * S, 80 * S])
    assert noise.wait_s.tolist() == pytest.approx([20 * S, 0])
    assert noise.transfer_s.tolist() == pytest.approx([30 * S, 20 * S])
    assert noise.last.tolist() == [0, 1]


def test_who_goes_on_before_the_last_has_come_waited_no_longer_than_it_did():
    """Defends: a broadcast, whose root does not wait for those that come late; a wait longer than the time blocked."""
    run = Simulated(np.zeros((1, 0, 2), int), np.zeros((1, 0), int))
    run.rows = {}
    for rank, (arrives, ends) in enumerate(((10, 15), (60, 63))):
        run.add(rank, "quantum", "sum", arrives, ends)
        run.add(rank, "quantum", "blocked", arrives, ends)
        run.add(rank, "quantum", "step", 0, 100)
        run.add(rank, "counter", "step", 0, 0, 1)
    noise = step_noise(run.trace())
    assert noise.wait_s.tolist() == pytest.approx([5 * S, 0])
    assert noise.transfer_s.tolist() == pytest.approx([0, 3 * S])


def test_ranks_without_a_common_clock_are_told_apart_all_the_same():
    """Defends: stamps of two machines compared; the last rank is the one that waits least."""
    rng = np.random.default_rng(3)
    run = Simulated(rng.integers(1000, 5000, (30, 2, 3)), np.full((30, 2), 70))
    one = step_noise(run.trace())
    several = step_noise(run.trace(boots=["a", "b", "c"], offsets=[0, 10**15, 77]))
    assert several.local_s.tolist() == one.local_s.tolist()
    assert several.cost_s == one.cost_s
    assert several.last.tolist() == one.last.tolist()
    np.testing.assert_allclose(several.wait_s, one.wait_s, rtol=1e-12)
    np.testing.assert_allclose(several.transfer_s, 30 * 2 * 70 * S, rtol=1e-12)


def test_calls_outside_of_steps_do_not_count():
    """Defends: validation, whose collectives have the names of the steps'."""
    run = random_run(5)
    before = step_noise(run.trace())
    for r in range(4):
        run.add(r, "quantum", "sum", run.ended[0] + 1000 * r, run.ended[0] + 9000)
        run.add(r, "quantum", "blocked", run.ended[0] + 1000 * r, run.ended[0] + 9000)
        run.add(r, "quantum", "validation", run.ended[0], run.ended[0] + 9000 + r)
    after = step_noise(run.trace())
    assert after.blocked_s.tolist() == before.blocked_s.tolist()
    assert after.collectives == before.collectives
    assert after.pauses_s["validation"].tolist() == pytest.approx([(9000 + r) * S for r in range(4)])


def test_phases_and_garbage_collection_are_those_of_steps():
    run = random_run(6, size=2)
    step = run.rows[1, "quantum", "step"]
    for begin, _, _ in step[:7]:
        run.add(1, "event", "gc", begin + 5, begin + 105, 2.0)
        run.add(0, "quantum", "forward", begin + 1, begin + 11)
        run.add(1, "quantum", "forward", begin + 1, begin + 21)
    run.add(1, "event", "gc", run.ended[1] + 10, run.ended[1] + 99999, 2.0)
    noise = step_noise(run.trace())
    assert noise.gc_s.tolist() == pytest.approx([0, 700 * S])
    assert noise.phases_s["forward"].tolist() == pytest.approx([70 * S, 140 * S])


def test_a_run_that_went_on_is_the_sum_of_its_attempts():
    """Defends: steps that were done twice matched with those of another attempt; a rank that lost its last rows."""
    rng = np.random.default_rng(8)
    one = Simulated(rng.integers(1000, 5000, (20, 2, 4)), np.full((20, 2), 9))
    two = Simulated(rng.integers(1000, 5000, (15, 2, 2)), np.full((15, 2), 9), first=11, attempt=10_000)
    want = [step_noise(run.trace()) for run in (one, two)]
    cut = one.trace()
    rows = dict(cut.rows)
    for key, keep in (
        ((3, "quantum", "step"), 12),
        ((3, "counter", "step"), 12),
        ((3, "quantum", "sum"), 24),
    ):
        series = rows[key]
        rows[key] = Series(series.start_ns[:keep], series.end_ns[:keep], series.value[:keep])
    whole = step_noise(joined(one.trace(), two.trace()))
    assert whole.ranks == [0, 1, 2, 3]
    assert whole.steps == 35
    assert whole.cost_s == pytest.approx(want[0].cost_s + want[1].cost_s, rel=1e-12)
    assert whole.local_s[:2].tolist() == pytest.approx((want[0].local_s[:2] + want[1].local_s).tolist())
    assert whole.local_s[2:].tolist() == want[0].local_s[2:].tolist()
    assert whole.last.sum() == whole.collectives == 70
    short = step_noise(joined(Trace(cut.run, cut.ranks, rows), two.trace()))
    assert short.steps == 12 + 15
    local = one.work.sum(1)[:12]
    assert short.cost_s == pytest.approx(
        (local.max(1) - np.median(local, 1)).sum() * S + want[1].cost_s, rel=1e-12
    )


def test_groups_of_ranks_have_a_last_one_each():
    """Defends: ranks of other groups taken for late ones; the k-th call of one group beside another's."""
    run = Simulated(np.full((1, 0, 4), 0), np.zeros((1, 0), int))
    run.rows = {}
    arrivals = (10, 30, 500, 400)
    for rank, arrival in enumerate(arrivals):
        end = 40 if rank < 2 else 600
        run.add(rank, "quantum", "rows", arrival, end)
        run.add(rank, "quantum", "blocked", arrival, end)
        run.add(rank, "quantum", "step", 0, 700)
        run.add(rank, "counter", "step", 0, 0, 1)
    trace = run.trace()
    for rank, about in trace.ranks.items():
        about["groups"] = {"0": {"experts": [0, 1] if rank < 2 else [2, 3]}}
        about["collectives"] = {"rows": "experts"}
    noise = step_noise(trace)
    assert noise.last.tolist() == [0, 1, 1, 0]
    assert noise.wait_s.tolist() == pytest.approx([20 * S, 0, 0, 100 * S])
    assert noise.transfer_s.tolist() == pytest.approx([10 * S, 10 * S, 100 * S, 100 * S])


def test_one_rank_waits_for_nobody():
    run = Simulated(np.full((9, 0, 1), 0), np.zeros((9, 0), int))
    noise = step_noise(run.trace())
    assert (noise.cost_s, noise.blame_s.tolist(), noise.slowest.tolist()) == (0.0, [0.0], [0])
    assert "one rank waits for nobody" in steps_view.sentence(noise)


def test_what_does_not_match_is_refused():
    run = random_run(4, 5)
    none = Trace({}, {0: {}, 1: {}}, {})
    assert not steps.has_steps(none)
    with pytest.raises(ValueError, match="found none"):
        step_noise(none)
    number = run.rows[2, "counter", "step"]
    run.rows[2, "counter", "step"] = [(s, e, v + 1) for s, e, v in number]
    with pytest.raises(ValueError, match="rank 2 has others than rank 0"):
        step_noise(run.trace())
    run.rows[2, "counter", "step"] = number
    lost = run.rows[1, "quantum", "sum"].pop(4)
    with pytest.raises(ValueError, match="the same calls of sum in each step"):
        step_noise(run.trace())
    run.rows[1, "quantum", "sum"].insert(4, lost)
    run.rows[3, "quantum", "blocked"].pop(0)
    with pytest.raises(ValueError, match="each sum of rank 3 must end with a row of blocked"):
        step_noise(run.trace())


def test_a_rank_of_which_nothing_is_known_leaves_the_others_their_sums():
    run = random_run(9)
    trace = run.trace()
    known = Trace(
        trace.run,
        {r: about for r, about in trace.ranks.items() if r != 3},
        {key: series for key, series in trace.rows.items() if key[0] != 3},
    )
    noise = step_noise(known)
    assert noise.ranks == [0, 1, 2]
    assert noise.local_s.tolist() == step_noise(trace).local_s[:3].tolist()
    assert noise.collectives == 0
    assert noise.blocked_s.tolist() == step_noise(trace).blocked_s[:3].tolist()


def test_the_page_says_who_and_how_much():
    work, transfer = np.full((50, 1, 4), 10**7), np.full((50, 1), 10**6)
    work[:25, 0, 2] += 4 * 10**6
    noise = step_noise(Simulated(work, transfer).trace())
    told = steps_view.sentence(noise)
    assert "cost 0.10 s, 15.4% of 50 steps; rank 2 computed 0.10 s longer" in told
    page = steps_view.page(noise)
    assert "<td>2<td>0.60<td>0.10<td>0.10<td>0.00" in page


@pytest.mark.acceptance
def test_a_late_rank_of_four_is_named_by_local_time_and_by_arrival(tmp_path):
    """Acceptance 14: rank 2 sleeps before an all-reduce.  Its own collectives are the shortest."""
    n, sleep_s = 25, 0.02
    forked.spawn(late_rank.run, (4, str(tmp_path / "store"), str(tmp_path), n, sleep_s), 4)
    found = parts.read(tmp_path)
    noise = step_noise(found)
    scores = step_ranks(found, warm_up=0).scores
    assert scores.ranks[0].rank == 2
    assert scores.ranks[0].what_if_interval.low > 0
    assert (noise.ranks, noise.steps, noise.collectives) == ([0, 1, 2, 3], n, n)
    assert noise.worst == 2
    assert noise.local_s.argmax() == 2
    assert noise.last.argmax() == 2
    assert noise.slowest.argmax() == 2
    by_collective_time = [noise.ranks[i] for i in np.argsort(-noise.blocked_s)]
    assert by_collective_time[-1] == 2, (
        "ranked by time in collectives the culprit is the last to be suspected"
    )
    truth = json.loads(Path(tmp_path, "truth.json").read_text())
    assert noise.local_s[2] >= sum(truth)
    assert noise.wait_s[[0, 1, 3]].min() > 0.5 * sum(truth)


def skewed(seed: list[int], n: int, size: int, slower: float = 0.0, lasts: int = 1) -> StepNoise:
    """`run_of_skewed`."""
    return step_noise(run_of_skewed(seed, n, size, slower, lasts))


def run_of_skewed(seed: list[int], n: int, size: int, slower: float = 0.0, lasts: int = 1) -> Trace:
    """Ranks alike, of exponential noise that lasts some steps; one of them slower by a share of the mean."""
    drawn = np.random.default_rng(seed).exponential(1000, (n + lasts - 1, size))
    work = sum(drawn[i : i + n] for i in range(lasts)) / lasts + 2000
    work[:, 1] += slower * work.mean()
    return Simulated(work[:, None].astype(np.int64), np.full((n, 1), 100)).trace()


@pytest.mark.parametrize("n, size, lasts", [(80, 2, 1), (80, 16, 1), (400, 4, 5)])
def test_like_ranks_are_not_told_apart(n, size, lasts):
    """Defends: the slowest of some named though one must be, or as the mean of skewed noise is above its median."""
    found = [skewed([size, i], n, size, lasts=lasts) for i in range(40)]
    assert np.mean([noise.is_uneven for noise in found]) <= 0.1  # 0.005 to 0.055 of 200
    assert all(noise.beyond_others_s.estimate > 0 for noise in found), "picked as the largest"
    told = {steps_view.sentence(noise).rpartition("; ")[2] for noise in found if not noise.is_uneven}
    assert told == {"no rank was slower than like ranks are by chance"}


@pytest.mark.parametrize("size", [2, 4, 16])
def test_a_slower_rank_is_told_apart(size):
    found = [skewed([size, i], 400, size, slower=0.15) for i in range(5)]
    assert all(noise.is_uneven and noise.worst == 1 for noise in found)
    assert "rank 1 computed" in steps_view.sentence(found[0])


@pytest.mark.parametrize("slower, told", [(0.0, 1), (0.15, 2)])
def test_causes_of_a_rank_that_only_chance_picked_are_left_out(slower, told):
    """Defends: a rank named for nothing, in the second line or on the page."""
    trace = run_of_skewed([4, 3], 400, 4, slower)
    noise, why = step_noise(trace), late(trace, warm_up=0)
    assert len(steps_view.lines(noise, why)) == told
    assert (f"what rank {why.rank} lost" in steps_view.page(noise, why)) == (told == 2)


def test_what_one_rank_takes_longer_is_of_all_steps_of_it():
    """By hand: 50 steps of 1000 ns, rank 2 of 4 takes 200 longer in each."""
    work = np.full((50, 1, 4), 1000)
    work[:, 0, 2] += 200
    noise = step_noise(Simulated(work, np.full((50, 1), 100)).trace())
    assert noise.beyond_others_s.estimate == pytest.approx(50 * 200 * S)
    assert (noise.worst, noise.is_uneven) == (2, True)
    assert step_noise(Simulated(work[:, :, :1], np.full((50, 1), 100)).trace()).beyond_others_s is None
