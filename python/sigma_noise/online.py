"""Changes of level while samples come in: Bayesian online detection (Adams & MacKay 2007).

r_t is the length of the run of one level that sample t ends.  With hazard h and pi the predictive density of a run,

    P(r_t = r + 1, x_1..t) = P(r_t-1 = r, x_1..t-1) pi_r(x_t) (1 - h)
    P(r_t = 0, x_1..t)     = sum_r P(r_t-1 = r, x_1..t-1) pi_r(x_t) h

of log x, normal with unknown mean and variance: pi is Student's t of the normal-inverse-gamma posterior (Murphy
2007).  A share of samples are detours, from a wide density of their own, and a sample teaches a run only as much as
the run holds it for its own: without that, a single detour would end every run.

An alarm needs two things: the probability that the level is no longer the one last agreed upon above 0.9, and a shift
of medians that matters, 10 % in a job, 2 % in a sweep of idle machines (the pair of arXiv 2410.12588).
"""

from dataclasses import dataclass
from math import isfinite, log

import numpy as np
from scipy.special import gammaln

from sigma_noise.intervals import NORMAL_MAD

PROBABILITY = 0.9
LEAST_SHIFT = 0.10
LEAST_SHIFT_OFFLINE = 0.02
BURN_IN = 20  # samples that set the prior
LEAST_RUN = 5  # samples of the new level before an alarm: a detour or two is none
MOST_RUNS = 100  # run lengths kept: the most probable
LEVELS_SPREAD = 0.25  # of log x between levels, before any is seen
DETOUR_SHARE = 0.01
DETOUR_SPREAD = 2.0  # of log x


@dataclass(frozen=True)
class Alarm:
    """Known at sample `index`: from sample `since` on, the median went from `before` to `after`."""

    index: int
    since: int
    before: float
    after: float
    probability: float


class Online:
    """Feed it one sample after another.  Samples that are correlated belong in block medians longer than their tau."""

    def __init__(self, least_shift: float = LEAST_SHIFT, *, expected_run: float = 250.0) -> None:
        """least_shift: of medians, 0.1 is 10 %; expected_run: samples between changes, 1 / hazard.

        Raises: ValueError if the one is not positive or the other not above 1.
        """
        if not least_shift > 0 or not expected_run > 1:
            raise ValueError(
                f"least_shift must be positive and expected_run above 1, found {least_shift} and {expected_run}"
            )
        self.least_shift = least_shift
        self._hazard = 1 / expected_run
        self._values: list[float] = []
        self._agreed = 0  # where the level agreed upon begins

    def update(self, x: float) -> Alarm | None:
        """Take sample x > 0; an alarm if it makes a change certain.  Raises: ValueError."""
        if not (isfinite(x) and x > 0):
            raise ValueError(f"x must be positive and finite, found {x}")
        self._values.append(x)
        if len(self._values) < BURN_IN:
            return None
        if len(self._values) == BURN_IN:
            self._begin(np.log(self._values))
            for value in np.log(self._values):
                self._advance(value)
            return None
        self._advance(log(x))
        return self._alarm()

    def _begin(self, first: np.ndarray) -> None:
        centre = float(np.median(first))
        sigma = max(NORMAL_MAD * float(np.median(np.abs(first - centre))), 1e-6)
        # kappa: how many samples the prior's mean is worth, so that sigma / sqrt(kappa) is the spread of levels.
        self._prior = np.array([centre, min(1.0, (sigma / LEVELS_SPREAD) ** 2), 1.0, sigma**2])
        self._log_p = np.zeros(1)
        self._run = np.zeros(1, np.int64)
        self._posterior = self._prior[:, None]  # mean, kappa, alpha, beta of each run length

    def _advance(self, y: float) -> None:
        mean, kappa, alpha, beta = self._posterior
        level = log(1 - DETOUR_SHARE) + _student_t(y, 2 * alpha, mean, beta * (kappa + 1) / (alpha * kappa))
        detour = log(DETOUR_SHARE) + _student_t(y, 1.0, self._prior[0], DETOUR_SPREAD**2)
        predictive = np.logaddexp(level, detour)
        joint = self._log_p + predictive
        joint -= np.logaddexp.reduce(joint)
        w = np.exp(level - predictive)
        updated = np.stack(
            [
                (kappa * mean + w * y) / (kappa + w),
                kappa + w,
                alpha + w / 2,
                beta + kappa * w * (y - mean) ** 2 / (2 * (kappa + w)),
            ]
        )
        self._log_p = np.concatenate([[log(self._hazard)], joint + log(1 - self._hazard)])
        self._run = np.concatenate([[0], self._run + 1])
        self._posterior = np.concatenate([self._prior[:, None], updated], axis=1)
        if len(self._run) > MOST_RUNS:
            kept = np.delete(np.arange(len(self._run)), self._log_p.argmin())
            self._log_p, self._run = self._log_p[kept], self._run[kept]
            self._posterior = self._posterior[:, kept]

    def _alarm(self) -> Alarm | None:
        n = len(self._values)
        p = np.exp(self._log_p)
        is_newer = self._run < n - self._agreed
        probability = float(p[is_newer].sum())
        run = int(self._run[np.where(is_newer, p, 0.0).argmax()])
        if probability <= PROBABILITY or run < LEAST_RUN:
            return None
        if n - run - self._agreed < LEAST_RUN:  # what the series began with was no level
            self._agreed = n - run
            return None
        before = float(np.median(self._values[self._agreed : n - run]))
        after = float(np.median(self._values[n - run :]))
        if abs(after / before - 1) < self.least_shift:
            return None
        self._agreed = n - run
        return Alarm(n - 1, n - run, before, after, probability)


Floats = float | np.ndarray


def _student_t(y: float, nu: Floats, mean: Floats, squared_scale: Floats) -> Floats:
    """log density of Student's t at y."""
    distance = (y - mean) ** 2 / (nu * squared_scale)
    return (
        gammaln((nu + 1) / 2)
        - gammaln(nu / 2)
        - 0.5 * np.log(np.pi * nu * squared_scale)
        - (nu + 1) / 2 * np.log1p(distance)
    )
