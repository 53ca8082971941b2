"""`sigma noise inject`, `doctor` and `selftest`."""

import json
import sys
from enum import StrEnum
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer
from sigma_train.errors import Failure, Stopped, WrongInput, verdict

from sigma_noise.codes import Exit
from sigma_noise.options import seconds

BEGINS = "begins"  # the line of the standard error that a caller can wait for


class TargetName(StrEnum):
    proc = "proc"
    cpu = "cpu"
    memory = "memory"
    quota = "quota"
    gpu = "gpu"


TARGETS_OF = {"cpu": ("cpu", "memory"), "mib": ("memory",), "device": ("gpu",),
              "jitter": ("proc", "cpu", "memory", "gpu")}  # fmt: skip


def _time(help: str) -> Any:
    return typer.Option(help=help, parser=seconds, metavar="TIME")


def inject(
    target: Annotated[
        TargetName,
        typer.Option(
            help="proc: stop --pid; cpu: spin on --cpu; memory: copy; quota: a CPU quota for --pid; gpu: spin"
        ),
    ],
    truth: Annotated[Path, typer.Option(help="file to write: what was done, and when")],
    duration: Annotated[float, _time("of it all, such as 10s")],
    length: Annotated[float | None, _time("of a disturbance, such as 25ms; with --period")] = None,
    period: Annotated[float | None, _time("from begin to begin; without it one that lasts")] = None,
    jitter: Annotated[
        float | None, _time("each begins so much earlier or later at most; 0 without it")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of the jitter; 0 without it")] = None,
    pid: Annotated[int | None, typer.Option(help="of proc and quota: the process")] = None,
    cpu: Annotated[int | None, typer.Option(min=0, help="of cpu and memory: the CPU; any without it")] = None,
    mib: Annotated[
        int | None, typer.Option(help="of memory: MiB that are copied through; 256 without it")
    ] = None,
    device: Annotated[int | None, typer.Option(min=0, help="of gpu: its number; 0 without it")] = None,
) -> None:
    """Disturb a process, a CPU, the memory or a GPU, and log when."""
    from sigma_train.files import must_be_writable

    from sigma_noise.inject import Plan, Waiter
    from sigma_noise.inject import inject as run

    with must_be_writable("--truth", truth.parent):
        if not truth.parent.is_dir():
            raise FileNotFoundError(2, "No such file or directory")
    _check_used(target, {"cpu": cpu, "mib": mib, "device": device, "jitter": jitter})
    if seed is not None and jitter is None:
        raise WrongInput("--seed is of --jitter, without which nothing is drawn; leave it out")
    is_quota = target is TargetName.quota
    try:  # the grid of a quota is the kernel's: for the injector it is one disturbance
        plan = Plan(
            duration, None if is_quota else length, None if is_quota else period, jitter or 0.0, seed or 0
        )
    except ValueError as error:
        raise WrongInput(f"--{str(error).replace('_s', '')}") from None
    with (
        Waiter() as waiter
    ):  # signals are heard from here on, before anything is taken that must be given back
        victim = _target(target, pid, cpu, mib, device, length, period)
        trace = run(victim, plan, waiter, lambda: typer.echo(BEGINS, err=True))
        trace.write(truth)
    events = sum(len(s) for s in trace.rows.values())
    typer.echo(f"{events} disturbances, ended: {trace.run['ended']}; {truth}", err=True)
    if waiter.ended_by:
        raise Stopped(waiter.ended_by)
    if trace.run["ended"] == "target gone":
        raise Failure(f"process {pid} ended after {events} disturbances; {truth} has them")


def doctor(
    cpu: Annotated[int | None, typer.Option(min=0, help="CPU that will be measured")] = None,
    duration: Annotated[float, _time("of the baseline noise")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Is this machine fit to be measured?  Exit codes: 0 fit, 4 unfit."""
    from sigma_noise.fitness import examine, is_fit, to_json
    from sigma_noise.targets import check_cpu

    checks = examine(cpu=check_cpu(cpu), seconds=duration)
    if as_json:
        typer.echo(json.dumps(to_json(checks), indent=1, allow_nan=False))
    else:
        for check in checks:
            mark = {True: "fit", False: "UNFIT", None: "-"}[check.fit]
            typer.echo(f"{mark:6}{check.name:20}{check.sentence}")
            if check.remedy and check.fit is not True:
                typer.echo(f"{'':26}to mend it: {check.remedy}")
        typer.echo("fit" if is_fit(checks) else "unfit")
    if not is_fit(checks):
        raise typer.Exit(Exit.UNFIT)


def selftest(
    length: Annotated[list[str] | None, typer.Option(help="of stops; repeatable", metavar="TIME")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="stops a second; repeatable")] = None,
    duration: Annotated[float, _time("of each cell")] = 4.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file to write")] = None,
) -> None:
    """What can be seen on this machine: stops of known length and rate, injected and looked for."""
    from sigma_train.files import must_take_file, write_json

    from sigma_noise import selftest as of_machine

    must_take_file("--json", json_file)
    lengths = [seconds(text) for text in length or []] or of_machine.LENGTHS_S
    cells = of_machine.curve(lengths, rate or of_machine.RATES_HZ, duration_s=duration, seed=seed)
    typer.echo("  length     rate  injected  recall  [95 %]       precision  mean length  period error")
    for c in cells:
        period_error = "-" if isnan(c.period_error) else f"{c.period_error:+.3%}"
        typer.echo(
            f"{c.length_s * 1e3:6g} ms {c.rate_hz:5g} Hz {c.injected:9}  {c.recall:6.3f}  "
            f"[{c.recall_low:.2f}, {c.recall_high:.2f}] {c.precision:9.3f}  {c.mean_length_s * 1e3:8.3f} ms  "
            f"{period_error:>12}"
        )
    for rate_hz, limit in of_machine.limits(cells).items():
        seen = (
            "nothing so long was found well" if limit is None else f"{limit * 1e3:g} ms and longer is found"
        )
        typer.echo(f"{rate_hz:g} Hz: {seen}")
    if json_file is not None:
        write_json(json_file, of_machine.to_json(cells))


def _check_used(target: TargetName, given: dict[str, float | None]) -> None:
    for option, value in given.items():
        if value is not None and target not in (of := TARGETS_OF[option]):
            raise WrongInput(f"--{option} is of --target {', '.join(of)}; {target} has no use for it")


def _target(
    name: TargetName,
    pid: int | None,
    cpu: int | None,
    mib: int | None,
    device: int | None,
    length: float | None,
    period: float | None,
) -> Any:
    from sigma_noise import targets

    if (pid is None) == (name in (TargetName.proc, TargetName.quota)):
        raise WrongInput(
            f"--target {name}: --pid is {'missing' if pid is None else 'of proc and quota alone'}"
        )
    match name:
        case TargetName.proc:
            if length is None:
                raise WrongInput("--target proc: --length and --period are missing")
            return targets.Stop(pid)
        case TargetName.cpu:
            return targets.Busy(cpu)
        case TargetName.memory:
            return targets.Memory(cpu, mib=256 if mib is None else mib)
        case TargetName.quota:
            if length is None or period is None:
                raise WrongInput("--target quota: --length (stopped of each period) and --period are missing")
            from sigma_noise.quota import Quota

            return Quota(pid, length_s=length, period_s=period)
        case TargetName.gpu:
            return targets.Gpu(device or 0)


def main() -> None:
    """`python -m sigma_noise.inject_cli`: `inject` without the rest of `sigma`, which takes a second to import."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(inject)
    try:
        app()
    except (Exception, Stopped) as error:
        if (found := verdict(error)) is None:
            raise
        print(f"error: {found[1]}", file=sys.stderr)
        sys.exit(found[0])


if __name__ == "__main__":
    main()
