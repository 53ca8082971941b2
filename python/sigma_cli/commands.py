"""The commands of `sigma`.  Heavy imports wait until a command runs, so that --help answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from sigma_train import cli as train_cli
from sigma_train import ledger_cli, plan_cli

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(train_cli.train)
app.command()(train_cli.compare)
app.command()(train_cli.generate)
app.command()(train_cli.export)
app.command()(plan_cli.plan)
app.command()(ledger_cli.ledger)


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


@app.command()
def doctor() -> None:
    """Show versions, processor, instruction set and the table of backends on this machine."""
    from sigma_kernels.doctor import report

    typer.echo(report())


@app.command()
def bench(
    group: Annotated[str, typer.Argument(help="races to run, a pytest -k expression; test: all")] = "test",
    quick: Annotated[
        bool, typer.Option("--quick", help="shape A only; of --aot, one dtype and one of each block size")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    device: Annotated[
        Device, typer.Option(help="what is raced: this CPU, or torch's first GPU")
    ] = Device.cpu,
    output: Annotated[
        Path | None, typer.Option(help="markdown page to write, with its plots beside it")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file of all figures to write")] = None,
    aot: Annotated[
        bool, typer.Option("--aot", help="no race: compile the Triton kernels for five GPUs and judge them")
    ] = False,
) -> None:
    """Race the layer and its operations against their peers and bounds on this machine."""
    if aot:
        from sigma_train.errors import WrongInput

        from sigma_cli.aot_page import run as compile_all

        if (group, rounds, threads, device, json_file) != ("test", 7, None, Device.cpu, None):
            raise WrongInput("--aot races nothing: it takes --quick and --output alone")
        raise typer.Exit(compile_all(quick, output))
    from sigma_cli.bench import run

    raise typer.Exit(run(group, quick, rounds, threads, output, json_file, device=device.value))
