"""What `sigma noise run` is asked for, and what of it cannot be or would change nothing."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from sigma_train.errors import WrongInput

from sigma_noise import loops
from sigma_noise.work import KERNELS, checked_sizes

MODES = ("fwq", "ftq", "detours")
WITH_THREADS = ("gemm", "grouped")


@dataclass(frozen=True)
class Plan:
    """Every field goes into the file.

    kernels:     of spin, copy, gemm, grouped and a2a, each measured for `duration_s` in each of `modes`
    modes:       fwq, fixed work; ftq, fixed time; detours, gaps of a loop that does nothing, once for all kernels
    threshold_s: of detours; none: the greater of 1 us and 9 times what a reading of the clock costs
    pin:         CPUs that the ranks of a host take in turn; none: wherever the scheduler puts them
    threads:     of gemm and grouped
    sizes:       by kernel, see `sigma_noise.work`; of a2a: bytes
    backend:     cpu, or cuda, which measures no detours
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

    @property
    def times_kernels(self) -> bool:
        return bool({"fwq", "ftq"} & set(self.modes))

    @property
    def worked_on(self) -> set[str]:
        """Kernels whose sizes matter: of an all-to-all on GPUs that of its local work as well."""
        return {*self.kernels, *(("gemm",) if self.backend == "cuda" and "a2a" in self.kernels else ())}

    def check(self, ranks: int) -> None:
        """Raises: WrongInput, by the name of the option."""
        known = (*KERNELS, "a2a")
        for option, given, names in (("kernel", self.kernels, known), ("mode", self.modes, MODES)):
            if wrong := [name for name in given if name not in names]:
                raise WrongInput(f"--{option} must be of {', '.join(names)}, found {wrong[0]!r}")
            if not given or len(set(given)) < len(given):
                raise WrongInput(f"--{option} wants different names, found {','.join(given) or 'none'}")
        if self.backend == "cuda":
            self._check_cuda()
        if wrong := [name for name in self.sizes if name not in self.worked_on]:
            raise WrongInput(f"--size {wrong[0]}: no such kernel is measured, of {', '.join(self.kernels)}")
        if "a2a" in self.kernels and ranks < 2:
            raise WrongInput("--kernel a2a wants at least 2 ranks, found 1; --nproc 2 starts them")
        if "a2a" in self.kernels and ("fwq" not in self.modes or "ftq" in self.modes):
            raise WrongInput(
                f"--kernel a2a is fixed work: --mode must have fwq and not ftq, found {','.join(self.modes)}; "
                "fixed time of other kernels is a run of its own"
            )
        if self.seed < 0:
            raise WrongInput(f"--seed must be at least 0, found {self.seed}")
        for option, seconds in (("warm-up", self.warm_up_s), ("threshold", self.threshold_s or 0.0)):
            if not 0 <= seconds < float("inf"):
                raise WrongInput(f"--{option} must be seconds of at least 0, found {seconds}")
        self._check_threads()
        if unknown := set(self.sizes.get("a2a", {})) - {"bytes"}:
            raise WrongInput(f"--size a2a.{min(unknown)}: a2a takes bytes")
        try:
            loops.check_seconds("duration_s", self.duration_s)
            if self.times_kernels:
                loops.check_quanta(self.quantum_s, self.duration_s)
            for kernel in self.worked_on - {"a2a"}:
                checked_sizes(kernel, self.sizes.get(kernel, {}), self.backend)
        except ValueError as error:
            raise WrongInput(as_options(error)) from None

    def _check_cuda(self) -> None:
        if "detours" in self.modes:
            raise WrongInput(
                "--mode detours is gaps of a loop that reads the CPU's clock, which a GPU does not run; --backend cuda "
                "measures fwq and ftq"
            )
        if self.threads > 1 or self.threshold_s is not None:
            option = "threads" if self.threads > 1 else "threshold"
            raise WrongInput(f"--{option} is of the CPU alone; --backend cuda has no use for it")

    def _check_threads(self) -> None:
        """A rank that is pinned has one CPU, whatever its products are told."""
        asked = {"--threads": self.threads}
        asked |= {f"--size {kernel}.threads": sizes.get("threads", 1) for kernel, sizes in self.sizes.items()}
        if self.pin and (many := [f"{option} {n}" for option, n in asked.items() if n > 1]):
            raise WrongInput(f"{many[0]} would share the one CPU of --pin; leave one of them out")

    def check_used(self, given: Collection[str]) -> None:
        """Raises: WrongInput for an option of `given` that changes nothing of this plan."""
        useless = {}
        if not self.times_kernels:
            names = ("kernel", "quantum", "warm-up", "threads", "size", *([] if self.attribute else ["seed"]))
            useless |= dict.fromkeys(names, "--mode detours times no kernel")
        if "detours" not in self.modes:
            useless["threshold"] = f"--mode {','.join(self.modes)} looks for no detours"
        if all(k not in WITH_THREADS or "threads" in self.sizes.get(k, {}) for k in self.kernels):
            useless.setdefault("threads", f"of {', '.join(self.kernels)} none takes it")
        if self.backend == "cuda":
            useless["threads"] = "it is of the CPU alone"
        if wrong := sorted(useless.keys() & set(given)):
            raise WrongInput(f"--{wrong[0]} would change nothing: {useless[wrong[0]]}; leave it out")


def as_options(error: ValueError) -> str:
    """What a function says of its arguments, of the options they came by."""
    text = str(error)
    for argument in ("kernel", "quantum_s", "duration_s", "pin"):
        text = re.sub(rf"^{argument}\b", f"--{argument.removesuffix('_s')}", text)
    return text if text.startswith("--") else f"--size: {text}"
