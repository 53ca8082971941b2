"""`sigma noise`: its verbs.  Heavy imports wait until one runs; what it raises becomes an exit code in `sigma_cli`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sigma_noise import analyze_cli, formats_cli, inject_cli, online_cli
from sigma_noise.options import given, names, seconds, sizes, whole_numbers

app = typer.Typer(
    no_args_is_help=True, help="How noisy this machine is, why, and what that costs on many ranks."
)
app.command()(analyze_cli.analyze)
app.command()(analyze_cli.project)
app.command()(analyze_cli.compare)
app.command("import")(formats_cli.import_)
app.command()(formats_cli.export)
app.command()(inject_cli.inject)
app.command()(inject_cli.doctor)
app.command()(inject_cli.selftest)
app.command()(online_cli.watch)


class Backend(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


@app.command()
def run(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="folder of the measurement, one file a rank")],
    kernel: Annotated[str, typer.Option(help="of spin, copy, gemm, grouped, a2a; by commas")] = "spin",
    mode: Annotated[
        str | None,
        typer.Option(
            help="fwq, fixed work; ftq, fixed time; detours, gaps of an idle loop; by commas; fwq,detours, or "
            "fwq of a GPU"
        ),
    ] = None,
    quantum: Annotated[
        float, typer.Option(parser=seconds, metavar="TIME", help="of work, or of time")
    ] = "1ms",
    duration: Annotated[
        float, typer.Option(parser=seconds, metavar="TIME", help="of each kernel in each mode")
    ] = "10s",
    warm_up: Annotated[
        float, typer.Option(parser=seconds, metavar="TIME", help="before each, not stored")
    ] = "1s",
    threshold: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="TIME", help="of detours; 1us, or 9 times what reading the clock costs"
        ),
    ] = None,
    pin: Annotated[
        str | None, typer.Option(help="CPUs by commas, which the ranks of a host take in turn; free without")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=4096, help="of gemm and grouped")] = 1,
    size: Annotated[
        list[str] | None, typer.Option(help="of what a kernel works on, as grouped.E=96; repeatable")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, max=1024, help="ranks on this machine")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the values and the histogram of experts")] = 0,
    backend: Annotated[Backend, typer.Option(help="what is measured")] = Backend.cpu,
    attribute: Annotated[
        bool, typer.Option("--attribute", help="watch counters meanwhile, and say what took the lost time")
    ] = False,
) -> None:
    """Measure; under torchrun, or with --nproc, on several ranks at once."""
    import os
    import sys

    from sigma_train.errors import WrongInput
    from sigma_train.ranks import RESTART_COUNT, is_launched, joined

    from sigma_noise.plan import Plan
    from sigma_noise.run import RANK_TIMEOUT_S, free_folder, run_plan

    modes = mode or ("fwq,detours" if backend == Backend.cpu else "fwq")
    plan = Plan(
        kernels=names(kernel), modes=names(modes), quantum_s=quantum, duration_s=duration, warm_up_s=warm_up,
        threshold_s=threshold, seed=seed, pin=whole_numbers("pin", pin), threads=threads,
        sizes=sizes(size or []), backend=backend.value, attribute=attribute,
    )  # fmt: skip
    plan.check_used(given(context))
    if nproc is not None and is_launched() and RESTART_COUNT not in os.environ:
        raise WrongInput("--nproc starts ranks, and these have been started by torchrun; leave it out")
    if nproc is not None and not is_launched():
        from sigma_train.launch import launch

        plan.check(nproc)
        free_folder(out)
        launch(nproc, 0, sys.argv[1:], lambda text: None, None, module="sigma_cli")
        return
    with joined(RANK_TIMEOUT_S + 2 * plan.duration_s) as ranks:
        run_plan(plan, ranks, out)
