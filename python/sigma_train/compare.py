"""`sigma compare`: the same tokens through several settings and seeds, as one picture and one table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console

from sigma_train.config import ConfigError, load_config
from sigma_train.files import atomic_file, write_text
from sigma_train.folder import claimed
from sigma_train.loop import Trainer
from sigma_train.markdown import table
from sigma_train.metrics import read_metrics
from sigma_train.report import png

COLUMNS = (
    "settings",
    "parameters",
    "active",
    "tokens",
    "bits per byte, mean",
    "lowest",
    "highest",
    "tokens/s",
)


@dataclass(frozen=True)
class Runs:
    """All seeds of one preset."""

    preset: str
    parameters: int
    active: int
    rows: list[list[dict[str, Any]]]  # metrics of each seed

    @property
    def final(self) -> list[float]:
        """Bits per byte of each seed's last validation."""
        return [validation(rows)[-1][1] for rows in self.rows]

    @property
    def line(self) -> tuple[str, ...]:
        speeds = [row["tokens_per_s"] for rows in self.rows for row in rows if "tokens_per_s" in row]
        final = self.final
        return (
            self.preset, f"{self.parameters / 1e6:.1f} M", f"{self.active / 1e6:.2f} M",
            f"{validation(self.rows[0])[-1][0]:,}", f"{statistics.mean(final):.4f}", f"{min(final):.4f}",
            f"{max(final):.4f}", f"{statistics.median(speeds):,.0f}",
        )  # fmt: skip


def validation(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(tokens seen, bits per byte) of each validation."""
    return [(row["tokens"], row["val_bits_per_byte"]) for row in rows if "val_bits_per_byte" in row]


def compare(
    presets: Sequence[str],
    seeds: int,
    overrides: list[str],
    out: Path,
    console: Console,
    data: Sequence[str] = (),
) -> list[Runs] | None:
    """Train every preset with seeds 0, 1, ..., each in its folder under `out`, and write compare.png and compare.md.

    Runs that are there are continued, finished ones kept, so the same call goes on where it was stopped.
    Returns: None where a signal stopped a run.  Raises: ConfigError, also if presets do not see the same tokens.
    """
    if len(set(presets)) != len(presets):
        raise ConfigError(f"compare wants different presets, found {', '.join(presets)}")
    options: dict[str, dict[str, Any]] = {"data": {"paths": list(data)}} if data else {}
    configs = {p: load_config(p, None, overrides, options) for p in presets}
    same = {
        (c.train.steps * c.train.batch_size * c.train.seq_len * c.train.grad_accum, c.data)
        for c in configs.values()
    }
    if len(same) > 1:
        raise ConfigError(
            f"compare wants presets with the same data and number of tokens; {', '.join(presets)} differ"
        )
    done: dict[str, Runs] = {}
    for seed in range(seeds):
        for preset in presets:
            folder = out / f"{preset}-seed{seed}"
            config = load_config(
                preset, None, overrides, options | {"train": {"seed": seed, "out": str(folder)}}
            )
            console.print(f"[bold]{preset}[/bold], seed {seed}, in {folder}")
            with claimed(folder):
                trainer = Trainer(config, console, resume=True)
                with trainer.ledger:
                    trainer.run()
            if trainer.is_stopped:
                return None
            former = done.get(preset)
            done[preset] = Runs(
                preset,
                sum(p.numel() for p in trainer.model.parameters()),
                trainer.model.active_parameters(),
                [*(former.rows if former else []), list(read_metrics(folder / "metrics.jsonl"))],
            )
    runs = list(done.values())
    with atomic_file(out / "compare.png") as file:
        file.write(png(figure(runs)))
    write_text(out / "compare.md", page(runs, seeds))
    return runs


def figure(runs: list[Runs]) -> Figure:
    """Validation over tokens: a thin line a seed, a thick one their mean; the last half once more, larger."""
    result, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for number, run in enumerate(runs):
        color = f"C{number}"
        curves = [validation(rows) for rows in run.rows]
        tokens = [point[0] / 1e6 for point in curves[0]]
        mean = [statistics.mean(point[1] for point in points) for points in zip(*curves, strict=True)]
        for part, start in ((axes[0], 0), (axes[1], len(tokens) // 2)):
            for curve in curves:
                part.plot(
                    tokens[start:], [p[1] for p in curve[start:]], color=color, linewidth=0.7, alpha=0.6
                )
            part.plot(
                tokens[start:], mean[start:], color=color, linewidth=2, label=f"{run.preset}: {mean[-1]:.3f}"
            )
    for part, title in zip(axes, ("whole run", "last half"), strict=True):
        part.set(xlabel="training tokens, millions", ylabel="validation, bits per byte", title=title)
        part.grid(alpha=0.3)
        part.legend()
    return result


def page(runs: list[Runs], seeds: int) -> str:
    each = [f"- {run.preset}: {', '.join(f'{bits:.4f}' for bits in run.final)}" for run in runs]
    count = "one seed" if seeds == 1 else f"{seeds} seeds"
    seen = {validation(rows)[-1][0] for run in runs for rows in run.rows}
    after = (
        "the same tokens"
        if len(seen) == 1
        else f"{min(seen):,} to {max(seen):,} tokens, as steps were left out"
    )
    return "\n".join([
        f"# {' against '.join(run.preset for run in runs)}", "",
        f"Validation after {after}, {count}; both curves in compare.png.", "",
        *table(COLUMNS, [run.line for run in runs]), "", "Bits per byte of each seed:", "", *each, "",
    ])  # fmt: skip
