"""The same plan on a GPU, CUDA or ROCm, one a rank: each kernel in each mode, after a warm-up that is not stored."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from sigma_train.errors import WrongInput
from sigma_train.ranks import Ranks

from sigma_noise import cuda_replays, cuda_spin, host, loops
from sigma_noise.cuda_a2a import all_to_all, check
from sigma_noise.gpu import Gpu, Result, found
from sigma_noise.measure import agreed
from sigma_noise.offset import offset
from sigma_noise.plan import Plan
from sigma_noise.trace import Key, Series, Trace
from sigma_noise.watch import watching


def measure(plan: Plan, ranks: Ranks, gpu: Gpu | None = None) -> Trace:
    """The trace of this rank; a collective.

    Raises: WrongInput on every rank for what is measured on a CPU alone, or where any has no GPU or cannot use it.
    """
    plan.check(ranks.size)
    gpu = agreed(ranks, lambda: usable(gpu or found(), plan))
    if "a2a" in plan.kernels:
        check(gpu, ranks)
    cpu = agreed(ranks, lambda: host.cpu_of(plan.pin))
    rows: dict[Key, Series] = {}
    measured: dict[str, Any] = {}
    warnings: list[str] = []
    with host.pinned(cpu), host.without_gc(), watching(plan.attribute, plan.seed) as watch:
        about = host.described(loops.clock_cost(), cpu)
        offsets = [offset(ranks, about["clock"]["identity"])]
        for run in runs(gpu, plan, ranks):
            result = run()
            rows |= {(ranks.rank, "quantum", name): series for name, series in result.series.items()}
            measured |= result.about
            warnings += result.warnings
        offsets.append(offset(ranks, about["clock"]["identity"]))
    # Collectives are set beside other ranks', whose stamps are by their events as well.
    doubt_ns = max((o["residual_ns"] for o in measured.get("a2a", {}).get("offsets", ())), default=0)
    about["clock"]["offsets"] = [asdict(replace(o, residual_ns=o.residual_ns + doubt_ns)) for o in offsets]
    about |= {"gpu": gpu.about, "measured": measured, "warnings": warnings}
    trace = Trace({**asdict(plan), "ranks": ranks.size}, {ranks.rank: about}, rows)
    return watch.into(trace, ranks.rank) if watch else trace


def usable(gpu: Gpu, plan: Plan) -> Gpu:
    """It.  Raises: WrongInput where what a kernel needs was not built here."""
    if "spin" in plan.kernels and gpu.native is None:
        raise WrongInput(
            "--kernel spin: the CUDA kernels were not built here; pip install . -C cmake.define.SIGMA_CUDA=ON"
        )
    if "a2a" in plan.kernels and gpu.exchange is None:
        raise WrongInput("--kernel a2a: torch was built without NCCL or RCCL here")
    return gpu


def runs(gpu: Gpu, plan: Plan, ranks: Ranks) -> list[Callable[[], Result]]:
    """Fixed work under a kernel's name, fixed time under its name and _ftq; the all-to-all once."""
    of_all: list[Callable[[], Result]] = []
    for kernel in plan.kernels:
        if kernel == "a2a":
            of_all.append(partial(all_to_all, gpu, plan, ranks))
            continue
        how = cuda_spin if kernel == "spin" else cuda_replays
        of_mode = {"fwq": how.fixed_work, "ftq": how.fixed_time}
        of_all += [
            partial(run, gpu, kernel, plan, ranks) for mode, run in of_mode.items() if mode in plan.modes
        ]
    return of_all
