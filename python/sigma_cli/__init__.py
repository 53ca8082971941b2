"""The command `sigma`.  Heavy imports wait until a command runs, so that --help answers at once."""

import typer
from sigma_train import cli as train_cli

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(train_cli.train)
app.command()(train_cli.generate)
app.command()(train_cli.export)


@app.command()
def doctor() -> None:
    """Show versions, processor, instruction set and the table of backends on this machine."""
    from sigma_kernels.doctor import report

    typer.echo(report())


def main() -> None:
    app()
