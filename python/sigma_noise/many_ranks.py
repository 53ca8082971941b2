"""`sigma noise project`: S(N) of a measurement, by several models, as a table."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from sigma_train.console import say

from sigma_noise import changes, detours
from sigma_noise.attribution import Claims, claims_of_trace
from sigma_noise.budget import Budget, regained
from sigma_noise.detours import FLOOR
from sigma_noise.lost import Lost
from sigma_noise.project import Projection, Work, project, project_replay
from sigma_noise.replay import Detours
from sigma_noise.step import FLAGS, Barrier
from sigma_noise.step_ranks import step_windows
from sigma_noise.steps import has_steps
from sigma_noise.trace import Trace
from sigma_noise.units import count, share_of, time_of
from sigma_noise.windows import FEWEST_QUANTA, Windows, chosen, exchanges_of, windows_of

MODELS = ("ecdf", "gpd", "replay")


def projections(
    measured: Trace,
    *,
    kernel: str | None,
    ranks: Sequence[int],
    window_s: float | None,
    per_step: int,
    models: Sequence[str],
    is_cosched: bool,
    seed: int,
) -> list[Projection]:
    """One of each model, all of the same windows.

    Raises: ValueError for a model or a kernel that is none, collectives that cannot be, or a trace without windows.
    """
    if wrong := [m for m in models if m not in MODELS]:
        raise ValueError(f"--model must be of {', '.join(MODELS)}, found {wrong[0]!r}")
    if is_cosched and set(models) != {"replay"}:
        raise ValueError(f"--cosched is of --model replay, found {','.join(models)}")
    if "replay" in models and has_steps(measured):
        raise ValueError(
            "--model replay is of quanta of fixed work; a record of sigma train takes ecdf and gpd, found replay"
        )
    windows = windows_to_project(measured, kernel, window_s, per_step)
    found = []
    for model in models:
        if model == "replay":
            found.append(replayed(measured, windows, per_step, ranks, is_cosched, seed))
        else:
            barrier = Barrier(windows.what, list(windows.rows.values()), per_step)
            found.append(project([barrier], ranks, hosts=windows.host_names, model=model, seed=seed))
    return found


def windows_to_project(measured: Trace, kernel: str | None, window_s: float | None, per_step: int) -> Windows:
    """Between two of the `per_step` barriers of a step whose work is `window_s`.  Of a training what each rank computed
    by itself in each step: it has no kernels and no other windows.
    """
    if has_steps(measured):
        return step_windows(measured)[0]
    exchanges, impossible = exchanges_of(measured) if kernel is None else (None, "")
    if impossible:
        raise ValueError(f"{impossible}; --kernel names one to project by its quanta")
    windows = windows_of(measured, chosen(measured, kernel), exchanges, window_s, per_step)
    if windows is None:
        raise ValueError(f"collectives or {FEWEST_QUANTA} quanta of fixed work are wanted, found none")
    return windows


def replayed(
    measured: Trace, windows: Windows, per_step: int, ranks: Sequence[int], is_cosched: bool, seed: int
) -> Projection:
    """Of quanta as traces of detours: what each took beyond its rank's floor, at the useful time at which it did."""
    by_host: dict[str, list[Detours]] = {}
    for rank, host in zip(windows.rows, windows.host_names, strict=True):
        series = measured.get(rank, "quantum", windows.kernel)
        if not len(series):
            raise ValueError(f"--model replay wants quanta of {windows.kernel}, found none of rank {rank}")
        seconds = series.seconds
        excess = np.maximum(0.0, seconds - float(np.quantile(seconds, FLOOR)))
        # One after another: what lies between is not its work.
        start_s = np.concatenate([[0.0], np.cumsum(seconds)])
        took, end_s = excess > 0, float(start_s[-1])
        start_s = start_s[:-1]
        by_host.setdefault(host, []).append(Detours.of(start_s[took], excess[took], end_s))
    work = [Work(windows.what, windows.work_s, per_step)]
    return project_replay(list(by_host.values()), work, ranks, is_cosched=is_cosched, seed=seed)


