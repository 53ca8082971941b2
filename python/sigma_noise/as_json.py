"""An analysis as JSON.  `analysis.schema.json` says what is in it, `training.schema.json` of that of a training, and
`project.schema.json` of projections.

Numbers that are not finite are null.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sigma_noise.analysis import Analysis, Gaps, OfRank
from sigma_noise.attribution import Attribution
from sigma_noise.budget import Budget
from sigma_noise.detours import Noise
from sigma_noise.plain import plain
from sigma_noise.project import Projection
from sigma_noise.step_causes import Late
from sigma_noise.step_ranks import StepRanks
from sigma_noise.steps import StepNoise
from sigma_noise.windows import Exchanges

SCHEMA_VERSION = 1
MACHINE = ("clock", "cpu", "versions", "imported")  # of what files say of a rank: where it was measured


def as_json(found: Analysis) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "options": plain(found.options),
        "kernel": found.kernel,
        "hosts": {str(rank): host for rank, host in found.hosts.items()},
        "run": plain(found.run),
        "machines": {str(rank): machine(about) for rank, about in found.about.items()},
        "files": dict(found.digests),
        "series": [series(s) for s in found.series],
        "idle_loop": [gaps(g) for g in found.gaps],
        "ranked": found.ranked,
        "scores": plain(found.scores),
        "collectives": None if found.exchanges is None else exchanges(found.exchanges),
        "window_s": plain(found.window_s),
        "projections": [plain(p) for p in found.projections],
        "warnings": list(found.warnings),
    }


def machine(about: Mapping[str, Any]) -> dict[str, Any]:
    """Of a rank: null for what its file does not say."""
    return {name: plain(about.get(name)) for name in MACHINE}


def of_training(
    noise: StepNoise, why: Late | None, beside: StepRanks, digests: Mapping[str, str]
) -> dict[str, Any]:
    """Of a record of `sigma train --noise`.  `beside`: its ranks beside one another, and many of them."""
    derived = {"worst": noise.worst, "cost_share": noise.cost_share}
    options = beside.options
    return {
        "schema_version": SCHEMA_VERSION,
        "options": {name: plain(getattr(options, name)) for name in ("ranks", "alpha", "seed", "reference")},
        "files": dict(digests),
        "noise": plain(noise) | derived,
        "late": None if why is None else late(why),
        "ranked": beside.ranked,
        "scores": plain(beside.scores),
        "window_s": plain(beside.window_s),
        "projections": [plain(p) for p in beside.projections],
        "warnings": list(beside.warnings),
    }


def of_projections(
    found: Sequence[Projection],
    gains: Sequence[Budget],
    options: Mapping[str, Any],
    is_over_budget: bool | None,
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """`gains`: what would be regained without a cause, of each model."""
    return {
        "schema_version": SCHEMA_VERSION,
        "options": plain(options),
        "files": dict(digests),
        "projections": [plain(p) for p in found],
        "regained": [plain(b) for b in gains],
        "is_over_budget": is_over_budget,
    }


def late(why: Late) -> dict[str, Any]:
    regained = {
        cause: {"low": gain.low, "high": gain.high, **plain(gain)} for cause, gain in why.regained.items()
    }
    return {
        "rank": why.rank,
        "steps": why.steps,
        "step_s": why.step_s,
        "causes": causes(why.causes),
        "regained_s": regained,
        "sentence": why.sentence,
    }


def series(s: OfRank) -> dict[str, Any]:
    return {
        "rank": s.rank,
        "kernel": s.kernel,
        "is_fixed_time": s.is_fixed_time,
        "quanta": s.quanta,
        "median": plain(s.median),
        "noise": noise(s.noise),
        "share": plain(s.share),
        "changes": plain(s.changes),
        "periods": plain(s.periods),
        "causes": None if s.causes is None else causes(s.causes),
    }


def exchanges(found: Exchanges) -> dict[str, Any]:
    """Rows of `ranks`, in their order."""
    parts = found.parts
    return {
        "ranks": list(found.ranks),
        "times_last": plain(parts.times_last),
        "undecided": parts.undecided,
        "impossible": parts.impossible,
        "unmatched": parts.unmatched,
        "steps": len(parts.step),
        "mean_local_s": plain(parts.local_s.mean(1)),
        "mean_wait_s": plain(parts.wait_s.mean(1)),
        "mean_transfer_s": plain(parts.transfer_s.mean(1)),
        "caused_wait_s": plain(parts.caused_wait_s),
    }


def gaps(g: Gaps) -> dict[str, Any]:
    return {"rank": g.rank, "noise": noise(g.noise), "periods": plain(g.periods)}


def noise(n: Noise) -> dict[str, Any]:
    """Lengths are told by their figures; the files have each of them."""
    return plain(
        {
            "share": n.share, "level": n.level, "burst": n.burst, "jitter": n.jitter, "observed_s": n.observed_s,
            "tau_s": n.tau_s, "detours": len(n.detours), "per_second": n.per_second, "longest_s": n.longest_s,
            "p50_s": n.quantile_s(0.5), "p99_s": n.quantile_s(0.99), "p999_s": n.quantile_s(0.999),
            "by_decade": {str(k): v for k, v in n.by_decade().items()},
        }
    )  # fmt: skip


def causes(found: Attribution) -> dict[str, Any]:
    made: dict[str, Any] = plain(found.to_json())
    return made
