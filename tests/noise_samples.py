"""Small files in the shape of other tools', made for these tests, closed forms, and traces for hypothesis."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy.special import digamma, gammaln, poch, polygamma
from sigma_noise.expected_max import gap_sum
from sigma_noise.formats.rank_detours import facts
from sigma_noise.trace import Key, Series, Trace, rank_file

MS = 1_000_000

TRACER = """\
# tracer: osnoise
#
#                                _-----=> irqs-off
#                               / _----=> need-resched                              MAX
#           TASK-PID      CPU# ||||   TIMESTAMP    IN US       IN US  AVAILABLE  IN US     HW    NMI    IRQ   SIRQ THREAD
       osnoise/8-961     [008] d.h.  5789.857532: irq_noise: local_timer:236 start 5789.857529929 duration 1845 ns
       osnoise/8-961     [008] dNh.  5789.858408: irq_noise: local_timer:236 start 5789.858404871 duration 2848 ns
     migration/8-54      [008] d...  5789.858413: thread_noise: migration/8:54 start 5789.858409300 duration 3068 ns
       osnoise/8-961     [008] ....  5789.858413: sample_threshold: start 5789.858404555 duration 8812 ns interferences 2
 CPU:8 [LOST 17 EVENTS]
   kworker/9:1-x:2-77    [009] d.s3. 5789.900001: softirq_noise:    SCHED:7 start 5789.899990000 duration 992 ns
   kworker/9:1-x:2-77    (   77) [009] d..3. 5789.900003: thread_noise: Web Content:q:77 start 5789.899980000 duration 9 ns
            <idle>-0     [009] dNh2. 5789.900008: nmi_noise: start 5789.900000000 duration 512 ns
            <idle>-0     [009] dNh2. 5789.900009: sched_switch: prev_comm=osnoise_noise prev_pid=1
 => osnoise_stack
       osnoise/9-962     [009] 5789.900020: sample_threshold: start 5789.900001000 duration 7000 ns interference 0
       osnoise/8-961     [008] ....  5790.000001: 1000000        190  99.98100       9     18      0   1007     18      1
       osnoise/8-961     [008] ....  5791.000001: 1000000        656  99.93440      74     23      0   1006     16      3
"""  # noqa: E501

TOP = """\
                                          Operating System Noise
duration:   0 00:01:00 | time is in us
CPU Period       Runtime        Noise  % CPU Aval   Max Noise   Max Single          HW          NMI          IRQ      Softirq       Thread
  0 #59         53100000       304896    99.42580        6978           56         549            0        53111         1590           13
  3 #59         53100000       204935    99.61405        6251           33         290            0        53156         1460           12
