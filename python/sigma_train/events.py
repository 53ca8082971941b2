"""The events of ledger.jsonl: one JSON object a line; `at` and `began` are nanoseconds of the wall clock.

Within a process `at` is the wall clock of its beginning plus what the monotonic clock has made since, so that a clock
that is set does not change a duration.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sigma_train.errors import WrongInput

FILE = "ledger.jsonl"

Ns = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Number = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Rate = Annotated[float, Field(gt=0, lt=1e30)]
RankCount = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]

# What the time since the line before went into; a "step" is useful until it is lost.
Was = Literal[
    "start", "step", "left_out", "checkpoint", "validation", "check", "restart", "report", "unknown"
]
How = Literal["finished", "signal", "budget", "failed"]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    at: Ns


class Begin(_Event):
    """A process holds the run's folder and is about to train; of several ranks the first one writes."""

    event: Literal["begin"] = "begin"
    began: Ns  # when the machine was first held: the process's own start, or that of --nproc's parent
    ranks: RankCount
    resumed: Number = 0  # the step of the checkpoint that it goes on from
    restarted: bool = False  # by a program, after the attempt before, and not by the user
    launch: str | None = None  # what started the ranks, and writes their end
    machine: str = ""  # on an equal one the peak is not measured again
    tokens: Number = 0  # of a step
    flops: Number = 0  # of the model, a token
    peak: Rate | None = None  # FLOP/s of all ranks, where it is known from an earlier attempt


class Peak(_Event):
    """The FLOP/s that all ranks together reach in a dense product."""

    event: Literal["peak"] = "peak"
    flops_per_s: Rate


class Spent(_Event):
    """The time since the line before; with `step` a step is at its end, without one it goes on."""

    event: Literal["spent"] = "spent"
    was: Was
    step: Number | None = None


class Back(_Event):
    """The run has gone back to the checkpoint of `step`."""

    event: Literal["back"] = "back"
    step: Number


class End(_Event):
    """An attempt is over, or was found to be; what started several ranks writes one of its own after the first rank's.

    began, ranks: for an attempt that ended before it wrote a Begin.
    """

    event: Literal["end"] = "end"
    how: How | None = None  # None: as it said itself
    why: str = ""
    launch: str | None = None
    began: Ns | None = None
    ranks: RankCount | None = None
    restarted: bool = False


Event = Begin | Peak | Spent | Back | End
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
CLEAN: tuple[How, ...] = tuple(how for how in get_args(How) if how != "failed")


def to_line(event: Event) -> bytes:
    return event.model_dump_json(exclude_none=True).encode() + b"\n"


def read_events(path: Path) -> Iterator[Event]:
    """The events of a ledger, which may grow meanwhile.

    A line that a killed process left unfinished is passed over: the last one, or one before a Begin or an End, with
    which the next process goes on.  Raises: WrongInput if there is no ledger or it holds another line that is no event.
    """
    unfinished: int | None = None
    for number, line in enumerate(_lines(path), 1):
        try:
            event = _EVENT.validate_json(line)
        except ValidationError:
            if unfinished is not None:
                break
            unfinished = number
            continue
        if unfinished is not None and not isinstance(event, Begin | End):
            break
        unfinished = None
        yield event
    else:
        return
    raise WrongInput(f"{path} is damaged: line {unfinished} is no event of a ledger")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            for line in file:
                yield line
                if not line.endswith(b"\n"):
                    return  # its rest, which may be written by now, would be read as a line of its own
    except FileNotFoundError:
        raise WrongInput(f"{path.parent} holds no ledger of a run: {path.name} is missing") from None
    except OSError as error:
        raise WrongInput(f"cannot read {path}: {error.strerror}") from None
