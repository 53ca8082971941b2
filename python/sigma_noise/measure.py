"""A plan becomes a trace: each kernel in each mode, on every rank at once, after a warm-up that is not stored."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch.distributed as dist
from sigma_train.errors import Failure, WrongInput
from sigma_train.ranks import Ranks

from sigma_noise import host, loops
from sigma_noise.a2a import AllToAll
from sigma_noise.offset import offset
from sigma_noise.trace import Key, Series, Trace
from sigma_noise.watch import watching
from sigma_noise.work import KERNELS, Work, checked_sizes, work

FIXED_TIME = "_ftq"  # at the end of a name: quanta of fixed time
MODES = ("fwq", "ftq", "detours")
A2A_BYTES = 64 << 10  # from each rank to each
LEAST_THRESHOLD_S = 1e-6
THRESHOLD_GAPS = 9  # times the least gap, as netgauge has it
TIMER_SHARE = 100  # quanta shorter than so many readings of the clock measure the clock
WARM_UP_QUANTA = 256
WITH_THREADS = ("gemm", "grouped")
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What is asked for; every field goes into the file.

    kernels:     of spin, copy, gemm, grouped and a2a, each measured for `duration_s` in each of `modes`
    modes:       fwq, fixed work; ftq, fixed time; detours, gaps of a loop that does nothing, once for all kernels
    threshold_s: of detours; none: the greater of 1 us and 9 times what a reading of the clock costs
    pin:         CPUs that the ranks of a host take in turn; none: wherever the scheduler puts them
    threads:     of gemm and grouped
    sizes:       by kernel, see `sigma_noise.work`; of a2a: bytes
    attribute:   counters of the thread, its host and its accelerators are kept beside the quanta
    """

    kernels: tuple[str, ...] = ("spin",)
    modes: tuple[str, ...] = ("fwq", "detours")
    quantum_s: float = 1e-3
    duration_s: float = 10.0
    warm_up_s: float = 1.0
    threshold_s: float | None = None
    seed: int = 0
    pin: tuple[int, ...] = ()
    threads: int = 1
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    backend: str = "cpu"
    attribute: bool = False

    def check(self, ranks: int) -> None:
        """Raises: WrongInput, by the name of the option."""
        known = (*KERNELS, "a2a")
        for option, given, names in (("kernel", self.kernels, known), ("mode", self.modes, MODES)):
            if wrong := [name for name in given if name not in names]:
                raise WrongInput(f"--{option} must be of {', '.join(names)}, found {wrong[0]!r}")
            if not given or len(set(given)) < len(given):
                raise WrongInput(f"--{option} wants different names, found {','.join(given) or 'none'}")
        if wrong := [name for name in self.sizes if name not in self.kernels]:
            raise WrongInput(f"--size {wrong[0]}: no such kernel is measured, of {', '.join(self.kernels)}")
        if "a2a" in self.kernels and ranks < 2:
            raise WrongInput("--kernel a2a wants at least 2 ranks, found 1; --nproc 2 starts them")
        if "a2a" in self.kernels and "fwq" not in self.modes:
            raise WrongInput(
                f"--kernel a2a is fixed work: --mode must have fwq, found {','.join(self.modes)}"
            )
        if self.seed < 0:
            raise WrongInput(f"--seed must be at least 0, found {self.seed}")
        if not 0 <= self.warm_up_s < float("inf"):
            raise WrongInput(f"--warm-up must be seconds of at least 0, found {self.warm_up_s}")
        if self.pin and self.threads > 1:
            raise WrongInput(
                f"--threads {self.threads} would share the one CPU of --pin; leave one of them out"
            )
        if unknown := set(self.sizes.get("a2a", {})) - {"bytes"}:
            raise WrongInput(f"--size a2a.{min(unknown)}: a2a takes bytes")
        try:
            loops.check_quanta(self.quantum_s, self.duration_s)
            for kernel in set(self.kernels) - {"a2a"}:
                checked_sizes(kernel, self.sizes.get(kernel, {}))
        except ValueError as error:
            raise WrongInput(as_options(error)) from None


def measure(plan: Plan, ranks: Ranks) -> Trace:
    """The trace of this rank; a collective.  Raises: WrongInput, Failure."""
    plan.check(ranks.size)
    cpu = agreed(ranks, lambda: host.cpu_of(plan.pin))
    with host.pinned(cpu), host.without_gc(), watching(plan.attribute, plan.seed) as watch:
        trace = Measuring(plan, ranks).all(cpu)
    return watch.into(trace, ranks.rank) if watch else trace


def agreed(ranks: Ranks, function: Callable[[], T]) -> T:
    """What it returns; a collective.  Raises: WrongInput on every rank where it is a ValueError on any."""
    found, wrong = None, ""
    try:
        found = function()
    except ValueError as error:
        wrong = as_options(error)
    for rank, sentence in enumerate(ranks.gathered(wrong)):
        if sentence:
            raise WrongInput(f"rank {rank}: {sentence}" if ranks.size > 1 else sentence)
    return cast(T, found)


def as_options(error: ValueError) -> str:
    """What a function says of its arguments, of the options they came by."""
    text = str(error)
    for argument, option in (("quantum_s", "--quantum"), ("duration_s", "--duration"), ("pin", "--pin")):
        text = re.sub(rf"^{argument}\b", option, text)
    return text if text.startswith("--") else f"--size: {text}"


