"""The commands of `sigma`.  Heavy imports wait until a command runs, so that --help answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from sigma_experiments import cli as experiment_cli
from sigma_neurons import cli as neurons_cli
from sigma_noise import cli as noise_cli
from sigma_train import cli as train_cli
from sigma_train import data_cli, elastic_cli, grow_cli, ledger_cli, plan_cli, teacher_cli
from sigma_train.options import JsonFile

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(train_cli.train)
app.command()(train_cli.compare)
app.command()(train_cli.generate)
app.command()(train_cli.export)
app.command()(grow_cli.grow)
app.command()(experiment_cli.experiment)
app.command()(plan_cli.plan)
app.command()(ledger_cli.ledger)
app.add_typer(data_cli.app, name="data")
app.add_typer(neurons_cli.app, name="neurons")
app.add_typer(elastic_cli.app, name="elastic")
app.add_typer(noise_cli.app, name="noise")
app.add_typer(teacher_cli.app, name="teacher")


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Check(StrEnum):
    kernels = "kernels"
    memory = "memory"
    rates = "rates"
    ranks = "ranks"


OF_VALIDATE = "of --validate: "


@app.command()
def doctor(
    context: typer.Context,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate",
            help="is this machine fit for a job?  Exit codes: 0 fit, 10 slow, 11 wrong, 2 wrong input, "
            "1 could not be run",
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help=OF_VALIDATE + "smaller kernels, once each; 128 MiB; fewer rounds")
    ] = False,
    check: Annotated[list[Check] | None, typer.Option(help=OF_VALIDATE + "only these; repeatable")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=86400, help=OF_VALIDATE + "repeat the kernels so long")
    ] = 15.0,
    memory: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 30, help=OF_VALIDATE + "MiB of the pattern test, of each device; 512"),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=2, max=1024, help=OF_VALIDATE + "ranks on this machine that ask each other"),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help=OF_VALIDATE + "file of a sound node's rates to compare with")
    ] = None,
    save_baseline: Annotated[
        Path | None, typer.Option(help=OF_VALIDATE + "file to write this node's rates to")
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            min=0, max=0.99, help=OF_VALIDATE + "share of the baseline's speed that may always be missing"
        ),
    ] = 0.15,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=OF_VALIDATE + "file of all results to write")
    ] = None,
    pairs_file: Annotated[Path | None, typer.Option("--pairs", hidden=True)] = None,
) -> None:
    """Show versions, processor, instruction set and the table of backends; or --validate this machine."""
    if not validate:
        given = [p for p in context.params if context.get_parameter_source(p).name == "COMMANDLINE"]
        if given:
            from sigma_train.errors import WrongInput

            name = {"json_file": "json", "pairs_file": "pairs"}.get(given[0], given[0]).replace("_", "-")
            raise WrongInput(f"--{name} is an option of --validate, which was not given")

        from sigma_kernels.doctor import report

        typer.echo(report())
        return
    from sigma_cli.validate import Options, run, write_pairs

    if pairs_file is not None:
        write_pairs(pairs_file)
        return
    chosen = frozenset(c.value for c in check or Check)
    options = Options(quick, chosen, seconds, memory, nproc, baseline, save_baseline, margin, json_file)
    raise typer.Exit(run(options))


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
    json_file: JsonFile = None,
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
