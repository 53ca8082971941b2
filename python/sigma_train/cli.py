"""`sigma train`, `compare`, `generate` and `export`.

Exit codes: 0 done, or stopped by a signal and saved; 2 wrong input; 1 failure."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[str | None, typer.Option(help="folder of the run")]


def fail(error: Exception, code: int = 2) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(code)


def train(
    preset: Annotated[
        str | None,
        typer.Option(
            help="named settings: tiny-96, tiny-dense, compare-96, compare-dense, smoke, smoke-dense"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings")] = None,
    data: Annotated[list[str] | None, typer.Option(help="file, folder or glob; repeatable")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; repeatable")
    ] = None,
    out: Out = None,
    steps: Annotated[int | None, typer.Option(help="same as --set train.steps=N")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
) -> None:
    """Train a sparse mixture-of-experts language model on text."""
    from rich.console import Console

    from sigma_train.checkpoint import CheckpointError
    from sigma_train.config import ConfigError, load_config
    from sigma_train.corpus import CorpusError

    settings = list(overrides or [])
    settings += [] if steps is None else [f"train.steps={steps}"]
    try:
        cfg = load_config(preset, config, settings)
        changes: dict[str, dict] = {}
        if out is not None:
            changes["train"] = {"out": out}
        if data:
            changes["data"] = {"paths": tuple(data)}
        for section, values in changes.items():
            cfg = cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=values)})

        from sigma_train.loop import Diverged, Trainer

        console = Console()
        trainer = Trainer(cfg, console, resume)
    except (CheckpointError, ConfigError, CorpusError) as error:
        raise fail(error) from None
    model = trainer.model
    total = sum(p.numel() for p in model.parameters())
    console.print(
        f"{total / 1e6:.1f} M parameters, {model.active_parameters() / 1e6:.1f} M active a token; "
        f"{trainer.data.train.num_tokens / 1e6:.1f} M training tokens",
        highlight=False,
    )
    try:
        trainer.run()
    except (Diverged, OSError) as error:
        raise fail(error, 1) from None

    from sigma_train.generate import generate
    from sigma_train.report import write_report

    sample = generate(model, trainer.data.tokenizer, "def ")
    console.print("\nsample:\n", style="bold")
    typer.echo(sample)
    console.print(f"\nreport: {write_report(trainer.out, sample)}", style="bold")


def compare(
    presets: Annotated[list[str], typer.Argument(help="presets to compare")],
    seeds: Annotated[int, typer.Option(min=1, help="runs of each preset")] = 3,
    data: Annotated[list[str] | None, typer.Option(help="file, folder or glob; repeatable")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for all; repeatable")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs/compare"),
) -> None:
    """Train presets on the same tokens with several seeds; continues where it was stopped."""
    from rich.console import Console
    from rich.table import Table

    from sigma_train.checkpoint import CheckpointError
    from sigma_train.compare import COLUMNS
    from sigma_train.compare import compare as run_all
    from sigma_train.config import ConfigError
    from sigma_train.corpus import CorpusError
    from sigma_train.loop import Diverged

    console = Console()
    try:
        runs = run_all(presets, seeds, list(overrides or []), out, console, list(data or []))
    except (CheckpointError, ConfigError, CorpusError) as error:
        raise fail(error) from None
    except (Diverged, OSError) as error:
        raise fail(error, 1) from None
    if runs is None:
        return
    table = Table(*COLUMNS)
    for run in runs:
        table.add_row(*run.line)
    console.print(table)
    console.print(f"wrote {out / 'compare.png'} and {out / 'compare.md'}")


def generate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    prompt: Annotated[str, typer.Option()] = "def ",
    max_tokens: Annotated[int, typer.Option(min=1)] = 120,
    temperature: Annotated[float, typer.Option(min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Continue a prompt with the newest checkpoint of a run."""
    from sigma_train.checkpoint import CheckpointError
    from sigma_train.config import ConfigError
    from sigma_train.generate import generate, load_run

    try:
        model, tokenizer = load_run(run)
    except (CheckpointError, ConfigError, OSError) as error:
        raise fail(error) from None
    typer.echo(generate(model, tokenizer, prompt, max_tokens, temperature, top_k, seed))


def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[str, typer.Option(help="format; transformers")] = "transformers",
) -> None:
    """Write the newest model of a run for Hugging Face transformers."""
    from sigma_train.checkpoint import CheckpointError
    from sigma_train.config import ConfigError
    from sigma_train.export import export_to_transformers

    try:
        if to != "transformers":
            raise ConfigError(f"--to must be transformers, found {to!r}")
        export_to_transformers(run, out)
    except (CheckpointError, ConfigError, OSError) as error:
        raise fail(error) from None
    typer.echo(f"wrote {out}")
