"""What a run records while it goes: one JSON object a line in metrics.jsonl, and the same scalars for TensorBoard."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sigma_train.files import failed_writes_are_oserrors, write_text


class Metrics:
    """Appends rows to metrics.jsonl and to tensorboard/.

    Rows past the step a run resumes from are dropped, so each step stands once.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self._path = path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= first_step] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self._board = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Numbers and lists as they are; on the board one busiest_expert for the load, and each layer's statistics."""
        with failed_writes_are_oserrors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if name == "load":
                self._board.add_scalar("busiest_expert", busiest(value), step)
            elif name == "layers":
                self._write_layers(step, value)
            elif isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
            elif isinstance(value, str):
                self._board.add_text(name, f"```\n{value}\n```", step)

    def _write_layers(self, step: int, values: dict[str, Any]) -> None:
        for name, layers in values.items():
            for layer, value in enumerate(layers if isinstance(layers, list) else []):
                if value is not None:
                    self._board.add_scalar(f"{name}/layer_{layer}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def busiest(load: Sequence[Sequence[int]]) -> float:
    """The busiest expert's tokens over the mean, in the layer where that is largest; load [layers][E]."""
    return 1 + max(most for most, _ in deviations(load))


def deviations(load: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Of each layer the busiest and the idlest expert's tokens over the mean, less 1; load [layers][E]."""
    means = [sum(layer) / len(layer) for layer in load]
    return [(max(layer) / mean - 1, min(layer) / mean - 1) for layer, mean in zip(load, means, strict=True)]


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, but for a last line that a killed process left half written."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
