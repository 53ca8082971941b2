"""What an experiment found: a page with its pictures, and every figure of it as JSON."""

import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sigma_train import markdown
from sigma_train.files import atomic_file, write_text
from sigma_train.processor import processor_name
from sigma_train.report import png

import sigma_kernels as sk
from sigma_kernels import _C


@dataclass(frozen=True)
class Page:
    """text: Markdown after the heading, which names pictures as `NAME-KEY.png`; data: what JSON can hold."""

    title: str
    text: str
    figures: Mapping[str, Figure]
    data: Mapping[str, Any]


def write(
    page: Page, folder: Path, name: str, command: str, seconds: float, processor_s: float, kept: int = 0
) -> Path:
    """NAME.md, NAME.json and the pictures, each whole; returns the page's path.

    Args: seconds by the clock, and of the trainings by their processors, which what else runs here does not lengthen.
        kept: trainings of calls before, which are in neither.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for key, figure in page.figures.items():
        with atomic_file(folder / f"{name}-{key}.png") as file:
            file.write(png(figure))
    write_text(folder / f"{name}.json", json.dumps(page.data, indent=1) + "\n")
    without = f", without {kept} of calls before" if kept else ""
    made = (
        f"Made by `{command}` on {datetime.date.today()} in {seconds / 60:.1f} minutes, trainings of "
        f"{processor_s / 60:.1f} core-minutes in them{without}: {processor_name()}, ISA {_C.isa()}, "
        f"torch {torch.__version__}, sigma-kernels {sk.__version__}. All figures: [{name}.json]({name}.json)."
    )
    write_text(folder / f"{name}.md", f"# {page.title}\n\n{made}\n\n{page.text.strip()}\n")
    return folder / f"{name}.md"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown.table(columns, rows))


def spread(values: Sequence[float], digits: int = 3, unit: str = "") -> str:
    """Mean and, of several, lowest and highest: '1.234 [1.2, 1.3]'."""
    text = f"{statistics.mean(values):z.{digits}f}{unit}"  # z: a zero has no sign
    if len(values) == 1:
        return text
    return f"{text} [{min(values):z.{digits}f}, {max(values):z.{digits}f}]"


def draw(axes: Axes, x: Sequence[float], values: np.ndarray, color: str, label: str | None = None) -> None:
    """values [seeds, x]: a thin line each, and their mean."""
    axes.plot(x, values.T, color=color, linewidth=0.6, alpha=0.6)
    axes.plot(x, values.mean(0), color=color, linewidth=1.8, label=label)
