"""spin on a GPU: the kernel of csrc/cuda/fixed_work.h, whose blocks stamp each round by the device's own timer.

One series for each multiprocessor that a block ran on.
"""

import math
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sigma_train.ranks import Ranks
from torch import Tensor

from sigma_noise import loops
from sigma_noise.cuda_cells import Ints, cells_within, counted, info_of
from sigma_noise.cuda_clock import PROBES, on_the_host
from sigma_noise.gpu import Gpu, Result
from sigma_noise.loops import Calibration
from sigma_noise.measure import FIXED_TIME, coarse, together
from sigma_noise.offset import Offset
from sigma_noise.plan import Plan
from sigma_noise.trace import Series

ROUNDS = 4096  # of a launch of fixed work
STAMPS_BYTES = 512 << 20  # of a launch of fixed time
STAMP_BYTES = 32
Cells = tuple[Ints, Ints, Ints]  # begins by the device's timer, counts, ns from the end to the next stamp


def name_of(processor: int) -> str:
    return f"spin_mp{processor:03d}"


def fixed_work(gpu: Gpu, kernel: str, plan: Plan, ranks: Ranks) -> Result:
    launch = Launch(gpu)
    steps, least_ns = 1, 0
    while least_ns < min(plan.quantum_s * 1e9, loops.LONG_ENOUGH_S * 1e9):
        steps *= 2
        stamps = launch(8, steps)
        least_ns = int((stamps[..., 1] - stamps[..., 0]).min())
    steps = max(1, round(steps * plan.quantum_s * 1e9 / least_ns))
    rounds = max(1, min(ROUNDS, math.ceil(plan.duration_s / plan.quantum_s)))
    for _ in range(math.ceil(plan.warm_up_s / plan.quantum_s / rounds)):
        launch(rounds, steps)
    together(ranks)
    offsets = [launch.offset()]
    of_processor: dict[int, list[Ints]] = defaultdict(list)
    for _ in range(math.ceil(plan.duration_s / plan.quantum_s / rounds)):
        for of_block in launch(rounds, steps):
            of_processor[int(of_block[0, 3])].append(of_block)
    offsets.append(launch.offset())
    rows = {}
    for processor, parts in sorted(of_processor.items()):
        stamps = np.concatenate(parts)
        stamps = stamps[np.argsort(stamps[:, 0], kind="stable")]
        start, end = (on_the_host(stamps[:, column], *offsets) for column in (0, 1))
        rows[name_of(processor)] = Series(start, end, np.ones(len(stamps)))
    about = {"mode": "fwq", "kernel": kernel, "steps": steps, **launch.about(plan, offsets)}
    return Result(rows, dict.fromkeys(rows, about))


