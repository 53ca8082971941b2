"""`sigma neurons identify`, `ablate`, `report` and `overlap`: the language neurons of a run or of another model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from sigma_train.options import Data, Overrides

app = typer.Typer(
    no_args_is_help=True,
    help="Which neurons of a model belong to which language: of runs with data.languages, or of transformers' models.",
)

Place = Annotated[
    Path,
    typer.Argument(help="folder of a run, of one checkpoint of it, or of a causal model of transformers"),
]
Out = Annotated[Path | None, typer.Option(help="folder of the results; neurons in the run's where not given")]

COUNTS = "counts.safetensors"
SETTINGS = (  # of a model that is no run's
    "data.val_fraction", "data.max_bytes", "train.seq_len", "train.batch_size", "train.threads"
)  # fmt: skip


class Probability(StrEnum):
    joint = "joint"
    conditional = "conditional"


class Score(StrEnum):
    finer = "finer"
    lape = "lape"


class Split(StrEnum):
    train = "train"
    val = "val"


class Within(StrEnum):
    layer = "layer"
    expert = "expert"


@app.command()
def identify(
    place: Place,
    out: Out = None,
    data: Data = None,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="text that activations are counted on")] = Split.train,
    batches: Annotated[int, typer.Option(min=1, help="of each language, of train.batch_size windows")] = 16,
    top_rate: Annotated[
        float, typer.Option(min=0, max=1, help="share of neurons that are taken for language-bound")
    ] = 0.01,
    probability: Annotated[
        Probability, typer.Option(help="of being routed to and active, or of being active where routed to")
    ] = Probability.joint,
    score: Annotated[
        Score, typer.Option(help="H - lambda max p, with three kinds, or LAPE's H of the active ones")
    ] = Score.finer,
    lam: Annotated[
        float | None, typer.Option("--lambda", min=0, help="weight of the maximum; searched where not given")
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="bar of an active language; the top 5 % where not given"),
    ] = None,
) -> None:
    """Count activations by language and find the neurons that are specific to one, related to some, general."""
    import math

    from sigma_train.errors import WrongInput
    from sigma_train.files import must_be_writable, sha256_file

    for option, value in (("--top-rate", top_rate), ("--lambda", lam), ("--tau", tau)):
        if value is not None and not math.isfinite(value):  # min= lets inf pass, of an older typer NaN too
            raise WrongInput(f"{option} must be a number, found {value}")

    from sigma_neurons import view
    from sigma_neurons.identified import identify as found_in
    from sigma_neurons.identified import must_fit

    must_fit(score.value, lam, tau)
    folder = _folder(out, place)
    run = _opened(place, data, overrides)
    found = found_in(run.count(split.value, batches), top_rate, probability.value, lam, tau, score.value)
    about = run.about() | {"split": split.value}
    with must_be_writable("--out", folder):
        folder.mkdir(parents=True, exist_ok=True)
        found.stats.write(folder / COUNTS)
        sealed = {"counts_sha256": sha256_file(folder / COUNTS)}
        _write(folder / "neurons.json", about | sealed | found.figures())
    view.show(found, folder)


@app.command()
def ablate(
    place: Place,
    out: Out = None,
    data: Data = None,
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(min=1, help="of each language's validation text")] = 4,
    controls: Annotated[int, typer.Option(min=1, max=100, help="random masks beside each mask")] = 2,
    within: Annotated[
        Within, typer.Option(help="what random masks match: how many neurons a layer loses, or an expert")
    ] = Within.layer,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1)] = 0,
) -> None:
    """Take each language's neurons out and show what that costs every language, beside random neurons."""
    from sigma_train.files import sha256_file

    from sigma_neurons import matrices, view

    folder = _folder(out, place)
    run = _opened(place, data, overrides)
    found = _identified(folder, run.about())
    done = matrices.ablate(run, found, batches, controls, seed, within.value)
    of = {"neurons_sha256": sha256_file(folder / "neurons.json")}
    how = {"batches": batches, "controls": controls, "within": within.value, "seed": seed}
    _write(folder / "ablation.json", run.about() | of | how | {"sets": matrices.figures(done)})
    view.show_matrices(done, folder)


