"""The pictures of a report, each of one question."""

from math import isfinite

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sigma_noise import detours, pareto, periods, spectrum
from sigma_noise.analysis import Analysis, OfRank
from sigma_noise.trace import Trace
from sigma_noise.units import time_of

COLUMNS = 240  # of the heat map
MOST_RANKS = 12  # with a curve or bar of their own; of more, those that cost most
BLUE, RED, GREY = "#2b6cb0", "#c53030", "#718096"


def figures(trace: Trace, found: Analysis) -> dict[str, Figure]:
    """By title; those whose question the measurement does not answer are missing."""
    made = {
        "When and where": heat_map(trace, found),
        "How long detours are": ccdf(found),
        "Rhythm": folded(found),
        "Spectrum": lines(trace, found),
        "What ranks cost": rank_bars(found),
        "Causes": causes(found),
        "Many ranks": fan(found),
        "Windows and their tail": tail(found),
    }
    return {title: figure for title, figure in made.items() if figure is not None}


def heat_map(trace: Trace, found: Analysis) -> Figure | None:
    """Excess over the floor of its time, mean of a cell; a host's time begins with the first quantum on it."""
    of = [s for s in found.of(found.kernel) if not s.is_fixed_time]
    if not of:
        return None
    series = {s.rank: trace.get(s.rank, "quantum", found.kernel) for s in of}
    begin: dict[str, int] = {}
    for rank, x in series.items():
        host = found.hosts[rank]
        begin[host] = min(int(x.start_ns[0]), begin.get(host, int(x.start_ns[0])))
    span = max(1, *(int(x.end_ns[-1]) - begin[found.hosts[rank]] for rank, x in series.items()))
    cells = np.full((len(of), COLUMNS), np.nan)
    for row, s in zip(cells, of, strict=True):
        x = series[s.rank]
        seconds = x.seconds
        at = np.minimum((x.start_ns - begin[found.hosts[s.rank]]) * COLUMNS // span, COLUMNS - 1)
        spent = np.bincount(at, seconds, COLUMNS)
        lost = np.bincount(at, np.maximum(0.0, seconds - detours.floor(seconds, s.bounds)), COLUMNS)
        np.divide(lost, spent, out=row, where=spent > 0)
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.25 * min(len(of), 40)))
    image = axes.imshow(
        cells * 100, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0,
        extent=(0, span * 1e-9, len(of) - 0.5, -0.5),
    )  # fmt: skip
    if len(of) <= 40:
        axes.set_yticks(range(len(of)), [str(s.rank) for s in of])
    axes.set(
        xlabel="seconds since the first of the host",
        ylabel="rank",
        title=f"time of {found.kernel} beyond its floor, %",
    )
    figure.colorbar(image, ax=axes, label="% of the time")
    return figure


def ccdf(found: Analysis) -> Figure | None:
    shown = [(f"rank {s.rank}, {s.kernel}", s.noise) for s in costly(found) if len(s.noise.detours)]
    shown += [(f"rank {g.rank}, idle loop", g.noise) for g in found.gaps[:MOST_RANKS] if len(g.noise.detours)]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for label, noise in shown:
        length, share = detours.ccdf(noise.detours.length_s)
        axes.step(length * 1e3, share * noise.per_second, where="post", label=label, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="length, ms", ylabel="detours at least so long, a second")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(fontsize=8)
    return figure


def costly(found: Analysis) -> list[OfRank]:
    of = [s for s in found.series if s.kernel == found.kernel]
    return sorted(of, key=lambda s: -s.noise.share)[:MOST_RANKS]


def folded(found: Analysis) -> Figure | None:
    """Lost time by phase of the strongest period of all."""
    trains = [(s.noise, p, f"rank {s.rank}, {s.kernel}") for s in found.series for p in s.periods[:1]]
    trains += [(g.noise, p, f"rank {g.rank}, idle loop") for g in found.gaps for p in g.periods[:1]]
    if not trains:
        return None
    noise, period, where = max(trains, key=lambda train: train[1].h)
    phase, lost = periods.fold(
        noise.detours.start_s, period.period_s, weight=noise.detours.length_s,
        phase_s=period.phase_s - period.period_s / 2,
    )  # fmt: skip
    cycles = max(1.0, noise.observed_s / period.period_s)
    figure, axes = plt.subplots(figsize=(7, 3.4))
    axes.bar(
        (phase - period.period_s / 2) * 1e3,
        lost / cycles * 1e3,
        width=period.period_s * 1e3 / len(phase),
        color=BLUE,
    )
    named = f" ({' or '.join(period.sources)})" if period.sources else ""
    axes.set(
        xlabel=f"ms from the pulse of a period of {time_of(period.period_s)}{named}", ylabel="lost a cycle, ms",
        title=where,
    )  # fmt: skip
    return figure


