"""The line that a run shows: alive on a terminal, one line every log_every steps elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunLine:
    """Use as a context manager; `update` after each logged step, `say` for what stays on the screen."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._live = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._live.add_task("", total=steps, completed=step)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def advance(self, step: int) -> None:
        self._live.update(self._task, completed=step)

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_s: float,
        share: float | None,
        busiest: float | None,
        utilisation: float | None = None,
        mfu_useful: float | None = None,
        **_: float,
    ) -> None:
        """share: of the dense twin's tokens a second; busiest: expert load over the mean; the rest: of the ledger."""
        parts = [f"loss {loss:.4f}", f"{tokens_per_s:,.0f} tokens/s"]
        parts += [] if share is None else [f"{share:.0%} of dense"]
        parts += [] if busiest is None else [f"load {busiest:.1f} x mean"]
        parts += [] if utilisation is None else [f"util {utilisation:.0%}"]
        parts += [] if mfu_useful is None else [f"mfu {mfu_useful:.0%}"]
        line = "  ".join(parts)
        self._live.update(self._task, completed=step, description=line)
        if not self._console.is_terminal:
            self.say(f"step {step:5d}/{self._steps}  {line}")

    def say(self, text: str, style: str = "") -> None:
        self._live.console.print(text, style=style, highlight=False, soft_wrap=True)
