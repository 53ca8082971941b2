"""The kinds of settings: what each accepts, strictly, and in words for errors and the documentation."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

# Of [objective], and of its parts outside of the trainer.
Aggregate = Literal["max", "mean", "sum", "first", "bytes"]
Alignment = Literal["span", "index", "chunk", "edit"]
Unmapped = Literal["include", "exclude"]
Scope = Literal["batch", "sequence"]


class Wanted(str):
    """What a field accepts, in words; errors read '<key> must be <wanted>, found <value>'."""

    __slots__ = ()


def integer(low: int, high: int, kind: str = "an integer", remark: str = "", **more: int) -> Any:
    """A strict integer in low..high: no True for 1, no '3' for 3."""
    wanted = Wanted(f"{kind} from {low}{remark} to {high}")
    return Annotated[int, Field(strict=True, ge=low, le=high, **more), wanted]


def number(wanted: str, **bounds: float) -> Any:
    """A strict number, and no nan."""
    return Annotated[float, Field(strict=True, allow_inf_nan=False, **bounds), Wanted(wanted)]


def wanted_of(kind: Any) -> Wanted:
    return next(note for note in kind.__metadata__ if isinstance(note, Wanted))


def or_none(kind: Any) -> Any:
    return Annotated[kind | None, Wanted(f"{wanted_of(kind)}, or none")]


SEED_MAX = (1 << 63) - 1  # TOML's largest integer

if TYPE_CHECKING:  # a call is no type to a type checker
    Count = int
    Whole = int
    Size = int
    EvenSize = int
    Vocabulary = int
    Threads = int
    Seed = int
    Bytes = int
    Positive = float
    NonNegative = float
    Share = float
    OpenShare = float
    Kept = float
    Beta = float
else:
    Count = integer(1, 10**9)
    Whole = integer(0, 10**9)
    Size = integer(1, 1 << 20)  # of a dimension
    EvenSize = integer(2, 1 << 20, "an even integer", multiple_of=2)
    Vocabulary = integer(257, 1 << 24, remark=" (every byte and the end of text)")
    Threads = integer(1, 1024)  # OpenMP dies of more than the system grants
    Seed = integer(0, SEED_MAX)
    Bytes = integer(1, 10**18)
    Positive = number("a number above 0", gt=0)
    NonNegative = number("a number of at least 0", ge=0)
    Share = number("a number from 0 to 1", ge=0, le=1)
    OpenShare = number("a number above 0 and below 1", gt=0, lt=1)
    Kept = number("a number above 0 and at most 1", gt=0, le=1)
    Beta = number("a number of at least 0 and below 1", ge=0, lt=1)
Folder = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$"), Wanted("the name of a folder")]
TopK = Annotated[Size | tuple[Size, ...], Wanted(f"{wanted_of(Size)}, or a list of them, one for each layer")]
Point = Whole | Share
Phases = Annotated[
    tuple[tuple[Point, tuple[Size, ...]] | tuple[Point, tuple[Size, ...], Point], ...],
    Wanted(
        "a list of [begin, top_k of each layer] or [begin, top_k of each layer, end of a ramp], "
        "begin and end being steps or shares of the run, as 0.9"
    ),
]
Sizes = Annotated[tuple[Size, ...], Wanted(f"a list of {wanted_of(Size)}")]
File = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$"), Wanted("the name of a file")]
OptionalFile = or_none(File)
OptionalCount = or_none(Count)
OptionalBytes, OptionalFolder = or_none(Bytes), or_none(Folder)
OptionalPositive, OptionalThreads = or_none(Positive), or_none(Threads)
Betas = Annotated[tuple[Beta, Beta], Wanted("two numbers of at least 0 and below 1")]
Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Wanted("a list of files, folders or globs"),
]
