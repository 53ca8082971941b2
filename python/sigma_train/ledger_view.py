"""Where the time of a run went, for people: a sentence, a table, a bar."""

import html
from typing import TYPE_CHECKING

from sigma_train.account import CAUSES, Account, S, Totals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sigma_train.growth_cost import SunkCostLedger


def share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def duration(seconds: float) -> str:
    """As short as it can be read: 4.2 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, below, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= size:
            part = {"h": 3600, "min": 60, "s": 1}[below]
            return f"{whole // size} {unit} {whole % size // part} {below}"
    raise AssertionError


def sentence(totals: Totals) -> str:
    """The end of a run in one line."""
    losses = [(ns, cause) for cause, ns in totals.spent.items() if cause != "useful" and ns > 0]
    largest = ", ".join(
        f"{cause.replace('_', ' ')} {share(ns / totals.allocated)}" for ns, cause in sorted(losses)[:-4:-1]
    )
    return (
        f"{share(totals.utilisation)} of {duration(totals.elapsed * S)} went into useful steps"
        + (f" ({largest})" if largest else "")
        + f"; mfu {share(totals.mfu_useful)} of the useful and {share(totals.mfu_allocated)} of the allocated time"
        + f"; {totals.interruptions} interruption{'' if totals.interruptions == 1 else 's'}"
    )


def rows(totals: Totals) -> list[tuple[str, str, str, str]]:
    """Cause, seconds times ranks, share of the allocated time, what it means; those that took no time are left out."""
    allocated = totals.allocated or 1
    return [
        (
            cause.replace("_", " "),
            f"{totals.spent[cause] * S:,.1f}",
            share(totals.spent[cause] / allocated),
            told,
        )
        for cause, told in CAUSES.items()
        if totals.spent[cause]
    ]


def facts(totals: Totals) -> list[tuple[str, str]]:
    """The figures beside the causes."""
    recovery = totals.mean_recovery_s
    return [
        ("effective utilisation", share(totals.utilisation)),
        ("MFU of useful time", share(totals.mfu_useful)),
        ("MFU of allocated time", share(totals.mfu_allocated)),
        ("useful tokens a second", f"{totals.tokens_per_s:,.0f}"),
        ("allocated, rank-seconds", f"{totals.allocated * S:,.1f}"),
        ("ranks held for", duration(totals.elapsed * S)),
        ("idle", duration(totals.idle * S)),
        ("attempts", f"{totals.attempts:,}"),
        ("interruptions", f"{totals.interruptions:,}"),
        ("mean time to recovery", "none" if recovery is None else duration(recovery)),
        ("rollbacks", f"{totals.rollbacks:,}"),
        ("steps lost", f"{totals.lost_steps:,}"),
    ]


def cost(ledger: "SunkCostLedger") -> dict[str, float]:
    """What a run's weights have cost, where it began with others' (docs/grow.md)."""
    return {f"{kind}_flops": getattr(ledger, f"{kind}_flops") for kind in ("sunk", "extra", "total")}


def story(account: Account) -> list[str]:
    """Each interruption, and how the last attempt stands."""
    lines = []
    for i in account.interruptions:
        after = "not recovered" if i.recovery is None else f"recovered in {duration(i.recovery * S)}"
        lines.append(f"interrupted after step {i.step}: {i.why or 'no reason is known'}; {after}")
    last = account.attempts[-1]
    how = last.how or ("ended" if last.is_over else "no end is written: it runs, or was killed")
    return [*lines, f"last attempt, to step {account.reached}: {how}"]


def page(totals: Totals) -> str:
    """Two small tables of HTML."""
    causes = "".join(
        f"<tr><td>{cause}<td>{seconds}<td>{part}<td>{html.escape(told)}"
        for cause, seconds, part, told in rows(totals)
    )
    figures = "".join(f"<tr><td>{name}<td>{value}" for name, value in facts(totals))
    head = "<tr><th>cause<th>rank-seconds<th>share<th>what it is"
    return f"<table>{head}{causes}</table><table>{figures}</table>"


def figure(totals: Totals) -> "Figure":
    """One bar of the allocated time, a colour a cause; the legend tells what is too narrow to see."""
    import matplotlib.pyplot as plt  # here: `sigma ledger` draws nothing

    result, axes = plt.subplots(figsize=(11, 1.6))
    left, allocated = 0.0, totals.allocated or 1
    for number, cause in enumerate(CAUSES):
        width = 100 * totals.spent[cause] / allocated
        if width:
            label = f"{cause.replace('_', ' ')} {width:.1f} %"
            axes.barh(0, width, left=left, color=plt.cm.tab20(COLORS[number]), label=label)
        left += width
    axes.set(xlim=(0, 100), yticks=[], xlabel="allocated time, per cent")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=4, frameon=False)
    return result


COLORS = (4, 6, 7, 2, 0, 1, 8, 10, 3, 16, 18, 15)  # of tab20, one a cause