def lines(trace: Trace, found: Analysis) -> Figure | None:
    """Welch's spectrum of work done, of the noisiest rank with quanta of fixed time, where none is missing."""
    worst = max((s for s in found.series if s.is_fixed_time), key=lambda s: s.noise.share, default=None)
    if worst is None:
        return None
    cells = trace.get(worst.rank, "quantum", worst.kernel)
    step_s, stretch = spectrum.on_a_grid(cells.since(int(cells.start_ns[0])))
    best = detours.floor(cells.value, worst.bounds, 1 - detours.FLOOR)
    count = detours.told(cells.value, float(np.median(cells.seconds)), best)[stretch]
    if len(count) < spectrum.FEWEST or np.ptp(count) == 0:
        return None
    s = spectrum.welch(count, step_s)
    figure, axes = plt.subplots(figsize=(7, 3.4))
    axes.plot(s.frequency_hz, s.power, color=BLUE, linewidth=0.8, label="chunks², a Hz")
    axes.plot(s.frequency_hz, s.alarm, color=RED, linewidth=0.8, linestyle="--", label="a line is above this")
    axes.set(xscale="log", yscale="log", xlabel="Hz", title=f"rank {worst.rank}, {worst.kernel}")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(fontsize=8)
    return figure


def rank_bars(found: Analysis) -> Figure | None:
    if found.scores is None:
        return None
    shown = found.scores.ranks[:MOST_RANKS]
    y = np.arange(len(shown))
    value = np.array([r.what_if for r in shown])
    low, high = (np.array([getattr(r.what_if_together, end) for r in shown]) for end in ("low", "high"))
    figure, axes = plt.subplots(figsize=(7, 1.4 + 0.32 * len(shown)))
    flagged = set(found.scores.flagged)
    axes.barh(y, value, color=[RED if r.rank in flagged else GREY for r in shown])
    axes.errorbar(
        value,
        y,
        xerr=[np.maximum(0, value - low), np.maximum(0, high - value)],
        fmt="none",
        ecolor="black",
        capsize=3,
    )
    axes.set_yticks(y, [f"rank {r.rank}: {r.kind}" for r in shown])
    axes.invert_yaxis()
    axes.set(
        xlabel="S less S with this rank replaced by a median one, 95 % of all together",
        title=str(found.ranked),
    )
    return figure


def causes(found: Analysis) -> Figure | None:
    of = [s for s in costly(found) if s.causes is not None and s.causes.lost_s > 0]
    if not of:
        return None
    names = sorted({share.cause for s in of for share in (*s.causes.shares, s.causes.unknown)})  # type: ignore[union-attr]
    names = [n for n in names if n != "unknown"] + ["unknown"]
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.35 * len(of)))
    left = np.zeros(len(of))
    for i, name in enumerate(names):
        width = np.array([
            next((x.seconds for x in (*s.causes.shares, s.causes.unknown) if x.cause == name), 0.0) for s in of  # type: ignore[union-attr]
        ])  # fmt: skip
        color = "#cbd5e0" if name == "unknown" else plt.get_cmap("tab10")(i % 10)
        axes.barh(range(len(of)), width, left=left, label=name, color=color)
        left += width
    axes.set_yticks(range(len(of)), [f"rank {s.rank}" for s in of])
    axes.invert_yaxis()
    axes.set(xlabel=f"seconds lost of {found.kernel}")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4)
    return figure


def fan(found: Analysis) -> Figure | None:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    drawn = False
    for projected, color in zip(found.projections, (BLUE, RED), strict=False):
        known = [i for i in range(len(projected.ranks)) if isfinite(float(projected.slowdown[i]))]
        if not known:
            continue
        N = np.array([projected.ranks[i] for i in known])
        axes.plot(N, projected.slowdown[known], "o-", color=color, label=projected.model)
        axes.fill_between(N, projected.low[known], projected.high[known], color=color, alpha=0.2, linewidth=0)
        doubted = [i for i in known if "extrapolated" in projected.flags[i]]
        axes.plot(
            [projected.ranks[i] for i in doubted], projected.slowdown[doubted], "o", mfc="white", mec=color
        )
        drawn = True
    if not drawn:
        plt.close(figure)
        return None
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="ranks", ylabel="time of a window over that of one rank, 90 %",
        title=f"windows of {time_of(found.window_s)}; hollow: extrapolated",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def tail(found: Analysis) -> Figure | None:
    """The fitted tail against the windows themselves, as they exceed its threshold."""
    fitted = next((t for p in found.projections for t in p.tails), None)
    if fitted is None or found.windows is None:
        return None
    x = np.sort(found.windows.longest_s)
    beyond = 1 - np.arange(len(x)) / len(x)
    y = np.linspace(0, (x[-1] - fitted.threshold) * 1.5, 200)
    law = fitted.share * np.exp(pareto.log_survival(y, np.float64(fitted.shape), np.float64(fitted.scale)))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    axes.step(x * 1e3, beyond, where="post", color=BLUE, label="measured")
    axes.plot(
        (fitted.threshold + y) * 1e3, law, color=RED, label=f"generalised Pareto, shape {fitted.shape:.2f}"
    )
    axes.axvline(fitted.threshold * 1e3, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(yscale="log", xlabel="window, ms", ylabel="share of windows at least so long")
    axes.set_ylim(bottom=0.3 / len(x))
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend()
    return figure