class Measuring:
    """One rank's part, as it grows."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan, self.ranks = plan, ranks
        self.rows: dict[Key, Series] = {}
        self.measured: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []

    def all(self, cpu: int | None) -> Trace:
        cost = loops.clock_cost()
        about = host.described(cost, cpu)
        clock = about["clock"]
        if clock["source"] not in (None, *host.FAST_CLOCKS):
            self.warn(f"the clock source is {clock['source']}, which is slow to read; tsc would disturb less")
        if self.plan.quantum_s < TIMER_SHARE * cost.median_s:
            self.warn(
                f"a quantum of {self.plan.quantum_s:g} s is less than {TIMER_SHARE} readings of the clock "
                f"({cost.median_s:g} s each); take {TIMER_SHARE * cost.median_s:.1g} s or more"
            )
        offsets = [offset(self.ranks, clock["identity"])]
        for kernel in self.plan.kernels:
            if kernel == "a2a":
                self.all_to_all()
            else:
                self.kernel(kernel)
        if "detours" in self.plan.modes:
            self.detours(cost)
        offsets.append(offset(self.ranks, clock["identity"]))
        clock["offsets"] = [asdict(found) for found in offsets]  # before and after
        about |= {"measured": self.measured, "warnings": self.warnings}
        run = {**asdict(self.plan), "ranks": self.ranks.size}
        return Trace(run, {self.ranks.rank: about}, self.rows)

    def kernel(self, kernel: str) -> None:
        """Fixed work under the kernel's name, fixed time under its name and _ftq."""
        plan = self.plan
        made = self.made(kernel)
        if "fwq" in plan.modes:
            calibrated = self.calibrated(made, partial(loops.calibrate, made, plan.quantum_s))
            try:
                series = loops.run_fixed_work(made, quantum_s=plan.quantum_s, duration_s=plan.duration_s)
            except RuntimeError as error:
                raise Failure(str(error)) from None
            self.keep(kernel, series, made, "fwq", asdict(calibrated))
        if "ftq" in plan.modes:
            chunk_s = plan.quantum_s / loops.CHUNKS
            chunk = self.calibrated(made, partial(loops.calibrate, made, chunk_s, is_least=False))
            series, info = loops.run_fixed_time(made, chunk, plan.quantum_s, plan.duration_s)
            self.keep(kernel + FIXED_TIME, series, made, "ftq", asdict(info))
            chunks = plan.quantum_s / max(chunk.quantum_s, 1e-9)
            if chunks < 0.9 * loops.CHUNKS:
                self.warn(
                    f"{kernel}{FIXED_TIME}: a step of {chunk.quantum_s:.2g} s fits only {chunks:.0f} times into a "
                    f"quantum; {loops.CHUNKS * chunk.quantum_s:.1g} s would hold {loops.CHUNKS}"
                )

    def all_to_all(self) -> None:
        """Local quanta of spin under a2a_local, collectives under a2a from arrival to end."""
        plan = self.plan
        num_bytes = plan.sizes.get("a2a", {}).get("bytes", A2A_BYTES)
        made = self.made("spin")
        calibrated = self.calibrated(made, partial(loops.calibrate, made, plan.quantum_s))
        exchange = AllToAll(self.ranks, made, num_bytes, plan.seed)
        local, collective = exchange.measure(plan.duration_s, plan.warm_up_s)
        self.keep("a2a_local", local, made, "fwq", asdict(calibrated))
        self.rows[self.ranks.rank, "quantum", "a2a"] = collective
        self.measured["a2a"] = {"mode": "collective", "bytes": num_bytes, "backend": dist.get_backend()}

    def detours(self, cost: loops.ClockCost) -> None:
        """Events named detour, whose value is seconds above the least gap."""
        threshold_s = self.plan.threshold_s
        if threshold_s is None:
            threshold_s = max(LEAST_THRESHOLD_S, THRESHOLD_GAPS * cost.least_s)
        self.together()
        series, info = loops.detours(duration_s=self.plan.duration_s, threshold_s=threshold_s)
        self.rows[self.ranks.rank, "event", "detour"] = series
        self.measured["detour"] = {"mode": "detours", **asdict(info)}
        if info.lost:
            self.warn(f"{info.lost} of {info.found} detours were more than the ring holds; raise --threshold")

    def made(self, kernel: str) -> Work:
        sizes = dict(self.plan.sizes.get(kernel, {}))
        if kernel in WITH_THREADS:
            sizes.setdefault("threads", self.plan.threads)
        return work(kernel, seed=self.plan.seed, **sizes)

    def calibrated(self, made: Work, calibrate: Callable[[], loops.Calibration]) -> loops.Calibration:
        """Once to warm up, as long as asked, and again when warm; all ranks then begin together."""

        def warm() -> loops.Calibration:
            calibrate()
            deadline_ns = loops.now_ns() + round(self.plan.warm_up_s * 1e9)
            while (left_ns := deadline_ns - loops.now_ns()) > 0:
                loops.time_quanta(made, WARM_UP_QUANTA, left_ns)
            return calibrate()

        found = agreed(self.ranks, warm)
        self.together()
        return found

    def together(self) -> None:
        if self.ranks.size > 1:
            dist.barrier()

    def keep(self, name: str, series: Series, made: Work, mode: str, how: dict[str, Any]) -> None:
        self.rows[self.ranks.rank, "quantum", name] = series
        histogram = {"tokens_of_expert": list(made.tokens_of_expert)} if "E" in made.sizes else {}
        self.measured[name] = {
            "mode": mode, "kernel": made.kernel, "sizes": dict(made.sizes), **histogram, **how,
            "checksum": f"{made.checksum():016x}",
        }  # fmt: skip

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
