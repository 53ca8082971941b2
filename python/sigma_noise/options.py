"""Times, lists and sizes on a command line."""

import re
from fractions import Fraction

import typer

LONGEST_S = 1_000_000  # so that ns of any time fit into 64 bits
UNITS = {"ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": 1, "m": 60, "h": 3600,
         "": 1}  # fmt: skip


def seconds(text: str | float) -> float:
    """A number with a unit of UNITS, such as 250us; seconds without one."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]{1,2})?) ?([a-z]*)", str(text))
    try:
        if match is None or match[2] not in UNITS:
            raise ValueError
        found = Fraction(match[1]) * UNITS[match[2]]
        if found > LONGEST_S:
            raise ValueError
        return float(found)
    except ValueError:
        told = f"{text!r} is no time such as 250us, 1ms, 10s or 2m, of {LONGEST_S} s at most"
        raise typer.BadParameter(told) from None


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    from sigma_train.errors import WrongInput

    if text is None:
        return ()
    if not all(part.isdecimal() for part in names(text)):
        raise WrongInput(f"--{option} must be whole numbers by commas, found {text!r}")
    return tuple(int(part) for part in names(text))


def given(context: typer.Context) -> list[str]:
    """Options and arguments that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    named = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    return [name.replace("_", "-") for name in named]


def sizes(texts: list[str]) -> dict[str, dict[str, int]]:
    """`grouped.E=96` and its like, by kernel."""
    from sigma_train.errors import WrongInput

    found: dict[str, dict[str, int]] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)\.(\w+)=([0-9]+)", text)
        if match is None or int(match[3]) < 1:
            raise WrongInput(f"--size must be like grouped.E=96, found {text!r}")
        found.setdefault(match[1], {})[match[2]] = int(match[3])
    return found
