"""`sigma data prepare`: text that is not on this machine yet."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Text to train on.")


class Known(StrEnum):
    installation_guide = "installation-guide"


@app.callback()
def _group() -> None:
    """Of one command Typer would make the whole program."""


@app.command()
def prepare(
    name: Annotated[Known, typer.Argument(help="installation-guide: Debian's, in 19 languages, GPL-2")],
    out: Annotated[Path, typer.Option(help="new or empty folder, one LANG.txt for each language")],
    any_version: Annotated[
        bool, typer.Option("--any-version", help="take a text that is not the one the figures are of")
    ] = False,
    without_english: Annotated[
        bool, typer.Option("--without-english", help="leave out paragraphs that nobody has translated")
    ] = False,
) -> None:
    """Fetch a multilingual text through the package manager, check it, and write a file for each language."""
    from rich.console import Console
    from rich.table import Table

    from sigma_train.console import say
    from sigma_train.guide import prepare_guide

    shares = prepare_guide(out, any_version, without_english)
    table = Table("language", "MB", "English")
    for language, share in shares.items():
        table.add_row(language, f"{(out / f'{language}.txt').stat().st_size / 1e6:.2f}", f"{share:.1%}")
    console = Console()
    console.print(table)
    for text in (
        "English: letters in paragraphs that nobody has translated"
        + (", left out" if without_english else ""),
        f"{len(shares)} languages under GPL-2, see {out / 'README.md'}",
        f"train on them: sigma train --data {out} --set data.languages=true",
    ):
        say(console, text)
