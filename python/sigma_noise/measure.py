"""A plan becomes a trace: each kernel in each mode, on every rank at once, after a warm-up that is not stored."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar, cast

import torch.distributed as dist
from sigma_train.errors import Failure, WrongInput
from sigma_train.ranks import Ranks

from sigma_noise import host, loops
from sigma_noise.a2a import AllToAll, repeated
from sigma_noise.offset import offset
from sigma_noise.plan import WITH_THREADS, Plan, as_options
from sigma_noise.trace import Key, Series, Trace
from sigma_noise.watch import watching
from sigma_noise.work import Work, work

FIXED_TIME = "_ftq"  # at the end of a name: quanta of fixed time
A2A_BYTES = 64 << 10  # from each rank to each
LEAST_THRESHOLD_S = 1e-6
THRESHOLD_GAPS = 9  # times the least gap, as netgauge has it
TIMER_SHARE = 100  # quanta shorter than so many readings of the clock measure the clock
WARM_UP_QUANTA = 256
ROUNDING = 1e-9  # by which a digit may come out above itself
T = TypeVar("T")


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


def together(ranks: Ranks) -> None:
    """Returns when all ranks have come; a collective."""
    if ranks.size > 1:
        dist.barrier()


def coarse(name: str, chunk: loops.Calibration, quantum_s: float) -> list[str]:
    """What is to be said of chunks that are too long for their quantum; nothing of others."""
    chunks = quantum_s / max(chunk.quantum_s, 1e-9)
    if chunks >= 0.9 * loops.CHUNKS:
        return []
    return [
        f"{name}: a chunk of {chunk.quantum_s:.2g} s fits only {chunks:.0f} times into a quantum; "
        f"{digit_above(loops.CHUNKS * chunk.quantum_s)} s would hold {loops.CHUNKS}"
    ]


def digit_above(value: float) -> str:
    """The least number of one digit that is no less."""
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / unit * (1 - ROUNDING)) * unit:.1g}"


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
        if self.plan.times_kernels and self.plan.quantum_s < TIMER_SHARE * cost.median_s:
            self.warn(
                f"a quantum of {self.plan.quantum_s:g} s is less than {TIMER_SHARE} readings of the clock "
                f"({cost.median_s:g} s each); take {digit_above(TIMER_SHARE * cost.median_s)} s or more"
            )
        offsets = [offset(self.ranks, clock["identity"])]
        for kernel in self.plan.kernels if self.plan.times_kernels else ():
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
            self.warnings += coarse(kernel + FIXED_TIME, chunk, plan.quantum_s)

    def all_to_all(self) -> None:
        """Local quanta of spin under a2a_local, collectives under a2a from arrival to end."""
        plan = self.plan
        num_bytes = plan.sizes.get("a2a", {}).get("bytes", A2A_BYTES)
        made = self.made("spin")
        calibrated = self.calibrated(made, partial(loops.calibrate, made, plan.quantum_s))
        exchange = AllToAll(self.ranks, made, num_bytes, plan.seed)
        local, collective = repeated(self.ranks, exchange.rounds, plan.duration_s, plan.warm_up_s)
        self.keep("a2a_local", local, made, "fwq", asdict(calibrated))
        self.rows[self.ranks.rank, "quantum", "a2a"] = collective
        self.measured["a2a"] = {"mode": "collective", "bytes": num_bytes, "backend": dist.get_backend()}

    def detours(self, cost: loops.ClockCost) -> None:
        """Events named detour, whose value is seconds above the least gap."""
        threshold_s = self.plan.threshold_s
        if threshold_s is None:
            threshold_s = max(LEAST_THRESHOLD_S, THRESHOLD_GAPS * cost.least_s)
        together(self.ranks)
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
        together(self.ranks)
        return found

    def keep(self, name: str, series: Series, made: Work, mode: str, how: dict[str, Any]) -> None:
        self.rows[self.ranks.rank, "quantum", name] = series
        histogram = {"tokens_of_expert": list(made.tokens_of_expert)} if "E" in made.sizes else {}
        self.measured[name] = {
            "mode": mode, "kernel": made.kernel, "sizes": dict(made.sizes), **histogram, **how,
            "checksum": f"{made.checksum():016x}",
        }  # fmt: skip

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
