"""`sigma noise compare`: two folders of runs, judged, shown and as JSON (`compare.schema.json`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sigma_train.console import say
from sigma_train.errors import WrongInput

from sigma_noise.calibrate import calibrate, split
from sigma_noise.codes import FAILING, Exit, Verdict
from sigma_noise.compare import MARGINS, Comparison, compare
from sigma_noise.options import names
from sigma_noise.plain import plain
from sigma_noise.runs import Arm, Numbers, Threshold, arm_of, told
from sigma_noise.shape import Shape, shape
from sigma_noise.units import time_of

COMPARISONS = 200  # of A with A, in a calibration
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Options:
    """`tau_s`: threshold of detours of all runs; none: by the rank with most jitter.  `calibration`: a folder of
    runs of equal code.  `fail_on`: verdicts that end the command with their code.
    """

    kernel: str | None = None
    metrics: tuple[str, ...] = ()
    margins: Mapping[str, float] | None = None
    calibration: Path | None = None
    tau_s: float | None = None
    alpha: float = 0.05
    seed: int = 0
    fail_on: tuple[Verdict, ...] = FAILING

    def __post_init__(self) -> None:
        """Raises: WrongInput for a metric that is none, or a threshold that is not positive."""
        if wrong := [name for name in self.metrics if name not in MARGINS]:
            raise WrongInput(f"--metric must be one of {', '.join(MARGINS)}, found {wrong[0]!r}")
        if self.tau_s is not None and not 0 < self.tau_s < float("inf"):
            raise WrongInput(f"--tau must be more than 0 s, found {self.tau_s:g}")


@dataclass(frozen=True)
class Judged:
    """The verdicts, and how much all times differ in shape, which decides nothing.  `threshold`: whose jitter set tau;
    None where it was given.
    """

    options: Options
    base: Arm
    new: Arm
    calibration: Arm | None
    tau_s: float
    threshold: Threshold | None
    comparison: Comparison
    shape: Shape

    @property
    def exit(self) -> Exit:
        verdict = self.comparison.verdict
        return verdict.exit if verdict in self.options.fail_on else Exit.OK


def judged(base: Path, new: Path, options: Options) -> Judged:
    """Raises: WrongInput for a folder without runs, or runs that differ in what they measured."""
    arms = [arm_of(base, options.kernel), arm_of(new, options.kernel)]
    own = None if options.calibration is None else arm_of(options.calibration, options.kernel)
    everyone = arms if own is None else [*arms, own]
    for arm in everyone:
        if arm.plan != arms[0].plan:
            raise WrongInput(
                f"{arm.folder}: runs must measure what {base} has, {told(arms[0].plan)}, found {told(arm.plan)}"
            )
    threshold = max(arm.threshold for arm in arms) if options.tau_s is None else None
    tau_s = options.tau_s if threshold is None else threshold.tau_s
    numbers = [arm.numbers(tau_s) for arm in arms]
    common = [name for name in numbers[0] if name in numbers[1]]
    if unknown := [name for name in options.metrics if name not in common]:
        raise WrongInput(
            f"--metric must be one that all these runs tell, of {', '.join(common)}, found {unknown[0]!r}"
        )
    margins = options.margins if own is None else calibrated(own, tau_s, options)
    try:
        found = compare(
            *numbers,
            margins=margins,
            metrics=options.metrics or common,
            alpha=options.alpha,
            throttled=sorted({unit for arm in arms for unit in arm.throttled}),
            unseen=hidden(arms, numbers, tau_s),
        )
    except ValueError as error:
        raise WrongInput(str(error)) from None
    differ = shape(arms[0].samples, arms[1].samples, seed=options.seed)
    return Judged(options, *arms, own, tau_s, threshold, found, differ)


def hidden(arms: Sequence[Arm], numbers: Sequence[Numbers], tau_s: float) -> dict[str, str]:
    """Metrics that one threshold leaves nothing of, with the reason: equal numbers of no detours are no equivalence."""
    are_seen = any(any(of_arm["detours_per_s"]) for of_arm in numbers)
    if are_seen or not any(arm.has_detours for arm in arms):
        return {}
    above = f"no run has a detour above {time_of(tau_s)}, though some have one above their own threshold"
    return {"detours_per_s": f"{above}; give a lower --tau"}


def calibrated(arm: Arm, tau_s: float, options: Options) -> Mapping[str, float]:
    """Margins no finer than halves of runs of equal code differ by.  Raises: WrongInput where runs are too few."""
    if len(arm.runs) < 2:
        raise WrongInput(f"--calibrate {arm.folder} must have 2 runs or more, found {len(arm.runs)}")
    rng = np.random.default_rng(options.seed)
    pairs = split(arm.numbers(tau_s), len(arm.runs) // 2, COMPARISONS, rng)
    return {**(options.margins or {}), **calibrate(pairs, options.margins).margins}


def as_margins(texts: Sequence[str]) -> dict[str, float]:
    """Raises: WrongInput for what is not like median_s=0.02."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value) if name in MARGINS else -1.0
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] < float("inf"):
            raise WrongInput(f"--margin must be like median_s=0.02, of {', '.join(MARGINS)}, found {text!r}")
    return found


def as_verdicts(text: str) -> tuple[Verdict, ...]:
    """Raises: WrongInput for a verdict that is none or has no exit code of its own."""
    if wrong := [name for name in names(text) if name not in FAILING]:
        raise WrongInput(f"--fail-on must be of {', '.join(FAILING)} by commas, found {wrong[0]!r}")
    return tuple(map(Verdict, names(text)))


def show(found: Judged) -> None:
    console, differ = Console(), found.shape
    table = Table("metric", "new / base", "95 %", "margin", "p", "runs", "verdict")
    for m in found.comparison.metrics:
        table.add_row(
            m.name, f"{m.ratio:.4f}", f"{m.low:.4f} to {m.high:.4f}", f"{m.margin:.1%}", f"{m.p:.3g}",
            f"{m.runs[0]}, {m.runs[1]}", str(m.verdict),
        )  # fmt: skip
    console.print(table)
    say(console, f"detours of all runs are those above {time_of(found.tau_s)}, {whose(found.threshold)}")
    apart = (
        f"all times, which decide nothing: {differ.wasserstein_log:.2%} apart (Wasserstein-1 of their logarithms, "
        f"p {differ.p:.3g}), {differ.similarity:.3f} similar"
    )
    say(console, apart)
    for reason in found.comparison.reasons:
        say(console, reason)
    say(console, f"verdict: {found.comparison.verdict}")


def whose(threshold: Threshold | None) -> str:
    if threshold is None:
        return "as asked"
    _, folder, run, rank = threshold
    return f"by the jitter of rank {rank} in {run} of {folder}, the middle run of the rank with most"


def as_json(found: Judged) -> dict[str, Any]:
    options = found.options
    return {
        "schema_version": SCHEMA_VERSION,
        **plain(found.comparison),
        "exit": int(found.exit),
        "fail_on": list(options.fail_on),
        "seed": options.seed,
        "tau_s": found.tau_s,
        "measured": found.base.plan,
        "base": files(found.base),
        "new": files(found.new),
        "calibration": None if found.calibration is None else files(found.calibration),
        "shape": plain(found.shape),
    }


def files(arm: Arm) -> dict[str, Any]:
    """Of each run by name its files, and their sha256."""
    return {"folder": str(arm.folder), "runs": plain(arm.files)}
