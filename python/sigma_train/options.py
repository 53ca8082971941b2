"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[
    str | None,
    typer.Option(
        help="named settings: tiny-96, tiny-dense, compare-96, compare-dense, smoke, smoke-dense, "
        "sigma-moe-tiny, sigma-moe-tiny-cpu, sigma-moe-200b"
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file of settings")]
Data = Annotated[list[str] | None, typer.Option(help="file, folder or glob; repeatable")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable")]
Dtype = Annotated[str | None, typer.Option(help="f32 or bf16; same as --set train.dtype=...")]
Place = Annotated[Path, typer.Argument(help="folder of a run, or of one checkpoint of it")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="file of all figures to write")]
