"""`sigma noise watch`: is the level of this machine changing?  `online`, fed with medians as they are measured."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from sigma_noise.codes import Exit
from sigma_noise.failures import failures_are
from sigma_noise.options import seconds

if TYPE_CHECKING:
    from sigma_noise.online import Alarm


@failures_are(Exit.INTERNAL)
def watch(
    kernel: Annotated[str, typer.Option(help="spin, copy, gemm or grouped")] = "spin",
    quantum: Annotated[float, typer.Option(parser=seconds, metavar="TIME", help="of work")] = "1ms",
    every: Annotated[
        float, typer.Option(parser=seconds, metavar="TIME", help="of quanta, whose median is one sample")
    ] = "1s",
    shift: Annotated[
        float, typer.Option(min=0.001, max=10, help="of the level that matters; 0.1 where jobs run")
    ] = 0.02,
    duration: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="TIME", help="of it all; until a signal without it"),
    ] = None,
    pin: Annotated[int | None, typer.Option(min=0, help="CPU to work on; free without")] = None,
) -> None:
    """Repeat fixed work and say when it takes longer, or less long, for good.  Exit codes: 0 never longer, 1 it was,
    2 wrong input, 5 could not be done."""
    from sigma_train.errors import WrongInput

    from sigma_noise import host, online
    from sigma_noise.plan import as_options
    from sigma_noise.units import count, time_of

    first = online.BURN_IN + online.LEAST_RUN  # samples before which no change is told
    if every < quantum:
        raise WrongInput(f"--every must hold a quantum, {quantum:g} s, found {every:g} s")
    if duration is not None and duration < first * every:
        raise WrongInput(f"--duration must be {first} times --every or more, found {duration:g} s")
    detector, alarms, medians = online.Online(shift), [], []
    try:
        with host.pinned(host.cpu_of(() if pin is None else (pin,))):
            for median_s in medians_of(kernel, quantum, every, duration):
                medians.append(median_s)
                if len(medians) == online.BURN_IN:
                    typer.echo(f"{kernel}: {time_of(float(np.median(medians)))} a quantum; watching")
                if (alarm := detector.update(median_s)) is not None:
                    alarms.append(alarm)
                    typer.echo(f"{time.strftime('%H:%M:%S')}  {told(kernel, alarm, every)}")
    except ValueError as error:
        raise WrongInput(as_options(error)) from None
    finally:  # a signal is how most watches end
        if medians:
            of = f"{count(len(medians), 'median')} of {time_of(every)}"
            typer.echo(f"{of}, {count(len(alarms), 'change')} of level")
    if any(alarm.after > alarm.before for alarm in alarms):
        raise typer.Exit(Exit.REGRESSED)


def medians_of(kernel: str, quantum_s: float, every_s: float, duration_s: float | None) -> Iterator[float]:
    """Seconds of a quantum, of stretches of `every_s` one after the other.  Raises: ValueError."""
    from sigma_noise import loops
    from sigma_noise.work import work

    loops.check_quanta(quantum_s, every_s)
    made = work(kernel)
    loops.calibrate(made, quantum_s)
    begun = time.monotonic()
    while duration_s is None or time.monotonic() - begun < duration_s:
        series = loops.run_fixed_work(made, quantum_s=quantum_s, duration_s=every_s)
        yield float(np.median(series.seconds))


def told(kernel: str, alarm: "Alarm", every_s: float) -> str:
    from sigma_noise.units import time_of

    by = alarm.after / alarm.before - 1
    ago = time_of((alarm.index + 1 - alarm.since) * every_s)
    return (
        f"{kernel} takes {abs(by):.1%} {'longer' if by > 0 else 'less'} since {ago} ago: {time_of(alarm.before)} to "
        f"{time_of(alarm.after)} a quantum (p {alarm.probability:.3f})"
    )
