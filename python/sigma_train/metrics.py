"""What a run says while it goes: one JSON object a line in metrics.jsonl, and a line on the terminal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Metrics:
    """Appends rows to metrics.jsonl.  Rows past the step a run resumes from are dropped, so each step stands once."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= first_step] if path.exists() else []
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run

    def write(self, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, but for a last line that a killed process left half written."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
