"""gemm, copy and grouped on a GPU: replays of one graph with an event between two of them, enqueued so far ahead that
the host is never waited for.

Fixed work has a replay a quantum, fixed time counts replays in cells of a grid of the host's clock.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sigma_train.ranks import Ranks
from torch import Tensor

import sigma_kernels as sk
from sigma_noise import loops
from sigma_noise.cuda_cells import cells_within, counted, info_of
from sigma_noise.cuda_clock import EventClock
from sigma_noise.gpu import Gpu, Result, Step
from sigma_noise.loops import Calibration
from sigma_noise.measure import FIXED_TIME, coarse, together
from sigma_noise.plan import Plan
from sigma_noise.trace import Series
from sigma_noise.work import checked_sizes

BATCH = 256  # replays enqueued at once; two batches are, so that 256 lie between the host and a queue run dry
MOST_NODES = 4096  # of a graph
AHEAD = 2  # times as long as the host takes to enqueue it a chunk must be, or the queue would stay dry
LONG = 16  # times as long a graph must be for its steps to be timed by it: what lies between graphs is little of it


@dataclass(frozen=True)
class Replays:
    """Quantum i lies between edges i and i + 1, ns [n + 1]; `is_dry` [n]: of those enqueued when nothing else was."""

    edges_ns: NDArray[np.int64]
    is_dry: NDArray[np.bool_]
    enqueue_s: float  # what enqueuing one took at least

    @property
    def least_s(self) -> float:
        return max(1, int(np.diff(self.edges_ns).min())) * 1e-9


class Replayed:
    """A kernel as a graph of so many steps.  `about` has its sizes."""

    def __init__(self, gpu: Gpu, kernel: str, plan: Plan) -> None:
        sizes = sizes_of(kernel, plan)
        self.gpu, self.step, self.about = gpu, STEPS[kernel](gpu, sizes, plan.seed), {"sizes": sizes}
        if "E" in sizes:
            self.about["tokens_of_expert"] = tokens_of_expert(sizes, plan.seed).tolist()
        self.once = gpu.captured(self.step)
        self.enqueue_s, self.step_s = self._timed()

    def _timed(self) -> tuple[float, float]:
        """What enqueuing a graph of one step takes, and a step: short graphs would show the host's loop instead."""
        steps, first = 1, replays(self.gpu, self.once, 2 * BATCH, 0.0)
        found = first
        while found.least_s < min(LONG * found.enqueue_s, loops.LONG_ENOUGH_S) and steps < MOST_NODES:
            steps *= 2
            found = replays(self.gpu, self.graph(steps), 2 * BATCH, 0.0)
        return first.enqueue_s, found.least_s / steps

    def steps(self, seconds: float) -> int:
        """How many take that long where nothing disturbs them, 1 at least."""
        return min(MOST_NODES, max(1, round(seconds / self.step_s)))

    def steps_ahead(self, seconds: float) -> int:
        """As many, or more where the host takes too long to enqueue them: a graph of more steps takes it longer.

        Where it waits for the GPU whatever the graph, the queue stays dry, which the caller sees.
        """
        steps = self.steps(max(seconds, AHEAD * self.enqueue_s))
        while steps < MOST_NODES:
            found = replays(self.gpu, self.graph(steps), 2 * BATCH, 0.0)
            if found.least_s >= min(AHEAD * found.enqueue_s, loops.LONG_ENOUGH_S):
                break
            steps = min(MOST_NODES, 2 * steps)
        return steps

    def graph(self, steps: int) -> Callable[[], None]:
        def quantum() -> None:
            for _ in range(steps):
                self.step()

        return self.gpu.captured(quantum) if steps > 1 else self.once


def fixed_work(gpu: Gpu, kernel: str, plan: Plan, ranks: Ranks) -> Result:
    made = Replayed(gpu, kernel, plan)
    steps = made.steps(plan.quantum_s)
    replay = made.graph(steps)
    replays(gpu, replay, 0, plan.warm_up_s)
    together(ranks)
    found = replays(gpu, replay, 0, plan.duration_s)
    edges, dry = found.edges_ns, int(found.is_dry.sum())
    warnings = []
    if dry:
        warnings.append(
            f"{kernel}: the GPU was through before the host had more, {dry} times; quanta that begin there are the "
            "host's"
        )
    about = {"mode": "fwq", "kernel": kernel, "steps": steps, **made.about, "dry_quanta": dry}
    return Result({kernel: Series(edges[:-1], edges[1:], np.ones(len(edges) - 1))}, {kernel: about}, warnings)


