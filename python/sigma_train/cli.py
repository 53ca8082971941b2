"""`sigma train`, `compare`, `generate` and `export`; what they raise becomes an exit code in `errors.verdict`."""

from pathlib import Path
from typing import Annotated

import typer

from sigma_train.options import ConfigFile, Data, Dtype, Overrides, Preset

Out = Annotated[str | None, typer.Option(help="folder of the run")]


def train(
    preset: Preset = None,
    config: ConfigFile = None,
    data: Data = None,
    overrides: Overrides = None,
    out: Out = None,
    steps: Annotated[int | None, typer.Option(help="same as --set train.steps=N")] = None,
    dtype: Dtype = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="record step times of every rank; same as --set train.noise=true")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="ranks on this machine, with the experts spread over them")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="of all ranks of --nproc, after one of them died")
    ] = 3,
    report: Annotated[bool, typer.Option(help="a sample and report.html at the end")] = True,
) -> None:
    """Train a sparse mixture-of-experts language model on text."""
    import contextlib
    import os
    import sys

    from rich.console import Console

    from sigma_train.config import load_config
    from sigma_train.console import say

    named = {"out": out, "steps": steps, "dtype": dtype, "noise": noise or None}
    options = {
        "train": {key: value for key, value in named.items() if value is not None},
        "data": {"paths": data} if data else {},
    }
    cfg = load_config(
        preset, config, list(overrides or []), options
    )  # wrong settings need not wait for torch

    from sigma_train.ranks import is_launched, joined, restarts

    if nproc is not None and not is_launched():
        from sigma_train.launch import launch

        launch(
            nproc, max_restarts, sys.argv[2:], lambda text: typer.echo(text, err=True), Path(cfg.train.out)
        )
        return

    from sigma_train.folder import claimed
    from sigma_train.generate import generate
    from sigma_train.ledger import process_start
    from sigma_train.ledger_view import sentence
    from sigma_train.loop import Trainer
    from sigma_train.mesh import sizes

    if report:  # before the run: what is missing for it is not to be found out at the end
        from sigma_train.report import noise_of, write_report
    if (size := os.environ.get("WORLD_SIZE", "")).isdigit() and is_launched():
        sizes(cfg, int(size))  # once they meet, one that refuses is a lost rank to one that is still joining

    with joined(cfg.train.rank_timeout_s) as ranks, contextlib.ExitStack() as stack:
        console = Console(quiet=not ranks.is_first)
        if ranks.is_first:
            stack.enter_context(claimed(Path(cfg.train.out)))
        trainer = Trainer(cfg, console, resume or restarts() > 0, ranks, process_start())
        stack.enter_context(trainer.ledger)
        model = trainer.model
        total = sum(p.numel() for p in model.parameters())
        console.print(
            f"{total / 1e6:.1f} M parameters, {model.active_parameters() / 1e6:.1f} M active a token; "
            f"{trainer.data.train.num_tokens / 1e6:.1f} M training tokens"
            + (f"; {ranks.size} ranks" if ranks.size > 1 else ""),
            highlight=False,
        )
        trainer.run()
        if not report:
            trainer.ledger.turn("unknown")
            say(console, sentence(trainer.ledger.totals()))
            return
        sample = generate(model, trainer.data.tokenizer, "def ", ranks=ranks)
        if ranks.is_first:
            say(console, "\nsample:\n", "bold")
            typer.echo(sample)
            try:
                noise = noise_of(trainer.out)
            except (OSError, ValueError) as error:
                noise = None
                why = " ".join(str(error).split())
                say(console, f"noise: not in the report, {why}", "yellow")
            say(console, f"\nreport: {write_report(trainer.out, sample, noise)}", "bold")
            trainer.ledger.turn("unknown")
            say(console, sentence(trainer.ledger.totals()))
            if noise is not None:
                from sigma_noise import steps_view

                for line in steps_view.lines(*noise):
                    say(console, line)


def compare(
    presets: Annotated[list[str], typer.Argument(help="presets to compare")],
    seeds: Annotated[int, typer.Option(min=1, help="runs of each preset")] = 3,
    data: Data = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs/compare"),
) -> None:
    """Train presets on the same tokens with several seeds; continues where it was stopped."""
    from rich.console import Console
    from rich.table import Table

    from sigma_train.compare import COLUMNS
    from sigma_train.compare import compare as run_all
    from sigma_train.console import say

    console = Console()
    runs = run_all(presets, seeds, list(overrides or []), out, console, list(data or []))
    if runs is None:
        return
    table = Table(*COLUMNS)
    for run in runs:
        table.add_row(*run.line)
    console.print(table)
    say(console, f"wrote {out / 'compare.png'} and {out / 'compare.md'}")


def generate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    prompt: Annotated[str, typer.Option()] = "def ",
    max_tokens: Annotated[int, typer.Option(min=1)] = 120,
    temperature: Annotated[float, typer.Option(min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Continue a prompt with the newest checkpoint of a run."""
    from sigma_train.errors import WrongInput
    from sigma_train.kinds import SEED_MAX

    if not 0 <= seed <= SEED_MAX:
        raise WrongInput(f"--seed must be an integer from 0 to {SEED_MAX}, found {seed}")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python keeps bytes that are none
        raise WrongInput(f"--prompt must be UTF-8 text, found {prompt!r}")

    from sigma_train.generate import generate, load_run

    _, model, tokenizer = load_run(run)
    typer.echo(generate(model, tokenizer, prompt, max_tokens, temperature, top_k, seed))


def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[str, typer.Option(help="format; transformers")] = "transformers",
    top_k: Annotated[
        str | None, typer.Option(help="experts a token, as 2, or of each layer; model.top_k where not given")
    ] = None,
) -> None:
    """Write the newest model of a run for Hugging Face transformers."""
    from sigma_train.elastic_cli import numbers
    from sigma_train.errors import WrongInput

    chosen = numbers("--top-k", top_k)
    if to != "transformers":
        raise WrongInput(f"--to must be transformers, found {to!r}")

    from sigma_train.export import export_to_transformers

    export_to_transformers(run, out, chosen[0] if len(chosen) == 1 else chosen or None)
    typer.echo(f"wrote {out}")
