"""The figures of a measurement for Prometheus: the textfile collector of its node exporter.

Base units, ratios as such, counters in `_total`.  Labels are bounded: `kernel`, `ranks` (of the projection), and `rank`
only where `per_rank` asks for it; the histogram never has it, as it is 24 series each.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from sigma_train.files import failed_writes_are_oserrors

from sigma_noise.analysis import Analysis
from sigma_noise.detours import Noise
from sigma_noise.formats.rank_detours import DETOUR

PREFIX = "sigma_noise"
BUCKETS_S = (*(round(digit * 10.0**power, 6) for power in range(-6, 1) for digit in (1, 2, 5)), 10.0)


@dataclass(frozen=True)
class Figures:
    """What is known of one kernel (the name of its quanta).  What is empty or None is left out of the file.

    observed_s:               how long each rank was watched, by rank, seconds.
    noise_ratio:              noise over watched time, by rank, 0..1.
    straggler_what_if_ratio:  S - S(that rank's samples replaced by the median rank's), by rank.
    projected_slowdown_ratio: S(N) = E[max over N ranks] / E[one rank], at least 1, by N.
    detours_s:                lengths of all detours, f64 [n], seconds.
    threshold_s:              what made a detour, of the ranks the highest.
    """

    observed_s: Mapping[int, float]
    noise_ratio: Mapping[int, float] = field(default_factory=dict)
    straggler_what_if_ratio: Mapping[int, float] = field(default_factory=dict)
    projected_slowdown_ratio: Mapping[int, float] = field(default_factory=dict)
    detours_s: NDArray[np.float64] | None = None
    threshold_s: float | None = None

    @property
    def noise_ratio_of_all(self) -> float | None:
        """Over the time of all ranks together."""
        watched = sum(self.observed_s[rank] for rank in self.noise_ratio)
        noisy = sum(ratio * self.observed_s[rank] for rank, ratio in self.noise_ratio.items())
        return noisy / watched if watched else None


def figures(found: Analysis) -> dict[str, Figures]:
    """Of an analysis by name of quanta, or `detour`; of models the first that has a figure."""
    noises: dict[str, dict[int, Noise]] = {}
    for each in found.series:
        noises.setdefault(each.kernel, {})[each.rank] = each.noise
    for gaps in found.gaps:
        noises.setdefault(DETOUR, {})[gaps.rank] = gaps.noise
    made = {name: _of_noise(by_rank) for name, by_rank in noises.items()}
    kernel = None if found.windows is None else found.windows.kernel
    if kernel in made:
        what_if = {r.rank: r.what_if for r in found.scores.ranks} if found.scores else {}
        slowdown: dict[int, float] = {}
        for projected in found.projections:
            for N, value in zip(projected.ranks, projected.slowdown.tolist(), strict=True):
                if math.isfinite(value):
                    slowdown.setdefault(N, value)
        made[kernel] = replace(
            made[kernel], straggler_what_if_ratio=what_if, projected_slowdown_ratio=slowdown
        )
    return made


def _of_noise(by_rank: Mapping[int, Noise]) -> Figures:
    return Figures(
        observed_s={rank: noise.observed_s for rank, noise in by_rank.items()},
        noise_ratio={rank: noise.share for rank, noise in by_rank.items()},
        detours_s=np.concatenate([noise.detours.length_s for noise in by_rank.values()]),
        threshold_s=max(noise.tau_s for noise in by_rank.values()),
    )


def write(figures: Mapping[str, Figures], to: Path, per_rank: bool = False) -> None:
    """The figures of kernels by name; the file is whole at any moment, since it is renamed into place.

    Raises: OSError.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(figures, per_rank))
    with failed_writes_are_oserrors(to):
        write_to_textfile(str(to), registry)


class _Collector:
    """Called a collector by Prometheus's client."""

    def __init__(self, figures: Mapping[str, Figures], per_rank: bool) -> None:
        self._figures, self._per_rank = figures, per_rank

    def collect(self) -> Iterator[Metric]:
        by_rank = ["kernel", *(["rank"] if self._per_rank else [])]
        observed = CounterMetricFamily(
            f"{PREFIX}_observed_rank_seconds", "Seconds times ranks that were watched.", labels=by_rank
        )
        noise = GaugeMetricFamily(f"{PREFIX}_ratio", "Noise over watched time.", labels=by_rank)
        straggler = GaugeMetricFamily(
            f"{PREFIX}_straggler_what_if_ratio",
            "How much of the slowdown would go with a rank's own; of the worst rank unless by rank.",
            labels=by_rank,
        )
        slowdown = GaugeMetricFamily(
            f"{PREFIX}_projected_slowdown_ratio",
            "Expected time of a step on that many ranks over that of one.",
            labels=["kernel", "ranks"],
        )
        threshold = GaugeMetricFamily(
            f"{PREFIX}_detour_threshold_seconds", "What lasts longer is a detour.", labels=["kernel"]
        )
        lengths = HistogramMetricFamily(f"{PREFIX}_detour_seconds", "Lengths of detours.", labels=["kernel"])
        for kernel, each in sorted(self._figures.items()):
            self._add(observed, kernel, each.observed_s, sum(each.observed_s.values()))
            self._add(noise, kernel, each.noise_ratio, each.noise_ratio_of_all)
            worst = max(each.straggler_what_if_ratio.values(), default=None)
            self._add(straggler, kernel, each.straggler_what_if_ratio, worst)
            for ranks, ratio in sorted(each.projected_slowdown_ratio.items()):
                slowdown.add_metric([kernel, str(ranks)], ratio)
            if each.threshold_s is not None:
                threshold.add_metric([kernel], each.threshold_s)
            if each.detours_s is not None:
                lengths.add_metric([kernel], _buckets(each.detours_s), float(each.detours_s.sum()))
        yield from (f for f in (observed, noise, straggler, slowdown, threshold, lengths) if f.samples)

    def _add(self, family: Metric, kernel: str, by_rank: Mapping[int, float], of_all: float | None) -> None:
        if self._per_rank:
            for rank, value in sorted(by_rank.items()):
                family.add_metric([kernel, str(rank)], value)
        elif of_all is not None:
            family.add_metric([kernel], of_all)


def _buckets(lengths_s: NDArray[np.float64]) -> list[tuple[str, float]]:
    """Cumulative: how many are at most as long as each edge."""
    within = np.searchsorted(np.sort(lengths_s), BUCKETS_S, side="right")
    edges = [(f"{edge:g}", float(n)) for edge, n in zip(BUCKETS_S, within, strict=True)]
    return [*edges, ("+Inf", float(len(lengths_s)))]