"""  # noqa: E501

HIST = """\
# RTLA osnoise histogram
# Time unit is microseconds (us)
# Duration:   0 00:01:00
Index   CPU-000   CPU-011
0         42982     52377
10        12224      2413
20            8        39
over:         1         0
count:    55215     54829
min:          0         0
avg:       2.21      0.44
max:        312        20
"""

NETGAUGE = """\
# Benchmark Method: selfish
# Compute-Cycle Duration: 100 usec
# Number of Cycles/Detours: 8
# Selfish Benchmark
# Minimal cycle length [ns]: 24.500000 
# Number of iterations (recorded+unrecorded): 41242110 
# Threshold: [% minimal cycle length]: 900 
# 
# Time [ns]\tselfish duration [ns]
0.00\t1211.43
999871.43\t1402.86
2000004.29\t351.50
# CPU overhead due to noise: 0.13%
# Measurement period: 0.00 s
"""  # noqa: W291


def kineto(**changed: Any) -> dict[str, Any]:
    """A trace of rank 3 of a GPU job as torch.profiler writes it, with two steps."""
    step = {"ph": "X", "cat": "user_annotation", "pid": 17, "tid": 17}
    gpu = {"ph": "X", "cat": "kernel", "pid": 0, "tid": 7, "args": {"stream": 7, "device": 0}}
    events = [
        {"ph": "M", "name": "process_name", "pid": 17, "tid": 0, "ts": 1.5, "args": {"name": "python"}},
        {**step, "name": "ProfilerStep#2", "ts": 4855857390010.125, "dur": 2000.5},
        {**step, "name": "ProfilerStep#1", "ts": 4855857388000.001, "dur": 2010.0},
        {**step, "cat": "gpu_user_annotation", "name": "ProfilerStep#1", "ts": 4855857388001.5, "dur": 1900},
        {**step, "cat": "gpu_user_annotation", "name": "forward", "ts": 4855857388101.0, "dur": 499.0},
        {**step, "name": "forward", "ts": 4855857388100.25, "dur": 500.0},
        {**step, "name": "nccl:all_reduce", "ts": 4855857388700.0, "dur": 12.25},
        {**step, "cat": "cpu_op", "name": "aten::mm", "ts": 4855857388110.0, "dur": 33.0},
        {
            **gpu,
            "name": "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)",
            "ts": 4855857388710.0,
            "dur": 90.5,
        },
        {**gpu, "name": "sm80_xmma_gemm_f32f32", "ts": 4855857388200.0, "dur": 45.015},
        {**gpu, "name": "sm80_xmma_gemm_f32f32", "ts": 4855857388190.0, "dur": 5},
        {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 4855857398407.838},
    ]
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "GPU", "totalGlobalMem": 85899345920}],
        "distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 8},
        "host_name": "node7",
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 1790857026000000000,
        "traceEvents": events,
        "traceName": "trace.json",
    } | changed


def bernoulli_slowdown(work: float, detour: float, chance: float, ranks: Any) -> Any:
    """S(N) = (T + d (1 - (1 - p)^N)) / (T + d p) of windows of T that a detour of d lengthens with chance p."""
    hit = -np.expm1(np.asarray(ranks, np.float64) * np.log1p(-chance))
    return (work + detour * hit) / (work + detour * chance)


def pareto_max(shape: float, scale: float, ranks: Any) -> Any:
    """E[max_N] of the generalised Pareto distribution: scale/xi (N B(N, 1 - xi) - 1), for a shape xi < 1.

    Near xi = 0 the first two terms of its series, H_N + xi/2 (H_N^2 + sum 1/k^2): the closed form cancels there.
    """
    N = np.asarray(ranks, np.float64)
    if abs(shape) < 1e-4:
        H = digamma(N + 1) + np.euler_gamma
        return scale * (H + shape / 2 * (H**2 + np.pi**2 / 6 - polygamma(1, N + 1)))
    grown = np.log(poch(N + 1 - shape, shape)) + gammaln(1 - shape)  # log of N B(N, 1 - xi)
    return scale / shape * np.expm1(grown)


def sample_max(ordered: Any, ranks: Any, counts: Any = None) -> Any:
    """E[max_N] of the empirical cdf of a sample in order, each drawn `counts` times."""
    x = np.asarray(ordered, np.float64)
    drawn = np.ones(x.size) if counts is None else np.asarray(counts, np.float64)
    return gap_sum(x, np.cumsum(drawn), np.asarray(ranks, np.float64))


def spun(rng: np.random.Generator, n: int) -> Series:
    """Of 1 ms, and 1.1 ms from the middle on; 9 ms more in 1 % of them."""
    took = MS * (1 + 0.01 * rng.exponential(size=n))
    took[n // 2 :] *= 1.1
    took[rng.random(n) < 0.01] += 9 * MS
    end = np.cumsum(np.rint(took).astype(np.int64))
    return Series(end - np.rint(took).astype(np.int64), end, np.ones(n))


def everything(ranks: int) -> Trace:
    """Fixed work and fixed time, an idle loop, collectives of all ranks, and counters that tell causes."""
    rng = np.random.default_rng(1)
    rows: dict[Key, Series] = {}
    local = (10 * MS + rng.exponential(MS, (ranks, 1500))).astype(np.int64)
    end = np.cumsum(local.max(axis=0) + 2 * MS)
    begin = np.append(0, end[:-1])
    arrival = begin + local
    strikes = 50 * MS * np.arange(60)
    loop = Series(strikes, strikes + 9000, np.full(60, 8.95e-6))
    for rank in range(ranks):
        spin = spun(rng, 4000)
        begins = MS * np.arange(600)
        read_ns = spin.end_ns[99::100]
        rows |= {
            (rank, "quantum", "spin"): spin,
            (rank, "quantum", "spin_ftq"): Series(begins, begins + MS, 1000.0 - rng.poisson(5, 600)),
            (rank, "quantum", "a2a"): Series(arrival[rank], end, np.ones(1500)),
            (rank, "quantum", "a2a_local"): Series(begin, arrival[rank], np.ones(1500)),
            (rank, "event", "detour"): loop,
            (rank, "counter", "run_delay_ns"): Series(read_ns, read_ns, 5e6 * np.arange(40)),
            (rank, "counter", "on_cpu_ns"): Series(read_ns, read_ns, 1e8 * np.arange(40)),
            (rank, "counter", "cpu_khz"): Series(read_ns, read_ns, np.full(40, 2.4e6)),
        }
    about = {
        "host": "a",
        "sampler": {"period_s": 0.1, "unread": {"steal_ns": "no such file"}},
        "measured": {"detour": facts((0, 3000 * MS), loop, 1e-6, 50e-9), "spin_ftq": {"mode": "ftq"}},
        "warnings": ["the clock is slow"],
    }
    run = {"kernels": ["spin", "a2a"], "quantum_s": 1e-3}
    return Trace(run, dict.fromkeys(range(ranks), about), rows)


def written(path: Path, content: str | bytes | dict | list) -> Path:
    if isinstance(content, dict | list):
        content = json.dumps(content, indent=1)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


STAMP = st.integers(-(2**61), 2**61)
LENGTH = st.integers(0, 2**40)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def series(draw: st.DrawFn, values: st.SearchStrategy[float], is_counter: bool) -> Series:
    start = sorted(draw(st.lists(STAMP, min_size=1, max_size=12)))
    took = [0 if is_counter else draw(LENGTH) for _ in start]
    starts = np.array(start, np.int64)
    return Series(
        starts, starts + np.array(took, np.int64), np.array([draw(values) for _ in start], np.float64)
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Of any names and any stamps of 62 bits, with rows that begin together and overlap; values but infinities."""
    values = st.floats(allow_infinity=False)
    keys = st.tuples(st.integers(0, 5), st.sampled_from(["quantum", "counter", "event"]), NAME)
    rows = {key: draw(series(values, key[1] == "counter")) for key in draw(st.sets(keys, max_size=6))}
    ranks = {
        rank: {"host": draw(NAME), "clock": "CLOCK_MONOTONIC"} for rank in {key[0] for key in rows} | {1}
    }
    return Trace({"seed": draw(st.integers()), "asked": draw(NAME)}, dict(sorted(ranks.items())), rows)


def same(a: Series, b: Series) -> bool:
    """Bit for bit, but that one NaN is like another."""
    stamps = all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("start_ns", "end_ns"))
    return stamps and np.array_equal(a.value, b.value, equal_nan=True)


def write(trace: Trace, folder: Path) -> None:
    """A file a rank, as a run leaves them."""
    folder.mkdir(parents=True)
    for rank in trace.ranks:
        rows = {key: s for key, s in trace.rows.items() if key[0] == rank}
        Trace(trace.run, {rank: trace.ranks[rank]}, rows).write(rank_file(folder, rank))
