"""Rates of a node that is known to be sound, kept in a file, and whether those of now are as good."""

import json
import os
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sigma_train.errors import WrongInput
from sigma_train.files import write_text
from sigma_train.processor import processor_name

from sigma_kernels import _C
from sigma_kernels.validation.rates import Rate

SPREADS = 3  # deviations of both measurements that are no sign of anything
LARGEST_MARGIN = 0.5  # however noisy both were: half of the speed is slow

Strict = ConfigDict(extra="forbid", frozen=True)


class Machine(BaseModel):
    """What must be the same of two nodes whose rates are compared."""

    model_config = Strict

    processor: str
    isa: str
    cores: int
    torch: str
    gpus: list[str]

    @classmethod
    def here(cls) -> "Machine":
        return cls(
            processor=processor_name(),
            isa=_C.isa(),
            cores=len(os.sched_getaffinity(0)),
            torch=torch.__version__,
            gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        )

    def difference(self, other: "Machine") -> str | None:
        """The first thing in which the other differs."""
        for name, mine in self:
            if mine != (theirs := getattr(other, name)):
                return f"{name} {json.dumps(theirs)}, here {json.dumps(mine)}"
        return None


class Known(BaseModel):
    """One rate: the median of all measurements and their robust relative deviation."""

    model_config = Strict

    unit: str
    median: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Baseline(BaseModel):
    """The content of a baseline's file."""

    model_config = Strict

    schema_version: Literal[1] = 1
    machine: Machine
    rates: dict[str, Known]


def key(rate: Rate) -> str:
    return f"{rate.name}, {rate.device}"


def save(path: Path, rates: list[Rate]) -> None:
    known = {key(r): Known(unit=r.unit, median=median(r.values), spread=r.spread) for r in rates}
    write_text(path, Baseline(machine=Machine.here(), rates=known).model_dump_json(indent=1) + "\n")


def load(path: Path) -> Baseline:
    """Raises: WrongInput if the file cannot be read or is no baseline."""
    try:
        return Baseline.model_validate_json(path.read_bytes())
    except OSError as error:
        raise WrongInput(f"--baseline: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WrongInput(
            f"--baseline: {path} is no baseline: {where + ': ' if where else ''}{first['msg']}"
        ) from None


def check_machine(path: Path, baseline: Baseline) -> None:
    """Raises: WrongInput for the baseline of another kind of machine."""
    if different := Machine.here().difference(baseline.machine):
        raise WrongInput(f"--baseline: {path} is of another kind of machine: {different}")


def allowed(rate: Rate, known: Known, margin: float) -> float:
    """The share of the baseline's speed that may be missing."""
    return max(margin, min(LARGEST_MARGIN, SPREADS * (rate.spread + known.spread)))


def lack(rate: Rate, known: Known, margin: float) -> str | None:
    """Why a rate is slow beside its baseline, judged by its best batch; None if it is not."""
    share = rate.best / known.median if rate.up else known.median / rate.best
    lowest = 1 - allowed(rate, known, margin)
    if share >= lowest:
        return None
    return f"{rate.best:.4g} {rate.unit} is {share:.0%} of the baseline's speed, less than {lowest:.0%}"
