"""The figures of runs as Prometheus reads them: the textfile collector of its node exporter."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sigma_train.account import CAUSES, Account, S, Totals

Figure = Callable[[Totals], float | None]

# No value of these ever falls while a ledger grows; what a return to a checkpoint takes back is a gauge.
COUNTERS: dict[str, tuple[str, Figure]] = {
    "allocated_rank_seconds": ("Seconds times ranks that the run held.", lambda t: t.allocated * S),
    "idle_seconds": ("Seconds between an end and a start by the user.", lambda t: t.idle * S),
    "attempts": ("Starts of the ranks.", lambda t: t.attempts),
    "interruptions": ("Attempts that ended and were not to.", lambda t: t.interruptions),
    "rollbacks": ("Returns to a checkpoint within an attempt.", lambda t: t.rollbacks),
    "lost_steps": ("Steps that were computed again.", lambda t: t.lost_steps),
}
GAUGES: dict[str, tuple[str, Figure]] = {
    "utilisation_ratio": ("Useful step time over allocated time.", lambda t: t.utilisation),
    "mfu_allocated_ratio": (
        "Model FLOPs of useful steps over the peak's in the allocated time.",
        lambda t: t.mfu_allocated,
    ),
    "mfu_useful_ratio": (
        "Model FLOPs of useful steps over the peak's in the useful time.",
        lambda t: t.mfu_useful,
    ),
    "useful_tokens": ("Tokens of useful steps.", lambda t: t.tokens),
    "useful_tokens_per_second": ("Useful tokens over the time ranks were held.", lambda t: t.tokens_per_s),
    "mean_recovery_seconds": (
        "From the last step before an interruption to the first new one.",
        lambda t: t.mean_recovery_s,
    ),
}


def write_textfile(path: Path, runs: Mapping[str, Account]) -> None:
    """Write the figures of runs by their labels; the file is whole at any moment.

    Raises: OSError.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(runs))
    write_to_textfile(str(path), registry)


class _Collector:
    """Called a collector by Prometheus's client: `collect` gives the metrics anew each time."""

    def __init__(self, runs: Mapping[str, Account]) -> None:
        self._totals = {run: account.totals() for run, account in runs.items()}
        self._last = {run: account.last_at * S for run, account in runs.items()}
        self._reached = {run: float(account.reached) for run, account in runs.items()}

    def collect(self) -> Iterator[Metric]:
        for name, (told, figure) in COUNTERS.items():
            yield _filled(CounterMetricFamily(f"sigma_train_{name}", told, labels=["run"]), self._of(figure))
        for name, (told, figure) in GAUGES.items():
            yield _filled(GaugeMetricFamily(f"sigma_train_{name}", told, labels=["run"]), self._of(figure))
        last = GaugeMetricFamily("sigma_train_last_event_timestamp_seconds", "Of the ledger.", labels=["run"])
        yield _filled(last, self._last)
        reached = GaugeMetricFamily("sigma_train_reached_steps", "The furthest step done.", labels=["run"])
        yield _filled(reached, self._reached)
        told = "Seconds times ranks by what they went into; they sum to the allocated ones."
        spent = GaugeMetricFamily("sigma_train_spent_rank_seconds", told, labels=["run", "cause"])
        for run, totals in self._totals.items():
            for cause in CAUSES:
                spent.add_metric([run, cause], totals.spent[cause] * S)
        yield spent

    def _of(self, figure: Figure) -> dict[str, float | None]:
        return {run: figure(totals) for run, totals in self._totals.items()}


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float | None]
) -> CounterMetricFamily | GaugeMetricFamily:
    for run, value in values.items():
        if value is not None:
            family.add_metric([run], value)
    return family
