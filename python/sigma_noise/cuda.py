"""The same plan on a GPU, CUDA or ROCm, one a rank.

gemm, copy and grouped are replays of one graph with an event between two of them, enqueued so far ahead that the
host is never waited for.  spin is the kernel of csrc/cuda/fixed_work.h, whose blocks stamp each round by the
device's own timer: one series for each multiprocessor that a block ran on.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sigma_train.errors import WrongInput
from sigma_train.ranks import Ranks
from torch import Tensor

import sigma_kernels as sk
from sigma_noise import host, loops
from sigma_noise.measure import Plan, agreed
from sigma_noise.trace import Series, Trace
from sigma_noise.watch import watching

BATCH = 256  # replays enqueued at once; two batches are, so that 256 lie between the host and a queue run dry
MOST_NODES = 4096  # of a graph
PROBES = 50  # launches by which the device's timer is set beside the host's clock
ROUNDS = 4096  # of a launch of spin
SIZES: dict[str, dict[str, int]] = {
    "spin": {},
    "copy": {"bytes": 1 << 28},
    "gemm": {"R": 4096, "N": 4096, "K": 4096},
    "grouped": {"R": 8192, "E": 96, "N": 1024, "K": 1024},
}

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
    if wrong := [mode for mode in plan.modes if mode != "fwq"]:
        raise WrongInput(f"--mode {wrong[0]} is of the CPU alone; --backend cuda measures fwq")
    if "a2a" in plan.kernels:
        raise WrongInput(
            "--kernel a2a is of the CPU alone; --backend cuda measures spin, copy, gemm and grouped"
        )
    if "spin" in plan.kernels and gpu.native is None:
        raise WrongInput(
            "--kernel spin: the CUDA kernels were not built here; pip install . -C cmake.define.SIGMA_CUDA=ON"
        )
    if plan.threads > 1 or plan.threshold_s is not None:
        option = "threads" if plan.threads > 1 else "threshold"
        raise WrongInput(f"--{option} is of the CPU alone; --backend cuda has no use for it")
    cpu = agreed(ranks, lambda: host.cpu_of(plan.pin))
    about: dict[str, Any] = host.described(loops.clock_cost(), cpu) | {"gpu": gpu.about, "warnings": []}
    rows, measured = {}, {}
    with host.pinned(cpu), host.without_gc(), watching(plan.attribute, plan.seed) as watch:
        for kernel in plan.kernels:
            of_kernel, how = (spin if kernel == "spin" else replayed)(gpu, kernel, plan)
            rows |= {(ranks.rank, "quantum", name): series for name, series in of_kernel.items()}
            measured[kernel] = {"mode": "fwq", "kernel": kernel} | how
            if how.get("dry_batches"):
                about["warnings"].append(
                    f"{kernel}: the GPU was through before the host had more, {how['dry_batches']} times; quanta "
                    "that begin there are the host's"
                )
    about["measured"] = measured
    trace = Trace({**asdict(plan), "ranks": ranks.size}, {ranks.rank: about}, rows)
    return watch.into(trace, ranks.rank) if watch else trace


def replayed(gpu: Gpu, kernel: str, plan: Plan) -> tuple[dict[str, Series], dict[str, Any]]:
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
    edges, dry = replays(gpu, replay, 0, plan.duration_s)
    series = Series(edges[:-1], edges[1:], np.ones(len(edges) - 1))
    return {kernel: series}, {"steps": steps, "sizes": sizes, "dry_batches": dry}


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


def spin(gpu: Gpu, kernel: str, plan: Plan) -> tuple[dict[str, Series], dict[str, Any]]:
    """Rounds of dependent arithmetic of one block for each multiprocessor, by number of multiprocessor."""
    sizes = sizes_of(kernel, plan)
    launch = Launch(gpu)
    offset_ns, residual_ns = launch.offset()
    steps, least_ns = 1, 0
    while least_ns < min(plan.quantum_s * 1e9, loops.LONG_ENOUGH_S * 1e9):
        steps *= 2
        stamps = launch(8, steps)
        least_ns = int((stamps[..., 1] - stamps[..., 0]).min())
    steps = max(1, round(steps * plan.quantum_s * 1e9 / least_ns))
    rounds = max(1, min(ROUNDS, math.ceil(plan.duration_s / plan.quantum_s)))
    launch(max(1, math.ceil(plan.warm_up_s / plan.quantum_s)), steps)
    found: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    for _ in range(math.ceil(plan.duration_s / plan.quantum_s / rounds)):
        for of_block in launch(rounds, steps):
            found[int(of_block[0, 3])].append(of_block)
    rows = {}
    for processor, parts in sorted(found.items()):
        stamps = np.concatenate(parts)
        stamps = stamps[np.argsort(stamps[:, 0], kind="stable")]
        start, end = stamps[:, 0] + offset_ns, stamps[:, 1] + offset_ns
        rows[f"spin_mp{processor:03d}"] = Series(start, end, np.ones(len(stamps)))
    how = {"steps": steps, "sizes": sizes, "offset_ns": offset_ns, "residual_ns": residual_ns}
    return rows, how | {"timer_step_ns": launch.timer_step_ns()}


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

    def offset(self) -> tuple[int, int]:
        """What to add to the device's stamps, and by how much it may be wrong.

        Work of a launch lies between the host's readings before it and after it, which bounds the offset from both
        sides; the narrowest bounds of all launches.
        """
        low, high, seen = -(1 << 62), 1 << 62, []
        for _ in range(PROBES):
            self.gpu.synchronize()
            before = loops.now_ns()
            stamps = self(1, 1)
            after = loops.now_ns()
            low = max(low, before - int(stamps[..., 0].min()))
            high = min(high, after - int(stamps[..., 1].max()))
            seen.append(stamps[..., :2].reshape(-1))
        self.seen = np.unique(np.concatenate(seen))
        return (low + high) // 2, (high - low + 1) // 2

    def timer_step_ns(self) -> int:
        """Of the device's timer: what all differences of its stamps are multiples of."""
        return int(np.gcd.reduce(np.diff(self.seen))) if len(self.seen) > 1 else 0


def sizes_of(kernel: str, plan: Plan) -> dict[str, int]:
    given = dict(plan.sizes.get(kernel, {}))
    if wrong := sorted(set(given) - set(SIZES[kernel])):
        raise WrongInput(
            f"--size {kernel}.{wrong[0]}: on a GPU it takes {', '.join(SIZES[kernel]) or 'no sizes'}"
        )
    return SIZES[kernel] | given


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


def _grouped(gpu: Gpu, sizes: dict[str, int], seed: int) -> Step:
    R, E, N, K = (sizes[name] for name in "RENK")
    counts = np.random.default_rng(seed).multinomial(R, np.full(E, 1 / E))
    offsets = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32).to(gpu.device)
    x, w = _normal(gpu, seed, R, K), _normal(gpu, seed + 1, E, N, K)
    return lambda: sk.grouped_gemm(x, w, offsets)


STEPS: dict[str, Callable[[Gpu, dict[str, int], int], Step]] = {
    "copy": _copy,
    "gemm": _gemm,
    "grouped": _grouped,
}
