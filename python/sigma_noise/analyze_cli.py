"""`sigma noise analyze`, `project` and `compare`: functions that `cli` registers."""

import re
from pathlib import Path
from typing import Annotated

import typer

from sigma_noise.codes import FAILING, Exit
from sigma_noise.failures import failures_are
from sigma_noise.options import given, seconds, whole_numbers

RANKS = "8,64,512,2048,16384"
# Options that steps of a training have no use for.
OF_QUANTA = ("kernel", "tau", "window", "layers", "barriers")


def analyze(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="folder or file of a measurement")],
    kernel: Annotated[str | None, typer.Option(help="of the first screen; else the first measured")] = None,
    tau: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="TIME", help="threshold of detours; one a series without"),
    ] = None,
    ranks: Annotated[str, typer.Option(help="N of the projection, by commas")] = RANKS,
    window: Annotated[
        float | None, typer.Option(parser=seconds, metavar="TIME", help="work between barriers; else 10 ms")
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="rate at which any of equal ranks is flagged")
    ] = 0.01,
    reference: Annotated[
        str,
        typer.Option(help="what a rank's location is relative to: median of ranks, or min, as NVRx has it"),
    ] = "median",
    seed: Annotated[int, typer.Option(min=0, help="of resamples")] = 0,
    truth: Annotated[Path | None, typer.Option(help="log of `sigma noise inject`, as a cause")] = None,
    report: Annotated[
        Path | None, typer.Option(help="folder for report.html, PNGs and analysis.json")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all numbers")] = None,
) -> None:
    """Say what a measurement shows: noise, rhythm, causes, ranks, and many ranks."""
    from sigma_train.errors import WrongInput
    from sigma_train.files import must_be_writable, must_take_file, must_take_files, write_json

    from sigma_noise import screen, step_causes, step_ranks, steps, steps_view, trace
    from sigma_noise.analysis import Options, injections
    from sigma_noise.analysis import analyze as of_trace
    from sigma_noise.as_json import as_json, of_training
    from sigma_noise.reading import read_any

    must_take_file("--json", json_file)
    if report is not None:
        with must_be_writable("--report", report):
            report.mkdir(parents=True, exist_ok=True)
        must_take_files("--report", report)
    measured, log = read_any(path), None if truth is None else trace.read(truth)
    if steps.has_steps(measured):
        # Of sigma train: ranks are told apart by steps, whose phases are no fixed work.
        if report is not None:
            raise WrongInput(
                f"{path}: a record of sigma train, whose report.html has this; leave --report out"
            )
        refuse_of_quanta(context, path)
    try:
        options = Options(kernel, tau, whole_numbers("ranks", ranks), window, alpha, seed, reference)
        if steps.has_steps(measured):
            injected = {} if log is None else injections(measured, log)
            why = step_causes.late(measured, injected=injected, seed=seed)
            noise, beside = steps.step_noise(measured), step_ranks.step_ranks(measured, options)
            told = [*steps_view.lines(noise, why), *screen.ranks_of(beside), *screen.projection(beside)]
            for line in [*told, *screen.warnings_of(beside.warnings)]:
                print(line)
            if json_file is not None:
                write_json(json_file, of_training(noise, why, beside, trace.digests(path)))
            return
        found = of_trace(measured, options, truth=log, digests=trace.digests(path))
    except ValueError as error:
        raise WrongInput(f"{path}: {as_options(str(error))}") from None
    for line in screen.lines(found):
        print(line)
    if json_file is not None:
        write_json(json_file, as_json(found))
    if report is not None:
        from sigma_noise import page

        print(f"wrote {page.write(measured, found, report)}")


