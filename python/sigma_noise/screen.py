"""The first screen: what a tired engineer needs, in at most 25 lines, the verdict first."""

from collections.abc import Iterator
from math import isfinite

import numpy as np

from sigma_noise.analysis import Analysis, OfRank
from sigma_noise.changes import Change
from sigma_noise.detours import Noise
from sigma_noise.intervals import Interval, picked_of
from sigma_noise.periods import Period
from sigma_noise.project import Projection
from sigma_noise.scores import RankScore
from sigma_noise.units import count, share_of, time_of

HZ = {"khz": 1e3, "mhz": 1e6}  # of gauges such as cpu_khz
MOST_LINES = 25
MOST_WARNINGS = 4
MOST_RANKS = 2  # that stand out, each with its cause
QUIET, NOISY = 0.01, 0.05  # shares of time: less is quiet, more is noisy


def lines(found: Analysis) -> list[str]:
    """Without the name of the files."""
    out = [verdict(found)]
    worst = found.worst
    if worst is not None:
        out += [*noise_of(worst, len(found.of(found.kernel))), *rhythm(worst.periods), *levels(worst)]
    out += idle_loop(found)
    out += [*ranks_of(found), *collectives_of(found)]
    out += [*causes_of(found), *projection(found)]
    return [*out, *warnings_of(found.warnings)]


def warnings_of(texts: tuple[str, ...]) -> Iterator[str]:
    """The first, and how many there are beyond them."""
    shown = texts[:MOST_WARNINGS]
    yield from (f"warning     {text}" for text in shown)
    if len(shown) < len(texts):
        yield f"warning     and {len(texts) - len(shown)} more, in --report and --json"


def verdict(found: Analysis) -> str:
    if found.worst is None:
        return "verdict     no quanta were measured; detours alone"
    noise = found.worst.noise.share
    word = "quiet" if noise < QUIET else "noisy" if noise < NOISY else "very noisy"
    parts = [f"{word}: {share_of(noise)} of the time of {found.kernel} is noise"]
    if found.scores is not None:
        parts.append(standing_out(found.scores.flagged))
    if (best := furthest(found)) is not None:
        parts.append(at_scale(*best))
    return "verdict     " + "; ".join(parts)


def standing_out(ranks: list[int]) -> str:
    match ranks:
        case []:
            return "no rank stands out"
        case [one]:
            return f"rank {one} stands out"
        case [one, other]:
            return f"ranks {one} and {other} stand out"
    return f"ranks {ranks[0]}, {ranks[1]} and {len(ranks) - 2} more stand out"


def furthest(found: Analysis) -> tuple[Projection, int] | None:
    """The first model that has a figure, and where its largest N is."""
    for projected in found.projections:
        known = np.flatnonzero(np.isfinite(projected.slowdown))
        if len(known):
            return projected, int(known[-1])
    return None


def at_scale(p: Projection, i: int) -> str:
    """S(N) with its doubt: the 90 % interval, flags, and by how much half of the ranks mispredict all."""
    doubts = [", ".join(p.flags[i])] if p.flags[i] else []
    if p.backtest_error is not None:
        doubts.append(f"back-test {p.backtest_error:+.1%}")
    told = f" ({'; '.join(doubts)})" if doubts else ""
    return (
        f"{p.ranks[i]:,} ranks would take {p.slowdown[i]:.2f} [{p.low[i]:.2f}, {p.high[i]:.2f}] times as long as "
        f"one{told}"
    )


def noise_of(s: OfRank, ranks: int) -> Iterator[str]:
    of = f"rank {s.rank}, the noisiest of {ranks}" if ranks > 1 else f"rank {s.rank}"
    n, share = s.noise, percents(picked_of(s.share, ranks))
    yield (
        f"noise       {share_of(n.share)} {share} of {of}; detours {share_of(n.burst)}, jitter "
        f"{share_of(n.jitter)}, level {share_of(n.level)}"
    )
    unit = f"{s.median.estimate:.0f} chunks" if s.is_fixed_time else time_of(s.median.estimate)
    yield f"quantum     {unit} (median), n {s.quanta:,}, worth {s.median.n_eff:,.0f} independent ones"
    yield f"detours     {detours_of(n)}"


def detours_of(noise: Noise) -> str:
    if not len(noise.detours):
        return f"none above {time_of(noise.tau_s)}"
    return (
        f"{noise.per_second:.3g}/s above {time_of(noise.tau_s)}, p50 {time_of(noise.quantile_s(0.5))}, "
        f"p99 {time_of(noise.quantile_s(0.99))}, longest {time_of(noise.longest_s)}"
    )


def rhythm(found: tuple[Period, ...]) -> Iterator[str]:
    for p in found[:2]:
        sources = f"; {' or '.join(p.sources)}" if p.sources else "; no known source"
        duty = f", {share_of(p.duty)} of the time" if isfinite(p.duty) else ""
        yield f"period      {time_of(p.period_s)} ({p.frequency_hz:.4g} Hz, p {p.p:.2g}){duty}{sources}"


def levels(s: OfRank) -> Iterator[str]:
    if s.changes:
        big = max(s.changes, key=lambda c: abs(c.shift.estimate))
        of_work = " of the work in a quantum" if s.is_fixed_time else ""
        yield (
            f"level       changed {count(len(s.changes), 'time')}; most at {big.time_s:.1f} s, by "
            f"{big.shift.estimate:+.1%} {percents(big.shift)}{of_work}; {clocks_of(big)}"
        )


