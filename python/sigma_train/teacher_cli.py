"""`sigma teacher cache`: the losses of a teacher on a training text, computed once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sigma_train.options import Data, Overrides

app = typer.Typer(
    no_args_is_help=True, help="What a teacher of any vocabulary loses on a text, token by token."
)


class Dtype(StrEnum):
    f16 = "f16"
    f32 = "f32"


@app.command()
def cache(
    teacher: Annotated[Path, typer.Option(help="folder of a run, or of a causal model of transformers")],
    out: Annotated[Path, typer.Option(help="file to write, for objective.teacher")],
    preset: Annotated[str | None, typer.Option(help="named settings, of which [data] matters")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, a run's own")] = None,
    data: Data = None,
    overrides: Overrides = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="tokens that the teacher reads at once; all it can, at most 2048"),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="of these, read before in a long text; a quarter")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens of one call")] = 4096,
    dtype: Annotated[Dtype, typer.Option(help="of a stored loss")] = Dtype.f16,
    top: Annotated[
        int,
        typer.Option(min=0, help="highest probabilities stored of each token, for objective.kind=uld, as 64"),
    ] = 0,
) -> None:
    """Store what a teacher loses on each of its tokens of the training split, for objective.kind=teacher_guided."""
    from sigma_train.config import load_config

    cfg = load_config(preset, config, list(overrides or []), {"data": {"paths": data} if data else {}})

    import torch
    from rich.console import Console

    from sigma_train.teacher import open_teacher
    from sigma_train.teacher_cache import cache_losses

    torch.set_num_threads(cfg.train.threads or torch.get_num_threads())
    told = cache_losses(
        open_teacher(teacher), cfg.data, out, context, overlap, batch_tokens, dtype.value, Console(), top
    )
    typer.echo(told)
