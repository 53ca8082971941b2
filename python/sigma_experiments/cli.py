"""`sigma experiment NAME`; what it raises becomes an exit code in `sigma_train.errors.verdict`."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from sigma_experiments import EXPERIMENTS


def module_of(name: str) -> ModuleType:
    return import_module(f"sigma_experiments.{name.replace('-', '_')}")


NAMES = "; ".join(f"{name}: {text}" for name, text in EXPERIMENTS.items())


def experiment(
    name: Annotated[str, typer.Argument(help=NAMES)],
    seeds: Annotated[int, typer.Option(min=1, max=100, help="runs of each arm")] = 3,
    short: Annotated[
        bool, typer.Option("--short", help="seconds instead of minutes: shows that it runs, no more")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="trainings at once; one a core")] = None,
    out: Annotated[Path, typer.Option(help="folder of the trainings")] = Path("runs/experiments"),
    page: Annotated[
        Path | None, typer.Option(help="folder of the page, its pictures and its JSON; by default in --out")
    ] = None,
) -> None:
    """Train the arms of an experiment and write what came of it; goes on where it was stopped."""
    import difflib
    import os
    import resource
    import time

    from rich.console import Console
    from sigma_train.console import say
    from sigma_train.errors import WrongInput
    from sigma_train.files import must_be_writable, must_take_files

    if name not in EXPERIMENTS:
        nearest = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(EXPERIMENTS)}"
        raise WrongInput(f"unknown experiment {name!r}; {hint}")

    from sigma_experiments import page as pages
    from sigma_experiments.lab import Lab

    folder = out / (f"{name}-short" if short else name)
    place = page or folder
    for option, wanted in (("--out", folder), ("--page", place)):
        with must_be_writable(option, wanted):
            wanted.mkdir(parents=True, exist_ok=True)
        must_take_files(option, wanted)
    console, began = Console(), time.monotonic()
    lab = Lab(folder, seeds, short, jobs or len(os.sched_getaffinity(0)), console)
    found = module_of(name).run(lab)
    command = f"sigma experiment {name} --seeds {seeds}{' --short' if short else ''}"
    with must_be_writable("--page", place):
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor_s = spent.ru_utime + spent.ru_stime
        seconds = time.monotonic() - began
        written = pages.write(found, place, name, command, seconds, processor_s, len(lab.kept))
    say(console, f"wrote {written}")
