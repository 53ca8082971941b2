"""What noise cost a training, for people: a sentence and a small page of HTML."""

import html

from sigma_noise.step_causes import Late
from sigma_noise.steps import StepNoise


def sentence(noise: StepNoise) -> str:
    """The end of a run in one line."""
    if len(noise.ranks) == 1:
        return (
            f"noise: one rank waits for nobody; garbage collection took {_share(noise.gc_s[0], noise)} "
            f"of {noise.steps:,} steps"
        )
    worst = noise.ranks.index(noise.worst)
    cost = f"noise: uneven ranks cost {noise.cost_s:.2f} s, {noise.cost_share:.1%} of {noise.steps:,} steps; "
    if not noise.is_uneven:
        return f"{cost}no rank was slower than like ranks are by chance"
    return (
        f"{cost}rank {noise.worst} computed {noise.excess_s[worst]:.2f} s longer than the median rank "
        f"and was the slowest in {noise.slowest[worst] / noise.steps:.0%} of them"
    )


def lines(noise: StepNoise, why: Late | None) -> list[str]:
    why = _more_than_chance(noise, why)
    return [sentence(noise), *([] if why is None else [why.sentence])]


def page(noise: StepNoise, why: Late | None = None) -> str:
    """A table of the ranks, of what made one late, and of the phases, seconds in all steps."""
    columns = {
        "local": noise.local_s,
        "over the median": noise.excess_s,
        "alone cost": noise.blame_s,
        "waited": noise.wait_s,
        "transfer": noise.transfer_s,
        "gc": noise.gc_s,
    }
    head = "".join(f"<th>{name}, s" for name in columns)
    rows = "".join(
        f"<tr><td>{rank}"
        + "".join(f"<td>{seconds[i]:.2f}" for seconds in columns.values())
        + f"<td>{noise.slowest[i]:,}<td>{noise.last[i]:,}"
        for i, rank in enumerate(noise.ranks)
    )
    ranks = f"<table><tr><th>rank{head}<th>slowest, steps<th>last, collectives{rows}</table>"
    why = _more_than_chance(noise, why)
    told = f"<p>{html.escape(sentence(noise))}. {html.escape(_balance(noise))}</p>"
    return told + ranks + ("" if why is None else _causes(why)) + _phases(noise)


def _more_than_chance(noise: StepNoise, why: Late | None) -> Late | None:
    """What made a rank late, if it or one of its causes is more than chance."""
    tells = why is not None and (noise.is_uneven or any(gain.low > 0 for gain in why.regained.values()))
    return why if tells else None


def _causes(why: Late) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(share.cause)}<td>{share.seconds:.2f}<td>{share.share:.0%}"
        f"<td>{gain.seconds * 1e3:.2f}<td>{gain.low * 1e3:.2f} to {gain.high * 1e3:.2f}"
        + (f"<td>{gain.by_steps.seconds * 1e3:.2f}" if gain.by_steps else "<td>")
        for share in why.causes.shares
        for gain in [why.regained[share.cause]]
    )
    unknown = why.causes.unknown
    return (
        f"<p>{html.escape(why.sentence)}.</p><table><tr><th>what rank {why.rank} lost, by cause<th>s<th>share"
        f"<th>without it a step takes less, ms<th>90 %<th>by steps without it{rows}"
        f"<tr><td>unknown<td>{unknown.seconds:.2f}<td>{unknown.share:.0%}<td><td><td></table>"
    )


def _balance(noise: StepNoise) -> str:
    return (
        f"The slowest rank of each step computed {noise.slowest_s:.2f} s, ranks on average {noise.mean_s:.2f} s, "
        f"of {noise.steps_s:.2f} s in steps; the rest went by in {noise.collectives:,} collectives. "
        "Uneven work, as of experts with more tokens, is part of it."
    )


def _phases(noise: StepNoise) -> str:
    """Mean and extremes over ranks."""
    named = {**noise.phases_s, **{f"{name}, between steps": x for name, x in noise.pauses_s.items()}}
    rows = "".join(
        f"<tr><td>{name}<td>{seconds.mean():.2f}<td>{_share(seconds.mean(), noise)}"
        f"<td>{seconds.min():.2f}<td>{seconds.max():.2f}"
        for name, seconds in named.items()
    )
    return f"<table><tr><th>phase<th>mean, s<th>of steps<th>least rank<th>most{rows}</table>"


def _share(seconds: float, noise: StepNoise) -> str:
    return f"{seconds / noise.steps_s:.1%}" if noise.steps_s else "0.0%"
