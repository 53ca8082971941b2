"""The same plan on a GPU, CUDA or ROCm, one a rank.

gemm, copy and grouped are replays of one graph with an event between two of them, enqueued so far ahead that the
host is never waited for.  spin is the kernel of csrc/cuda/fixed_work.h, whose blocks stamp each round by the
device's own timer: one series for each multiprocessor that a block ran on.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sigma_train.errors import WrongInput
from sigma_train.ranks import Ranks
from torch import Tensor

import sigma_kernels as sk
from sigma_noise import host, loops
from sigma_noise.measure import agreed, together
from sigma_noise.offset import Offset, offset
from sigma_noise.plan import Plan
from sigma_noise.trace import Key, Series, Trace
from sigma_noise.watch import watching
from sigma_noise.work import checked_sizes

BATCH = 256  # replays enqueued at once; two batches are, so that 256 lie between the host and a queue run dry
MOST_NODES = 4096  # of a graph
PROBES = 50  # launches by which the device's timer is set beside the host's clock
ROUNDS = 4096  # of a launch of spin
Step = Callable[[], object]


@dataclass(frozen=True)
class Gpu:
    """What is asked of torch and of our kernels; a test has another."""

    device: torch.device
    about: dict[str, Any]
    processors: int
    event: Callable[[], Any]
    captured: Callable[[Step], Callable[[], None]]  # what replays it
    synchronize: Callable[[], None]
    stream: Callable[[], int]
    native: Any  # sigma_kernels._C.cuda, or None where it was not built


def found() -> Gpu:
    """This rank's.  Raises: WrongInput where torch sees none."""
    if not torch.cuda.is_available():
        raise WrongInput(f"--backend cuda: torch {torch.__version__} sees no GPU here")
    device = torch.device("cuda", host.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    about = {"name": properties.name, "cuda": torch.version.cuda, "hip": torch.version.hip}
    return Gpu(
        device=device,
        about=about | {"processors": properties.multi_processor_count},
        processors=properties.multi_processor_count,
        event=lambda: torch.cuda.Event(enable_timing=True),
        captured=_captured,
        synchronize=torch.cuda.synchronize,
        stream=lambda: torch.cuda.current_stream().cuda_stream,
        native=getattr(sk._C, "cuda", None),
    )


def _captured(step: Step) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call allocates and compiles cannot be captured
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(plan: Plan, ranks: Ranks, gpu: Gpu | None = None) -> Trace:
    """The trace of this rank.  Raises: WrongInput for what is measured on a CPU alone, or without a GPU."""
    gpu = gpu or found()
    plan.check(ranks.size)
    if "spin" in plan.kernels and gpu.native is None:
        raise WrongInput(
            "--kernel spin: the CUDA kernels were not built here; pip install . -C cmake.define.SIGMA_CUDA=ON"
        )
    cpu = agreed(ranks, lambda: host.cpu_of(plan.pin))
    rows: dict[Key, Series] = {}
    measured: dict[str, Any] = {}
    warnings = []
    with host.pinned(cpu), host.without_gc(), watching(plan.attribute, plan.seed) as watch:
        about = host.described(loops.clock_cost(), cpu)
        offsets = [offset(ranks, about["clock"]["identity"])]
        for kernel in plan.kernels:
            run = spin if kernel == "spin" else replayed
            of_kernel, how = run(gpu, kernel, plan, partial(together, ranks))
            rows |= {(ranks.rank, "quantum", name): series for name, series in of_kernel.items()}
            measured |= {name: {"mode": "fwq", "kernel": kernel, **how} for name in of_kernel}
            if how.get("dry_batches"):
                warnings.append(
                    f"{kernel}: the GPU was through before the host had more, {how['dry_batches']} times; quanta "
                    "that begin there are the host's"
                )
        offsets.append(offset(ranks, about["clock"]["identity"]))
    about["clock"]["offsets"] = [asdict(found) for found in offsets]  # before and after
    about |= {"gpu": gpu.about, "measured": measured, "warnings": warnings}
    trace = Trace({**asdict(plan), "ranks": ranks.size}, {ranks.rank: about}, rows)
    return watch.into(trace, ranks.rank) if watch else trace


def replayed(
    gpu: Gpu, kernel: str, plan: Plan, begin: Callable[[], None]
) -> tuple[dict[str, Series], dict[str, Any]]:
    """`begin` returns when all ranks have warmed up."""
    sizes = sizes_of(kernel, plan)
    step = STEPS[kernel](gpu, sizes, plan.seed)
    once = gpu.captured(step)
    edges, _ = replays(gpu, once, 2 * BATCH, 0.0)
    steps = min(MOST_NODES, max(1, round(plan.quantum_s * 1e9 / max(1, int(np.diff(edges).min())))))

    def quantum() -> None:
        for _ in range(steps):
            step()

    replay = gpu.captured(quantum) if steps > 1 else once
    replays(gpu, replay, 0, plan.warm_up_s)
    begin()
    edges, dry = replays(gpu, replay, 0, plan.duration_s)
    series = Series(edges[:-1], edges[1:], np.ones(len(edges) - 1))
    how = {"steps": steps, "sizes": sizes, "dry_batches": dry}
    if "E" in sizes:
        how["tokens_of_expert"] = tokens_of_expert(sizes, plan.seed).tolist()
    return {kernel: series}, how


def replays(
    gpu: Gpu, replay: Callable[[], None], at_least: int, duration_s: float
) -> tuple[NDArray[np.int64], int]:
    """Edges of quanta, [n + 1], and how often the queue had run dry before more was enqueued.

    Events tell only what lies between two of them: their sum is set beside the host's clock at the first one, which
    had been reached a moment before, so that all stamps of a series are late alike.  The first batch, which the
    host may be late for, is left out.
    """
    pool = [[gpu.event() for _ in range(BATCH)] for _ in range(3)]  # the last but one is still to be read
    before = gpu.event()
    before.record()
    gpu.synchronize()
    edges = [loops.now_ns()]
    deadline_ns = edges[0] + round(duration_s * 1e9)
    queue: list[list[Any]] = []
    turn = dry = 0
    goes_on = True
    while queue or goes_on:
        goes_on = turn < 3 or len(edges) < at_least or edges[-1] < deadline_ns
        if goes_on:
            dry += bool(queue) and queue[-1][-1].query()
            batch = pool[turn % 3]
            for event in batch:
                replay()
                event.record()
            queue.append(batch)
            turn += 1
        if len(queue) > 1 or (queue and not goes_on):
            done = queue.pop(0)
            done[-1].synchronize()
            for event in done:
                edges.append(edges[-1] + round(before.elapsed_time(event) * 1e6))
                before = event
    return np.array(edges[BATCH:], np.int64), dry


def spin(
    gpu: Gpu, kernel: str, plan: Plan, begin: Callable[[], None]
) -> tuple[dict[str, Series], dict[str, Any]]:
    """Rounds of dependent arithmetic of one block for each multiprocessor, by number of multiprocessor."""
    sizes = sizes_of(kernel, plan)
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
    begin()
    offsets = [launch.offset()]
    of_processor: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    for _ in range(math.ceil(plan.duration_s / plan.quantum_s / rounds)):
        for of_block in launch(rounds, steps):
            of_processor[int(of_block[0, 3])].append(of_block)
    offsets.append(launch.offset())
    rows = {}
    for processor, parts in sorted(of_processor.items()):
        stamps = np.concatenate(parts)
        stamps = stamps[np.argsort(stamps[:, 0], kind="stable")]
        start, end = (on_the_host(stamps[:, column], *offsets) for column in (0, 1))
        rows[f"spin_mp{processor:03d}"] = Series(start, end, np.ones(len(stamps)))
    how = {"steps": steps, "sizes": sizes, "offsets": [asdict(found) for found in offsets]}
    return rows, how | {"timer_step_ns": launch.timer_step_ns()}


def on_the_host(stamps_ns: NDArray[np.int64], before: Offset, after: Offset) -> NDArray[np.int64]:
    """The device's stamps by the host's clock: the two drift apart, evenly between two offsets."""
    drift = (after.offset_ns - before.offset_ns) / (after.at_ns - before.at_ns)
    moved = np.round(drift * (stamps_ns - before.at_ns)).astype(np.int64)
    return stamps_ns + before.offset_ns + moved


class Launch:
    """Rounds on every multiprocessor; what comes back is [blocks, rounds, 4]: begin, end, cycles, multiprocessor."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.seen = gpu, np.zeros(0, np.int64)

    def __call__(self, rounds: int, steps: int) -> NDArray[np.int64]:
        gpu, native = self.gpu, self.gpu.native
        stamps = torch.zeros(gpu.processors, rounds, 4, dtype=torch.int64, device=gpu.device)
        sums = torch.zeros(gpu.processors, native.work_threads, device=gpu.device)
        native.run_arithmetic(gpu.processors, rounds, steps, stamps.data_ptr(), sums.data_ptr(), gpu.stream())
        gpu.synchronize()
        return stamps.cpu().numpy()

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

    def timer_step_ns(self) -> int:
        """Of the device's timer: what all differences of its stamps are multiples of."""
        return int(np.gcd.reduce(np.diff(self.seen))) if len(self.seen) > 1 else 0


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