@app.command()
def report(place: Place, out: Out = None) -> None:
    """Draw what identify and ablate found, as pictures and a page."""
    from sigma_neurons.page import write_page

    folder = _folder(out, place)
    typer.echo(f"wrote {write_page(folder)}")


@app.command()
def overlap(
    first: Annotated[Path, typer.Argument(help="folder that identify wrote")],
    second: Annotated[Path, typer.Argument(help="another, as of a later checkpoint or of other text")],
) -> None:
    """Show how many of each language's specific and related neurons two results share."""
    from sigma_neurons import view
    from sigma_neurons.overlap import overlaps
    from sigma_neurons.page import read

    told = [read(folder / "neurons.json", "identify") for folder in (first, second)]
    view.show_overlaps(overlaps(*told))


def _is_of_transformers(place: Path) -> bool:
    """A folder that is also a run is a run, as for `sigma teacher`."""
    return (place / "config.json").is_file() and not (place / "checkpoints").is_dir()


def _folder(out: Path | None, place: Path) -> Path:
    from sigma_train.checkpoint import named_checkpoint, run_of
    from sigma_train.errors import WrongInput

    if out is None and _is_of_transformers(place):
        raise WrongInput(f"--out must be given for a model of transformers, {place} stays as it is")
    return run_of(named_checkpoint(place)) / "neurons" if out is None else out


def _opened(place: Path, data: list[str] | None, overrides: list[str] | None) -> Any:
    """A run, or a model of transformers on the text of --data."""
    from sigma_train.checkpoint import named_checkpoint
    from sigma_train.errors import WrongInput

    if not _is_of_transformers(place):
        named_checkpoint(place)
        if data or overrides:
            raise WrongInput(
                f"--data and --set are for a model of transformers, {place} is a run and has its own text and settings"
            )
        from sigma_neurons import measured

        return measured.load(place)
    if not data:
        raise WrongInput(
            f"--data must name files LANG.txt for {place}, a model of transformers, which has no text"
        )
    for override in overrides or []:
        if (key := override.partition("=")[0]) not in SETTINGS:
            raise WrongInput(f"--set must be of {', '.join(SETTINGS)} here, found {key}")
    import torch
    from sigma_train.config import load_config

    from sigma_neurons.foreign import Foreign

    ours = {"data": {"paths": data, "languages": True}, "model": {"max_seq_len": 1 << 20}}
    config = load_config(None, None, list(overrides or []), ours)
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    return Foreign(place, config)


def _identified(folder: Path, about: dict[str, Any]) -> Any:
    """What identify wrote, chosen again from its counts.  Raises: WrongInput if it is of another checkpoint."""
    from sigma_train.errors import WrongInput
    from sigma_train.files import sha256_file

    from sigma_neurons.identified import identify as found_in
    from sigma_neurons.page import read
    from sigma_neurons.stats import ActivationStats

    told = read(folder / "neurons.json", "identify")
    if told["checkpoint_sha256"] != about["checkpoint_sha256"]:
        raise WrongInput(
            f"{folder / 'neurons.json'} is of {told['checkpoint']}; run identify on {about['checkpoint']} first"
        )
    if told["text"] != about["text"]:
        raise WrongInput(
            f"{folder / 'neurons.json'} is of another text, of other languages or cut otherwise; run identify again"
        )
    counts = folder / COUNTS
    if not counts.is_file() or sha256_file(counts) != told["counts_sha256"]:
        raise WrongInput(f"{counts} is not what {folder / 'neurons.json'} was made of; run identify again")
    chosen_by = (told["lambda"], told["tau"]) if told["score"] == "finer" else (None, None)
    stats = ActivationStats.read(counts)
    return found_in(stats, told["top_rate"], told["probability"], *chosen_by, told["score"])


def _write(path: Path, content: dict[str, Any]) -> None:
    from sigma_train.files import must_be_writable

    from sigma_neurons import page

    with must_be_writable("--out", path.parent):
        page.write(path, content)