def fixed_time(gpu: Gpu, kernel: str, plan: Plan, ranks: Ranks) -> Result:
    """Rounds in cells of a grid of the device's timer; cells that are not within one launch are left out.

    Between launches no round could end, however quiet the GPU is.
    """
    launch, quantum_ns = Launch(gpu), round(plan.quantum_s * 1e9)
    chunk = calibrated(launch, plan.quantum_s)
    quanta = math.ceil(plan.duration_s / plan.quantum_s)
    rounds = min(
        math.ceil((quanta + 2) * plan.quantum_s / chunk.quantum_s),
        max(1, STAMPS_BYTES // (STAMP_BYTES * gpu.processors)),
    )
    launch_s = rounds * chunk.quantum_s
    for _ in range(math.ceil(plan.warm_up_s / launch_s)):
        launch.on_device(rounds, chunk.steps)
    together(ranks)
    offsets = [launch.offset()]
    of_processor: dict[int, list[Cells]] = defaultdict(list)
    for _ in range(math.ceil(quanta / max(1, int(launch_s / plan.quantum_s) - 1))):
        for processor, cells in whole_cells(launch.on_device(rounds, chunk.steps), quantum_ns).items():
            of_processor[processor].append(cells)
    offsets.append(launch.offset())
    how = {"mode": "ftq", "kernel": kernel, **launch.about(plan, offsets)}
    rows, about = {}, {}
    for processor, parts in sorted(of_processor.items()):
        start, count, late_ns = (np.concatenate(part)[:quanta] for part in zip(*parts, strict=True))
        if not len(start):
            continue
        name = name_of(processor) + FIXED_TIME
        edges = (on_the_host(start + beyond, *offsets) for beyond in (0, quantum_ns))
        rows[name] = Series(*edges, count.astype(np.float64))
        left_out = int((start[-1] - start[0]) // quantum_ns) + 1 - len(start)
        about[name] = {**how, **asdict(info_of(chunk, count, late_ns)), "left_out": left_out}
    warnings = coarse(kernel + FIXED_TIME, chunk, plan.quantum_s)
    if not rows:
        warnings.append(
            f"{kernel}{FIXED_TIME}: no cell of {plan.quantum_s:g} s fits into a launch of {rounds} rounds"
        )
    return Result(rows, about, warnings)


def calibrated(launch: "Launch", quantum_s: float) -> Calibration:
    """A chunk, of which a quantum holds CHUNKS where nothing disturbs them: one step at least.

    A launch of so many rounds is timed, as a round may be shorter than the timer's step.
    """
    steps, span_ns = 1, 0.0
    while True:
        stamps = launch(loops.CHUNKS, steps)
        span_ns = float((stamps[:, -1, 1] - stamps[:, 0, 0]).min())
        if span_ns >= min(quantum_s, loops.LONG_ENOUGH_S) * 1e9:
            break
        steps *= 2
    wanted = max(1, round(steps * quantum_s * 1e9 / span_ns))
    return Calibration(wanted, span_ns * 1e-9 / loops.CHUNKS * wanted / steps)


def whole_cells(stamps: Tensor, quantum_ns: int) -> dict[int, Cells]:
    """By multiprocessor, those cells that lie within its block's rounds, of a launch's stamps [blocks, rounds, 4].

    Blocks that shared one count together, where all had rounds.
    """
    begins, lasts, processors = (
        part.cpu().numpy() for part in (stamps[:, 0, 0], stamps[:, -1, 1], stamps[:, 0, 3])
    )
    first, last = cells_within(int(begins.min()), int(lasts.max()), quantum_ns)
    counts, late_ns = counted(stamps[..., 1], first, last, quantum_ns)
    start = quantum_ns * np.arange(first, last)
    found = {}
    for processor in np.unique(processors):
        blocks = processors == processor
        is_whole = (start >= begins[blocks].max()) & (start + quantum_ns <= lasts[blocks].min())
        found[int(processor)] = (
            start[is_whole], counts[blocks].sum(axis=0)[is_whole], late_ns[blocks].min(axis=0)[is_whole],
        )  # fmt: skip
    return found


class Launch:
    """Rounds on every multiprocessor; what comes back is [blocks, rounds, 4]: begin, end, cycles, multiprocessor."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.seen = gpu, np.zeros(0, np.int64)

    def __call__(self, rounds: int, steps: int) -> NDArray[np.int64]:
        return self.on_device(rounds, steps).cpu().numpy()

    def on_device(self, rounds: int, steps: int) -> Tensor:
        gpu, native = self.gpu, self.gpu.native
        stamps = torch.zeros(gpu.processors, rounds, 4, dtype=torch.int64, device=gpu.device)
        sums = torch.zeros(gpu.processors, native.work_threads, device=gpu.device)
        native.run_arithmetic(gpu.processors, rounds, steps, stamps.data_ptr(), sums.data_ptr(), gpu.stream())
        gpu.synchronize()
        return stamps

    def offset(self) -> Offset:
        """What to add to the device's stamps to have the host's.

        Work of a launch lies between the host's readings before it and after it, which bounds the offset from both
        sides; the narrowest bounds of all launches.
        """
        low, high, seen = -(1 << 62), 1 << 62, [self.seen]
        for _ in range(PROBES):
            self.gpu.synchronize()
            before = loops.now_ns()
            stamps = self(1, 1)
            after = loops.now_ns()
            low = max(low, before - int(stamps[..., 0].min()))
            high = min(high, after - int(stamps[..., 1].max()))
            seen.append(stamps[..., :2].reshape(-1))
        self.seen = np.unique(np.concatenate(seen))
        return Offset(int(stamps[..., 1].max()), (low + high) // 2, (high - low + 1) // 2)

    def about(self, plan: Plan, offsets: list[Offset]) -> dict[str, Any]:
        """What the file says of every series."""
        told = [asdict(found) for found in offsets]
        return {
            "sizes": dict(plan.sizes.get("spin", {})),
            "offsets": told,
            "timer_step_ns": self.timer_step_ns(),
        }

    def timer_step_ns(self) -> int:
        """Of the device's timer: what all differences of its stamps are multiples of."""
        return int(np.gcd.reduce(np.diff(self.seen))) if len(self.seen) > 1 else 0
