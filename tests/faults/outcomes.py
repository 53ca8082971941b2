"""What the campaign saw, and the page that it writes."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import sigma_kernels as sk


@dataclass
class Outcome:
    """Of one kind of fault; steps of each time."""

    fault: str
    times: int
    detected: str
    recovered: str
    lost_steps: list[int]
    losses: str

    @property
    def line(self) -> str:
        lost = str(max(self.lost_steps))
        if self.times > 1:
            lost += f" at most, {sum(self.lost_steps)} in all"
        return (
            f"| {self.fault} | {self.times} | {self.detected} | {self.recovered} | {lost} | {self.losses} |"
        )


def write_page(path: Path, outcomes: list[Outcome], what: str) -> None:
    head = "| fault | times | found | recovered | steps computed again | losses against the undisturbed run |"
    lines = [
        "# Fault campaign",
        "",
        f"    pytest tests -m faults --kills 20 --page {path}",
        "",
        what,
        "",
        f"Machine: {platform.machine()}, {sk._C.isa()}, torch {torch.__version__}. "
        "How long recovery takes: `sigma ledger RUN`.",
        "",
        head,
        "|---|---|---|---|---|---|",
        *(each.line for each in outcomes),
        "",
    ]
    path.write_text("\n".join(lines))
