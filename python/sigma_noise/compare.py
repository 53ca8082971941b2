"""Did it get worse?  Two sets of runs, by a few numbers a run, each with a margin of what matters.

The unit of replication is the run, a process of its own.  Samples of one run share its luck (where memory lay, how
warm the device was), so tests of pooled samples raise false alarms in up to 85 % of comparisons of equal code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, log1p

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sigma_noise.codes import Exit, Verdict
from sigma_noise.shift import Shift, shift

LEAST_RUNS = 5  # an arm
MOST_RUNS = 100  # more than that is not worth asking for
MOST_NOISE = 0.20  # of the baseline, beyond which a machine is unfit
MARGINS = {  # the ratio beyond which a change matters, less 1
    "median_s": 0.02,
    "p99_s": 0.05,
    "noise_share": 0.10,
    "detours_per_s": 0.20,
    "slowdown_2048": 0.02,
}
FLOORS = {"noise_share": 1e-4, "detours_per_s": 1e-2}  # what is less counts as this: it has no ratio

ORDER = (
    Verdict.REGRESSED,
    Verdict.UNFIT,
    Verdict.INCONCLUSIVE,
    Verdict.IMPROVED,
    Verdict.EQUIVALENT,
)  # of the whole


@dataclass(frozen=True)
class MetricComparison:
    """All metrics are better where lower.  `ratio` is new over base, of geometric means of runs."""

    name: str
    verdict: Verdict
    ratio: float
    low: float
    high: float  # the interval at 1 - alpha, of this metric alone
    margin: float
    p: float  # two-sided, of "no change beyond the margin", adjusted for the number of metrics (Holm)
    p_equivalent: float  # of "a change of the margin or more" (TOST)
    runs: tuple[int, int]
    method: str  # "permutation", "welch", or "none" where runs are too few or do not tell
    sentence: str


@dataclass(frozen=True)
class Comparison:
    verdict: Verdict
    metrics: tuple[MetricComparison, ...]
    reasons: tuple[str, ...]  # a sentence each: why unfit, or what is missing
    alpha: float

    @property
    def exit(self) -> Exit:
        return self.verdict.exit


def compare(
    base: Mapping[str, ArrayLike],
    new: Mapping[str, ArrayLike],
    *,
    margins: Mapping[str, float] | None = None,
    metrics: Sequence[str] | None = None,
    alpha: float = 0.05,
    throttled: Sequence[str] = (),
    unseen: Mapping[str, str] | None = None,
    most_noise: float = MOST_NOISE,
) -> Comparison:
    """Judge `new` against `base`, each a number a run for every metric.

    With m the margin and the ratio's interval at 1 - alpha, a metric is
    *regressed* if the ratio is above 1 + m, *improved* if it is below 1/(1 + m) (tests at alpha/2 each, Holm 1979 over
    metrics), *equivalent* if it lies between them (two one-sided tests at alpha, Schuirmann 1987), *unfit* if none of
    it holds and the interval reaches further than m to either side, and else *inconclusive*.
    The whole is unfit if the machine is; else regressed, unfit, inconclusive if any metric is, in this order; improved
    if any is; equivalent if all are, which needs no adjustment (Berger 1982, intersection-union test).

    Args:    base, new: for each metric the runs, 0 or more (above 0 where `FLOORS` has none), interleaved in time.
             margins: over `MARGINS`, by metric.
             metrics: which to judge; all that both have if None.
             throttled: units that were throttled, as the sentence is to name them.
             unseen: metrics whose numbers do not tell, with the reason; they are inconclusive.
    Raises:  ValueError for no common metric, one without a margin or in one set only, or a number that is no measure.
    """
    names = _names(base, new, metrics)
    margin = _margins(names, margins)
    if not 0.0 < alpha < 0.5:
        raise ValueError(f"compare: alpha must lie between 0 and 0.5, found {alpha}")
    reasons = _unfit(base, throttled, most_noise)
    level = alpha / 2.0 / len(names)  # of Holm's first step
    tests = [
        _Test.of(
            name,
            _logs("base", name, base),
            _logs("new", name, new),
            margin[name],
            level,
            (unseen or {}).get(name),
        )
        for name in names
    ]
    adjusted = holm(np.array([test.p for test in tests]))
    results = [test.judged(p, alpha) for test, p in zip(tests, adjusted.tolist(), strict=True)]
    found = {result.verdict for result in results}
    verdict = Verdict.UNFIT if reasons else next(v for v in ORDER if v in found)
    undecided = (Verdict.UNFIT, Verdict.INCONCLUSIVE)
    reasons += [result.sentence for result in results if result.verdict in undecided]
    return Comparison(verdict, tuple(results), tuple(reasons), alpha)


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values adjusted so that any false alarm among them has probability alpha at most (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


@dataclass(frozen=True)
class _Test:
    """One metric before the others are known."""

    name: str
    runs: tuple[int, int]
    margin: float
    shift: Shift | None  # of logs; None where runs are too few, or their numbers do not tell
    estimate: float
    unseen: str | None

    @classmethod
    def of(
        cls,
        name: str,
        a: NDArray[np.float64],
        b: NDArray[np.float64],
        margin: float,
        level: float,
        unseen: str | None,
    ) -> "_Test":
        runs = (len(a), len(b))
        enough = shift(a, b, level) if unseen is None and min(runs) >= LEAST_RUNS else None
        return cls(name, runs, margin, enough, float(b.mean() - a.mean()), unseen)

    @property
    def edge(self) -> float:
        return log1p(self.margin)

    @property
    def p(self) -> float:
        if self.shift is None:
            return 1.0
        return min(1.0, 2.0 * min(self.shift.p_above(self.edge), self.shift.p_below(-self.edge)))

    def judged(self, p: float, alpha: float) -> MetricComparison:
        """With p adjusted for the other metrics."""
        low, high = self.shift.interval(alpha / 2.0) if self.shift else (-inf, inf)
        p_equivalent = (
            max(self.shift.p_below(self.edge), self.shift.p_above(-self.edge)) if self.shift else 1.0
        )
        reach = max(high - self.estimate, self.estimate - low)
        if self.shift is None:
            verdict = Verdict.INCONCLUSIVE
        elif p <= alpha:
            verdict = Verdict.REGRESSED if self.estimate > 0.0 else Verdict.IMPROVED
        elif p_equivalent <= alpha:
            verdict = Verdict.EQUIVALENT
        else:
            verdict = Verdict.UNFIT if reach > self.edge else Verdict.INCONCLUSIVE
        return MetricComparison(
            self.name, verdict, exp(self.estimate), exp(low), exp(high), self.margin, p, p_equivalent, self.runs,
            self.shift.method if self.shift else "none", self._sentence(verdict, low, high, reach),
        )  # fmt: skip

    def _sentence(self, verdict: Verdict, low: float, high: float, reach: float) -> str:
        if self.unseen is not None:
            return f"{self.name}: {self.unseen}"
        if self.shift is None:
            missing = [f"{LEAST_RUNS - n} more of {arm}" for arm, n in zip(("base", "new"), self.runs, strict=True)
                       if n < LEAST_RUNS]  # fmt: skip
            return (
                f"{self.name}: {LEAST_RUNS} runs an arm are needed, found {self.runs[0]} and {self.runs[1]}; "
                + (f"make {' and '.join(missing)}")
            )
        found = f"{self.name}: {_percent(self.estimate)} ({_percent(low)} to {_percent(high)})"
        if verdict not in (Verdict.UNFIT, Verdict.INCONCLUSIVE):
            return f"{found}, {verdict} at a margin of {self.margin:.1%}"
        why = "reaches further than" if verdict is Verdict.UNFIT else "crosses"
        return f"{found} {why} the margin of {self.margin:.1%}; {self._runs_wanted(reach)}"

    def _runs_wanted(self, reach: float) -> str:
        """An interval shrinks as 1/sqrt(runs); it decides once it ends at the nearer edge of the margin."""
        away = abs(abs(self.estimate) - self.edge)
        runs = min(self.runs)
        wanted = runs * (reach / away) ** 2 if away > 0.0 else inf
        if wanted > MOST_RUNS:
            return (
                f"not even {MOST_RUNS} runs an arm would decide that: quieten the machine or widen the margin"
            )
        return f"about {max(1, ceil(wanted) - runs)} more runs an arm may decide that"


def _unfit(base: Mapping[str, ArrayLike], throttled: Sequence[str], most_noise: float) -> list[str]:
    reasons = [
        f"{unit} was throttled; let it cool or mend its power limit, and measure again" for unit in throttled
    ]
    if (
        "noise_share" in base
        and (noise := float(np.median(np.asarray(base["noise_share"], np.float64)))) > most_noise
    ):
        reasons.append(
            f"the baseline's noise is {noise:.1%}, over {most_noise:.0%}; quieten the machine first"
        )
    return reasons


def _names(
    base: Mapping[str, ArrayLike], new: Mapping[str, ArrayLike], metrics: Sequence[str] | None
) -> list[str]:
    names = [name for name in base if name in new] if metrics is None else list(dict.fromkeys(metrics))
    if not names:
        raise ValueError("compare: base and new must have a metric in common, found none")
    for name in names:
        if lacking := [arm for arm, runs in (("base", base), ("new", new)) if name not in runs]:
            raise ValueError(f"compare: metric {name!r} is not in {' nor '.join(lacking)}")
    return names


def _margins(names: Sequence[str], given: Mapping[str, float] | None) -> dict[str, float]:
    all_margins = MARGINS | dict(given or {})
    for name in names:
        if not 0.0 <= all_margins.get(name, -1.0) < inf:
            raise ValueError(
                f"compare: metric {name!r} must have a margin of 0 or more, found {all_margins.get(name)}"
            )
    return {name: all_margins[name] for name in names}


def _logs(arm: str, name: str, runs: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    values = np.asarray(runs[name], np.float64)
    floor = FLOORS.get(name, 0.0)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"compare: {name} of {arm} must be a number a run, found shape {values.shape}")
    if not np.all(np.isfinite(values) & (values >= 0.0) & (np.maximum(values, floor) > 0.0)):
        least = "0 or more" if floor else "above 0"
        raise ValueError(f"compare: {name} of {arm} must be finite and {least}, found {values.tolist()}")
    return np.log(np.maximum(values, floor))


def _percent(log_ratio: float) -> str:
    return f"{np.expm1(log_ratio):+.1%}"
