"""The line that a run shows: alive on a terminal, one line every log_every steps elsewhere; both fit 80 columns."""

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sigma_train.console import say
from sigma_train.metrics import deviations

GAP = "  "


class RunLine:
    """Use as a context manager; `update` after each logged step, `say` for what stays on the screen."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._progress = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=steps, completed=step)
        self._more = Text()  # the row below the bar
        self._layers: Mapping[str, Any] = {}
        self._live = Live(Group(self._progress, self._more), console=console)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def look(self, layers: Mapping[str, Any]) -> None:
        """What a look at the layers found, values a layer by name; shown until the next."""
        self._layers = layers

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_s: float,
        share: float | None,
        load: Sequence[Sequence[int]] | None,
        utilisation: float | None = None,
        mfu_useful: float | None = None,
        **_: float,
    ) -> None:
        """share: of the dense twin's tokens a second; load: counts [layers][E]; the rest: of the ledger."""
        first = [f"loss {loss:.4f}", f"{tokens_per_s:,.0f} tokens/s"]
        more = [] if share is None else [f"{share:.0%} of dense"]
        more += [] if load is None else loads(load, self._layers)
        more += [] if utilisation is None else [f"util {utilisation:.0%}"]
        more += [] if mfu_useful is None else [f"mfu {mfu_useful:.0%}"]
        self._progress.update(self._task, completed=step, description=GAP.join(first))
        self._more.plain = in_lines(more, self._console.width, "") if more else ""
        if not self._console.is_terminal:
            parts = [f"step {step:5d}/{self._steps}", *first, *more]
            self.say(in_lines(parts, self._console.width))

    def say(self, text: str, style: str = "") -> None:
        say(self._console, text, style)


def loads(load: Sequence[Sequence[int]], layers: Mapping[str, Any]) -> list[str]:
    """Of layer 0 and of that whose busiest expert is furthest from an even share, and the dead of all layers.

    Busiest and idlest expert against an even share; of the second layer the load's entropy over log E, too, and that of
    the mean probabilities at the last look; of all layers the share of choices that had changed there.
    """
    of = deviations(load)
    worst = max(range(len(of)), key=lambda layer: of[layer][0])
    parts = [f"L{i} {100 * of[i][0]:+.0f}/{100 * of[i][1]:+.0f}%" for i in sorted({0, worst})]
    parts[-1] += f" H{entropy(load[worst]):.2f}"
    if layers:
        p, changes = layers["router_entropy_of_mean"][worst], layers["routing_changes"]
        parts[-1] += "" if p is None else f" p{p:.2f}"
        parts += [] if None in changes else [f"{sum(changes) / len(changes):.0%} rerouted"]
    dead = sum(count == 0 for counts in load for count in counts)
    return [*parts, f"{dead} dead"] if dead else parts


def entropy(counts: Sequence[int]) -> float:
    """Of the shares of at least two experts, over the logarithm of their number: 1 where all are equal."""
    shares = [count / sum(counts) for count in counts if count]
    return sum(share * -math.log(share) for share in shares) / math.log(len(counts))


def in_lines(parts: Sequence[str], width: int, indent: str = 2 * GAP) -> str:
    """Side by side as far as they fit, the rest below."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1] + GAP + part) <= width:
            lines[-1] += GAP + part
        else:
            lines.append(indent + part)
    return "\n".join(lines)