@failures_are(Exit.INTERNAL)
def project(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="folder or file of a measurement")],
    kernel: Annotated[str | None, typer.Option(help="else collectives, or the first kernel measured")] = None,
    ranks: Annotated[str, typer.Option(help="N by commas")] = RANKS,
    window: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help="work of a step, in equal parts before its barriers; else 10 ms",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10000,
            help="MoE layers: a step passes two all-to-alls in each and one sum of gradients",
        ),
    ] = None,
    barriers: Annotated[
        int | None, typer.Option(min=1, max=1000000, help="that a step passes, without --layers; else 1")
    ] = None,
    cosched: Annotated[
        bool, typer.Option("--cosched", help="noise strikes all hosts at once: the optimistic bound")
    ] = False,
    model: Annotated[str, typer.Option(help="of ecdf, gpd, replay; by commas")] = "ecdf,gpd",
    budget: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="exit with 1 if S at the largest N is certain to be above, 3 if it is refused"
        ),
    ] = None,
    without: Annotated[
        str | None, typer.Option(help="cause, as analyze names them: what a step regains if it were gone")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all numbers")] = None,
) -> None:
    """S(N): how much longer N ranks take than one, because they wait for the slowest.  Exit codes: 0 done, 1 over the
    budget, 2 wrong input, 3 no figure to hold against it, 5 could not be done."""
    from sigma_train.errors import WrongInput
    from sigma_train.files import must_take_file, write_json

    from sigma_noise import many_ranks, steps, trace
    from sigma_noise.as_json import of_projections
    from sigma_noise.reading import read_any
    from sigma_noise.step import moe_barriers

    must_take_file("--json", json_file)
    if layers is not None and barriers is not None:
        raise WrongInput("--layers and --barriers both count the barriers of a step; leave one out")
    measured = read_any(path)
    if steps.has_steps(measured):
        refuse_of_quanta(context, path)
    of = {
        "kernel": kernel, "ranks": whole_numbers("ranks", ranks), "window_s": window,
        "per_step": (barriers or 1) if layers is None else moe_barriers(layers), "models": tuple(model.split(",")),
        "seed": seed,
    }  # fmt: skip
    try:
        found = many_ranks.projections(measured, is_cosched=cosched, **of)
        gains = [] if without is None else many_ranks.without(measured, without, **of)
    except ValueError as error:
        raise WrongInput(f"{path}: {as_options(str(error))}") from None
    many_ranks.show(found, of["per_step"])
    if without is not None:
        many_ranks.show_regained(without, gains)
    is_over = None if budget is None else many_ranks.over_budget(found, budget)
    if json_file is not None:
        options = of | {"is_cosched": cosched, "without": without, "budget": budget}
        write_json(json_file, of_projections(found, gains, options, is_over, trace.digests(path)))
    if budget is None:
        return
    largest = max(found[0].ranks)
    if is_over is None:
        print(f"not decided: no model has a figure for {largest:,} ranks, to be held against {budget:g}")
        raise typer.Exit(Exit.INCONCLUSIVE)
    if is_over:
        print(f"over the budget: S({largest:,}) is above {budget:g}")
        raise typer.Exit(Exit.REGRESSED)


@failures_are(Exit.INTERNAL)
def compare(
    base: Annotated[Path, typer.Argument(help="folder of runs, each the folder of a measurement")],
    new: Annotated[Path, typer.Argument(help="the same, of what is to be judged")],
    kernel: Annotated[str | None, typer.Option(help="else the first that was measured")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="only these; repeatable")] = None,
    margin: Annotated[
        list[str] | None, typer.Option(help="what matters, as median_s=0.02; repeatable")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="folder of runs of the same code: margins no finer than they differ")
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help="threshold of detours of all runs; without it by the jitter of the rank with most",
        ),
    ] = None,
    fail_on: Annotated[
        str, typer.Option(help="verdicts that end with their code and not with 0, by commas")
    ] = ",".join(FAILING),
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.49)] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the verdicts")] = None,
) -> None:
    """Judge runs against others.  Exit codes: 0 equivalent or improved, 1 regressed, 2 wrong input, 3 inconclusive,
    4 the machine is unfit, 5 could not be done."""
    from sigma_train.files import must_take_file, write_json

    from sigma_noise import judge

    must_take_file("--json", json_file)
    options = judge.Options(
        kernel, tuple(metric or ()), judge.as_margins(margin or []), calibrate, tau, alpha, seed,
        judge.as_verdicts(fail_on),
    )  # fmt: skip
    found = judge.judged(base, new, options)
    judge.show(found)
    if json_file is not None:
        write_json(json_file, judge.as_json(found))
    raise typer.Exit(found.exit)


def refuse_of_quanta(context: typer.Context, path: Path) -> None:
    """Raises: WrongInput for an option that changes nothing of a training's steps, which are a window each."""
    from sigma_train.errors import WrongInput

    if unused := [name for name in given(context) if name in OF_QUANTA]:
        raise WrongInput(f"{path}: a record of sigma train, whose steps take no --{unused[0]}; leave it out")


def as_options(text: str) -> str:
    """What the library says of its arguments, of the options they came by."""
    return re.sub(r"^(?:project: )?(kernel|window|truth|tau|ranks|reference)\b", r"--\1", text)
