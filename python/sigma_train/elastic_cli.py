"""`sigma elastic eval` and `search`: one model at several numbers of experts a token."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sigma_train.options import JsonFile, Place

if TYPE_CHECKING:
    from sigma_train.elastic import Elastic

app = typer.Typer(no_args_is_help=True, help="One model at several numbers of experts a token.")

Batches = Annotated[
    int | None,
    typer.Option(min=1, help="batches of the validation split; as many as the run's own where not given"),
]


@app.command(name="eval")
def evaluate(
    place: Place,
    top_k: Annotated[str | None, typer.Option(help="k of all layers, several as 1,2,4")] = None,
    plans: Annotated[
        list[str] | None, typer.Option("--plan", help="k of each layer as 4,4,1,3; repeatable")
    ] = None,
    batches: Batches = None,
    json_file: JsonFile = None,
) -> None:
    """Show loss, load and cost of a model at each k, and at k of each layer."""
    _must_be_places(json_file)
    uniform = numbers("--top-k", top_k)
    listed = [numbers("--plan", plan) for plan in plans or []]

    from sigma_train import elastic as el
    from sigma_train import elastic_view

    elastic = el.load(place)
    if not uniform and not listed:  # what it was trained at, and two beyond, to see where it ends
        uniform = [*range(1, min(elastic.most + 2, elastic.config.model.num_experts) + 1)]
    wanted = [elastic.uniform(k) for k in uniform]
    for plan in wanted:
        el.check(elastic, plan, "--top-k")
    for each in listed:
        el.check(elastic, tuple(each), "--plan")
        wanted.append(tuple(each))
    text = elastic.batches(batches)
    measured = [el.measure(elastic, plan, text) for plan in dict.fromkeys(wanted)]
    elastic_view.show(elastic, measured)
    _write(json_file, elastic, len(text), plans=[_row(elastic, m.figures()) for m in measured])


@app.command()
def search(
    place: Place,
    mean_k: Annotated[float, typer.Option(help="experts a token and layer, on average, at most")],
    least: Annotated[int, typer.Option(min=1, help="smallest k of a layer")] = 1,
    most: Annotated[
        int | None, typer.Option(min=1, help="largest k of a layer; the largest trained at where not given")
    ] = None,
    batches: Batches = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write: loss over mean k")] = None,
) -> None:
    """Find a k for each layer under a budget, by loss on one half of the validation; judge it on the other half."""
    from sigma_train import elastic as el
    from sigma_train import elastic_view
    from sigma_train.elastic_allocation import allocate
    from sigma_train.errors import WrongInput
    from sigma_train.files import atomic_file, must_be_writable

    _must_be_places(json_file, plot)
    elastic = el.load(place)
    most = elastic.most if most is None else most
    el.check(elastic, elastic.uniform(most), "--most")
    if least > most:
        raise WrongInput(f"--least must lie in 1..{most}, the largest k, found {least}")
    if not least <= mean_k <= most:
        raise WrongInput(f"--mean-k must be a number from {least} to {most}, found {mean_k:g}")
    text = elastic.batches(batches)
    if len(text) < 2:
        raise WrongInput("search wants at least 2 batches of the validation split, found 1; raise --batches")
    found = allocate(elastic, text, mean_k, least, most)
    elastic_view.show_search(elastic, found)
    _write(json_file, elastic, len(text), **found.figures(elastic))
    if plot is not None:
        content = elastic_view.picture(found)
        with must_be_writable("--plot", plot.parent), atomic_file(plot) as file:
            file.write(content)


def _must_be_places(json_file: Path | None, plot: Path | None = None) -> None:
    """Raises: WrongInput, before minutes of measuring, if a file cannot be written where it is wanted."""
    from sigma_train.files import must_take_file

    for option, path in (("--json", json_file), ("--plot", plot)):
        must_take_file(option, path)


def numbers(option: str, text: str | None) -> list[int]:
    """Raises: WrongInput if it is no list of integers."""
    from sigma_train.errors import WrongInput

    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise WrongInput(f"{option} must be integers with commas between, as 1,2,4, found {text!r}")
    return [int(part) for part in parts]


def _row(elastic: "Elastic", figures: dict[str, Any]) -> dict[str, Any]:
    return figures | {"standing": elastic.standing(tuple(figures["top_k"]))}


def _write(path: Path | None, elastic: "Elastic", batches: int, **figures: Any) -> None:
    if path is None:
        return
    from sigma_train.files import must_be_writable, write_json

    about = {
        "schema_version": 1,
        "checkpoint": str(elastic.checkpoint),
        "step": elastic.step,
        "batches": batches,
        "trained_at": [sorted(layer) for layer in elastic.seen],
    }
    with must_be_writable("--json", path.parent):
        write_json(path, about | figures)