def without(
    measured: Trace,
    cause: str,
    *,
    kernel: str | None,
    ranks: Sequence[int],
    window_s: float | None,
    per_step: int,
    models: Sequence[str],
    seed: int,
) -> list[Budget]:
    """What would be regained if a cause were gone from all ranks, by models other than replay.

    Raises: ValueError as `projections`, or for a cause that took nothing.
    """
    if has_steps(measured):
        raise ValueError(
            "--without is of quanta; what a step of a training would take less without a cause `sigma noise analyze` "
            "says"
        )
    if "replay" in models:
        raise ValueError("--without is of --model ecdf and gpd, found replay")
    windows = windows_to_project(measured, kernel, window_s, per_step)
    claimed = {rank: _claims(measured, rank, windows.kernel) for rank in windows.rows}
    causes = sorted({name for of in claimed.values() for name, bins in of.credit.items() if bins.any()})
    if cause not in causes:
        raise ValueError(
            f"--without must be a cause that was seen, of {', '.join(causes) or 'none'}, found {cause!r}"
        )
    rows, removed = [], []
    for rank, row in windows.rows.items():
        taken = (
            claimed[rank].of_quanta(cause)
            if cause in claimed[rank].credit
            else np.zeros(len(claimed[rank].lost.start_ns))
        )
        rows.append(row)
        removed.append(np.minimum(windows.sums(rank, taken), row * (1 - 1e-9)))
    return [
        regained(rows, removed, ranks, per_step=per_step, hosts=windows.host_names, model=model, seed=seed)
        for model in models
    ]


def _claims(measured: Trace, rank: int, kernel: str) -> Claims:
    series = measured.get(rank, "quantum", kernel)
    if not len(series):
        raise ValueError(f"--without wants quanta of {kernel}, found none of rank {rank}")
    floor = detours.floor(series.seconds, changes.segments(np.maximum(series.seconds, 1e-9)))
    return claims_of_trace(measured, rank, Lost.over_floor(series, floor))


def show_regained(cause: str, found: Sequence[Budget]) -> None:
    console = Console()
    for b in found:
        table = Table(
            "ranks", "regained a step", "90 %", "of the step", "flags", title=f"without {cause}, {b.model}"
        )
        for i, n in enumerate(b.ranks):
            if b.refusals[i] is not None:
                table.add_row(f"{n:,}", "-", "-", "-", "refused")
            else:
                interval = f"{time_of(float(b.low[i]))} to {time_of(float(b.high[i]))}"
                table.add_row(
                    f"{n:,}", time_of(float(b.seconds[i])), interval, share_of(float(b.share[i])), ", ".join(b.flags[i])
                )  # fmt: skip
        console.print(table)
        for n, reason in zip(b.ranks, b.refusals, strict=True):
            if reason is not None:
                say(console, f"{n:,} ranks: {reason}")


def over_budget(found: Sequence[Projection], budget: float) -> bool | None:
    """Whether S at the largest N is certain to be above, by any model; None if no model has a figure there."""
    at = int(np.argmax(found[0].ranks))
    low = [float(p.low[at]) for p in found if np.isfinite(p.low[at])]
    return any(x > budget for x in low) if low else None


def show(found: Sequence[Projection], per_step: int) -> None:
    console = Console()
    for p in found:
        cut = f" in {per_step} windows of {time_of(p.mean_s / per_step)}" if per_step > 1 else ""
        error = "" if p.backtest_error is None else f", back-test error {p.backtest_error:+.1%}"
        kappa = "" if p.kappa is None else f", hosts independent to {p.kappa:.2f}"
        say(
            console,
            f"{p.model}: a step of {time_of(p.mean_s)} on one rank{cut}, {time_of(p.floor_s)} without noise; "
            f"{count(p.measured_ranks, 'rank')} on "
            f"{count(p.measured_hosts, 'host')}, {p.windows:,} windows worth {p.effective:,.0f}{error}{kappa}",
        )
        table = Table("ranks", "S(N)", "90 %", "over the floor", "a step", "flags")
        for i, n in enumerate(p.ranks):
            if p.refusals[i] is not None:
                table.add_row(f"{n:,}", "-", "-", "-", "-", "refused")
            else:
                table.add_row(
                    f"{n:,}", f"{p.slowdown[i]:.4f}", f"{p.low[i]:.4f} to {p.high[i]:.4f}", f"{p.over_floor[i]:.4f}",
                    time_of(float(p.step_s[i])), ", ".join(p.flags[i]),
                )  # fmt: skip
        console.print(table)
        for n, reason in zip(p.ranks, p.refusals, strict=True):
            if reason is not None:
                say(console, f"{n:,} ranks: {reason}")
    for flag in sorted({flag for p in found for flags in p.flags for flag in flags}):
        say(console, f"{flag}: {FLAGS[flag]}")