def clocks_of(change: Change) -> str:
    """In GHz the one that changed most of those that were read on both sides."""
    if not change.clocks:
        return "clocks were not recorded"
    known = {gauge: sides for gauge, sides in change.clocks.items() if all(map(isfinite, sides))}
    if not known:
        return "clocks were not read on both sides"
    gauge = max(known, key=lambda name: moved(*known[name]))
    name, _, unit = gauge.rpartition("_")
    before, after = (f"{x * HZ[unit] / 1e9:.2f}" for x in known[gauge])
    of = "" if len(known) == 1 else f", which changed most of {len(known)}"
    return f"clock of {name.replace('_', ' ')} {before} to {after} GHz{of}"


def moved(before: float, after: float) -> float:
    """Over the higher of both; a clock that slept says 0."""
    return abs(after - before) / max(before, after, 1.0)


def idle_loop(found: Analysis) -> Iterator[str]:
    if not found.gaps:
        return
    worst = max(found.gaps, key=lambda g: g.noise.share)
    yield f"idle loop   rank {worst.rank}: {share_of(worst.noise.share)} of the time; {detours_of(worst.noise)}"
    if not any(s.periods for s in found.series):
        yield from rhythm(worst.periods[:1])


def ranks_of(found: Analysis) -> Iterator[str]:
    scores = found.scores
    if scores is None:
        return
    for r in sorted(scores.ranks, key=lambda r: r.rank not in scores.flagged)[:MOST_RANKS]:
        yield f"rank {r.rank:<6} {rank_line(r)}"
    yield (
        f"ranks       {len(scores.ranks)} by {found.ranked}, {scores.steps:,} steps: {scores.pattern}; "
        f"{standing_out(scores.flagged)}; the slowest of them makes {scores.slowdown:.3f} of the median rank"
    )


def causes_of(found: Analysis) -> Iterator[str]:
    """Of ranks that stand out, by what they are scored by, and of the noisiest."""
    if found.worst is None:
        return
    standing = [] if found.scores is None else found.scores.flagged[:MOST_RANKS]
    for r in (r for rank in standing for r in found.scores.ranks if r.rank == rank):
        own = found.scored(r.rank)
        of = "" if own is None or own.kernel == found.kernel else f" in {own.kernel}"
        told = [slowness(r, found.options.reference)] if r.is_slow else []
        if own is not None and own.causes is not None:
            told.append(f"{'beside that ' if told else ''}{own.causes.sentence}")
        elif found.is_recorded:
            told.append(f"unknown: {untold(own)}")
        if told:
            yield f"causes      rank {r.rank}{of}: {'; '.join(told)}"
    worst = found.worst
    if not found.is_recorded and not worst.is_fixed_time:
        yield "causes      not recorded; `sigma noise run --attribute` reads the counters that tell"
    elif worst.rank not in standing:
        yield f"causes      rank {worst.rank}: {untold(worst) if worst.causes is None else worst.causes.sentence}"


def untold(own: OfRank | None) -> str:
    """Why no cause is told of a rank."""
    if own is None:
        return "too few quanta"
    return "fixed time is not attributed" if own.is_fixed_time else "nothing was recorded of it"


def slowness(r: RankScore, reference: str) -> str:
    than = {"median": "the median rank's", "min": "the fastest rank's"}[reference]
    return (
        f"all its steps are slow, the usual one {share_of(1 / r.location - 1)} longer than {than}, of unknown cause: "
        "no counter of lost time tells it, clocks and power limits of hosts may"
    )


def collectives_of(found: Analysis) -> Iterator[str]:
    if found.exchanges is None:
        return
    parts = found.exchanges.parts
    times, steps = parts.times_last, len(parts.step)
    wait, transfer = (time_of(float(x.mean())) for x in (parts.wait_s, parts.transfer_s))
    if (decided := int(times.sum())) > 0:
        last = found.exchanges.ranks[int(times.argmax())]
        who = f"rank {last} arrived last in {times.max() / decided:.0%} of {decided:,}"
    else:
        who = f"in none of {steps:,} do the clocks say who arrived last"
    yield f"collective  {who}; mean wait {wait}, transfer {transfer}"


def rank_line(r: RankScore) -> str:
    low, high = r.what_if_together
    return (
        f"{r.kind}: without it S falls by {r.what_if:.4f} [{low:.4f}, {high:.4f}], "
        f"location {r.location:.3f}, tail {r.tail:.3f}, blame {share_of(r.blame)}"
    )


def projection(found: Analysis) -> Iterator[str]:
    for projected in found.projections:
        known = [i for i in range(len(projected.ranks)) if isfinite(float(projected.slowdown[i]))]
        if not known:
            reason = next((r for r in projected.refusals if r), "")
            yield f"S(N) {projected.model:<6} refused: {reason}"
            continue
        figures = ", ".join(one_of(projected, i) for i in known[-3:])
        error = "" if projected.backtest_error is None else f"; back-test {projected.backtest_error:+.1%}"
        yield f"S(N) {projected.model:<6} {figures}{error}, windows of {time_of(found.window_s)}"
        if known[-1] < len(projected.ranks) - 1:
            refused = projected.ranks[known[-1] + 1]
            yield f"            beyond: {refused:,} refused, {projected.refusals[known[-1] + 1]}"


def one_of(projected: Projection, i: int) -> str:
    flags = f" ({', '.join(projected.flags[i])})" if projected.flags[i] else ""
    figure, low, high = projected.slowdown[i], projected.low[i], projected.high[i]
    return f"{projected.ranks[i]:,}: {figure:.3f} [{low:.3f}, {high:.3f}]{flags}"


def percents(x: Interval) -> str:
    ends = [share_of(v) if isfinite(v) else "-" for v in (x.low, x.high)]
    return f"[{ends[0]}, {ends[1]}]"
