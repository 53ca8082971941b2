"""`sigma grow`: a deeper or wider model from a checkpoint of ours or of transformers."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from sigma_train.growth_cost import SunkCostLedger
    from sigma_train.growth_layers import LayerGrowthPlan
    from sigma_train.growth_pieces import Growth

    Grow = Callable[..., Growth]  # of the number of layers and, of a run, the router's score
    Done = tuple[SunkCostLedger, str]


class Depth(StrEnum):
    none = "none"
    interposition = "interposition"
    stack = "stack"


class BalanceBias(StrEnum):
    copy = "copy"
    zero = "zero"


class Optimizer(StrEnum):
    reset = "reset"
    inherit = "inherit"


def grow(
    source: Annotated[Path, typer.Argument(help="run, checkpoint of a run, or folder of transformers")],
    out: Annotated[
        Path | None, typer.Option(help="folder to write; by default SOURCE-grown, RUN-grown of a checkpoint")
    ] = None,
    depth: Annotated[
        Depth, typer.Option(help="where copies of layers go: behind each, or all on top")
    ] = Depth.none,
    depth_factor: Annotated[int, typer.Option(min=2, max=64, help="of --depth: times as many layers")] = 2,
    skip_first: Annotated[int, typer.Option(min=0, help="of --depth: first layers without a copy")] = 0,
    skip_last: Annotated[int, typer.Option(min=0, help="of --depth: last layers without a copy")] = 0,
    zero_outputs: Annotated[
        bool, typer.Option("--zero-outputs", help="of --depth: copies add nothing at first")
    ] = False,
    experts: Annotated[
        int, typer.Option(min=1, max=64, help="times as many experts, and as many of them a token")
    ] = 1,
    noise: Annotated[
        float, typer.Option(help="of --experts: on each copy, in standard deviations of its weights")
    ] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    interleave: Annotated[
        bool, typer.Option("--interleave", help="of --experts: a copy stands beside its expert")
    ] = False,
    balance_bias: Annotated[
        BalanceBias, typer.Option(help="of --experts: the copies' bias of selection")
    ] = BalanceBias.copy,
    optimizer: Annotated[
        Optimizer, typer.Option(help="of a run: the moments of AdamW start anew, or grow too")
    ] = Optimizer.reset,
    sunk_tokens: Annotated[
        int, typer.Option(min=0, help="of transformers: that the weights were trained on, for the ledger")
    ] = 0,
    shard_gb: Annotated[
        float, typer.Option(help="of transformers: the most of a file of several tensors, 1e9 bytes")
    ] = 5.0,
    norms: Annotated[
        bool, typer.Option("--norms", help="show the norms of layers and where the grown ones break")
    ] = False,
) -> None:
    """Make a deeper or wider model from a trained one (orthogonal growth)."""
    import math

    from sigma_train.errors import WrongInput
    from sigma_train.files import must_be_new

    if depth is Depth.none and experts == 1:
        raise WrongInput("--depth or --experts must be given, what is to grow")
    if not (math.isfinite(noise) and noise >= 0):
        raise WrongInput(f"--noise must be a number of at least 0, found {noise}")
    if not (math.isfinite(shard_gb) and shard_gb > 0):
        raise WrongInput(f"--shard-gb must be a number above 0, found {shard_gb}")
    if depth is Depth.none and (zero_outputs or skip_first or skip_last or depth_factor != 2):
        raise WrongInput(
            "--depth-factor, --zero-outputs, --skip-first and --skip-last are options of --depth, which was not given"
        )
    if experts == 1 and (interleave or balance_bias is BalanceBias.zero):
        raise WrongInput("--interleave and --balance-bias are options of --experts, which was not given")
    out = out or beside(source)
    must_be_new(out, "--out")

    from sigma_train.growth_layers import LayerGrowthPlan
    from sigma_train.growth_pieces import Growth

    def growth(n: int, score: str = "softmax") -> Growth:
        kind = getattr(LayerGrowthPlan, depth.value)
        plan = kind(n) if depth is Depth.none else kind(n, depth_factor, skip_first, skip_last)
        return Growth(plan, experts, noise, seed, interleave, balance_bias.value, score, zero_outputs)  # type: ignore[arg-type]

    if (source / "config.json").exists():
        if optimizer is Optimizer.inherit:
            raise WrongInput("--optimizer: a folder of transformers holds no moments to inherit")
        ledger, next_step = _grow_folder(source, growth, sunk_tokens, round(shard_gb * 1e9), out, norms)
    else:
        if sunk_tokens:
            raise WrongInput("--sunk-tokens is an option of a folder of transformers; a run knows its tokens")
        ledger, next_step = _grow_run(source, growth, optimizer.value, out, norms)
    typer.echo(f"wrote {out}: {ledger.sunk_flops:.3g} FLOPs are sunk in its weights; {next_step}")


def beside(source: Path) -> Path:
    """SOURCE-grown; of a checkpoint beside its run, which takes all of its checkpoints' folder for its own.

    Raises: WrongInput for the root of all folders, which nothing lies beside.
    """
    from sigma_train.errors import WrongInput

    place = Path(os.path.abspath(source))  # not resolved: beside a link, not beside what it leads to
    if place.parent.name == "checkpoints":
        place = place.parent
    if place.name == "checkpoints":
        place = place.parent
    if not place.name:
        raise WrongInput(f"SOURCE must be a run, a checkpoint or a folder of transformers, found {place}")
    return place.with_name(f"{place.name}-grown")


def _grow_folder(
    source: Path, growth: "Grow", sunk_tokens: int, shard_bytes: int, out: Path, norms: bool
) -> "Done":
    from contextlib import ExitStack

    from sigma_train.grow_folder import Folder, Open, grow_folder
    from sigma_train.growth_settings import num_layers

    folder = Folder.read(source)
    how = growth(num_layers(folder.settings))
    ledger = grow_folder(folder, how, sunk_tokens, shard_bytes, out)
    with ExitStack() as stack:
        if norms:
            _show_norms(Open(folder, stack).items(), how.layers)
    return ledger, "from_pretrained reads it"


def _grow_run(source: Path, growth: "Grow", optimizer: Any, out: Path, norms: bool) -> "Done":
    from sigma_train.grow_run import Base, Reading, grow_run

    base = Base.named(source)
    how = growth(base.config.model.num_layers, base.config.router.score)
    ledger = grow_run(base, how, optimizer, out)
    if norms:
        _show_norms(Reading(base.checkpoint).weights(), how.layers)
    return ledger, f"sigma train --config {out / 'config.toml'} --out FOLDER trains it"


def _show_norms(tensors: "Iterable[tuple[str, Tensor]]", plan: "LayerGrowthPlan") -> None:
    from rich.console import Console
    from rich.table import Table

    from sigma_train.console import say
    from sigma_train.growth_norms import norm_seam, planned_profile, weight_norm_profile

    former = weight_norm_profile(tensors)
    grown = planned_profile(former, plan)
    table = Table("layer", "made of", "rms of its weights", title="Norms", title_justify="left")
    for layer, (source, norm) in enumerate(zip(plan.sources, grown.tolist(), strict=True)):
        table.add_row(str(layer), str(source), f"{norm:.5f}")
    console = Console()
    console.print(table)
    if len(plan.sources) > 1:
        seam = norm_seam(grown)
        say(
            console,
            f"steepest fall: {seam.fall:.5f} from layer {seam.layer} to {seam.layer + 1}, "
            f"{seam.ratio:.1f} times the mean step elsewhere",
        )