def fixed_time(gpu: Gpu, kernel: str, plan: Plan, ranks: Ranks) -> Result:
    """Cells within which the GPU had nothing to do, as the host came too late, are left out."""
    name = kernel + FIXED_TIME
    made = Replayed(gpu, kernel, plan)
    steps = made.steps_ahead(plan.quantum_s / loops.CHUNKS)
    replay = made.graph(steps)
    chunk = Calibration(steps, replays(gpu, replay, 0, plan.warm_up_s).least_s)
    together(ranks)
    found = replays(gpu, replay, 0, plan.duration_s + 2 * plan.quantum_s)  # of the first and last a part
    series, late_ns, left_out = in_cells(
        found, round(plan.quantum_s * 1e9), math.ceil(plan.duration_s / plan.quantum_s)
    )
    warnings = coarse(name, chunk, plan.quantum_s)
    if left_out:
        warnings.append(
            f"{name}: {left_out} of {left_out + len(series)} cells were left out, as the GPU was through before the "
            "host had more"
        )
    info = asdict(info_of(chunk, series.value, late_ns))
    about = {"mode": "ftq", "kernel": kernel, **made.about, **info, "left_out": left_out}
    return Result({name: series}, {name: about}, warnings)


def in_cells(found: Replays, quantum_ns: int, most: int) -> tuple[Series, NDArray[np.int64], int]:
    """Replays that ended in each cell, ns from its end to the next edge, and how many cells were left out."""
    edges = found.edges_ns
    first, last = cells_within(int(edges[0]), int(edges[-1]), quantum_ns)
    last = min(last, first + most)
    (count,), (late_ns,) = counted(torch.from_numpy(edges)[None], first, last, quantum_ns)
    idle = np.flatnonzero(found.is_dry)
    begins, ends = (np.clip(edges[at] // quantum_ns - first, -1, last - first) for at in (idle, idle + 1))
    change = np.zeros(last - first + 2, np.int64)  # of how many idle stretches touch a cell
    np.add.at(change, np.maximum(begins, 0), 1)
    np.add.at(change, ends + 1, -1)
    is_kept = np.cumsum(change)[: last - first] == 0
    start = quantum_ns * (first + np.flatnonzero(is_kept))
    series = Series(start, start + quantum_ns, count[is_kept].astype(np.float64))
    return series, late_ns[is_kept], int((~is_kept).sum())


def replays(gpu: Gpu, replay: Callable[[], None], at_least: int, duration_s: float) -> Replays:
    """So many, and for so long.

    What lies between events is set beside the host's clock at the first one, which had been reached a moment before, so
    that all stamps of a series are late alike.  The first batch, which the host may be late for, is left out.
    """
    pool = [[gpu.event() for _ in range(BATCH)] for _ in range(3)]  # the last but one is still to be read
    clock = EventClock(gpu)
    gpu.synchronize()
    begin_ns = loops.now_ns()
    edges, is_dry, enqueue_s = [begin_ns], [], math.inf
    deadline_ns = begin_ns + round(duration_s * 1e9)
    queue: list[list[Any]] = []
    turn, last = 0, clock.last
    goes_on = True
    while queue or goes_on:
        goes_on = turn < 3 or len(edges) < at_least or edges[-1] < deadline_ns
        if goes_on:
            batch, began_ns = pool[turn % 3], loops.now_ns()
            for event in batch:
                replay()
                is_dry.append(last.query())  # enqueuing takes time in which the GPU may be through
                event.record()
                last = event
            enqueue_s = min(enqueue_s, (loops.now_ns() - began_ns) * 1e-9 / BATCH)
            queue.append(batch)
            turn += 1
        if len(queue) > 1 or (queue and not goes_on):
            done = queue.pop(0)
            done[-1].synchronize()
            edges.extend(begin_ns + clock.read(event) for event in done)
    return Replays(np.array(edges[BATCH:], np.int64), np.array(is_dry[BATCH:], bool), enqueue_s)


def sizes_of(kernel: str, plan: Plan) -> dict[str, int]:
    return checked_sizes(kernel, plan.sizes.get(kernel, {}), "cuda")


def _normal(gpu: Gpu, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(gpu.device, torch.bfloat16)


def _copy(gpu: Gpu, sizes: dict[str, int], seed: int) -> Step:
    source = _normal(gpu, seed, max(1, sizes["bytes"] // 2))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _gemm(gpu: Gpu, sizes: dict[str, int], seed: int) -> Step:
    x, w = _normal(gpu, seed, sizes["R"], sizes["K"]), _normal(gpu, seed + 1, sizes["K"], sizes["N"])
    y = torch.empty(sizes["R"], sizes["N"], dtype=x.dtype, device=gpu.device)
    return lambda: torch.mm(x, w, out=y)


def tokens_of_expert(sizes: dict[str, int], seed: int) -> NDArray[np.int64]:
    E = sizes["E"]
    return np.random.default_rng(seed).multinomial(sizes["R"], np.full(E, 1 / E))


def _grouped(gpu: Gpu, sizes: dict[str, int], seed: int) -> Step:
    R, E, N, K = (sizes[name] for name in "RENK")
    offsets = torch.tensor([0, *np.cumsum(tokens_of_expert(sizes, seed))], dtype=torch.int32).to(gpu.device)
    x, w = _normal(gpu, seed, R, K), _normal(gpu, seed + 1, E, N, K)
    return lambda: sk.grouped_gemm(x, w, offsets)


STEPS: dict[str, Callable[[Gpu, dict[str, int], int], Step]] = {
    "copy": _copy,
    "gemm": _gemm,
    "grouped": _grouped,
}
