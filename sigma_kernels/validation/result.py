"""What a check of a node says."""

from dataclasses import dataclass

OK, SLOW, WRONG, NOT_RUN = "ok", "slow", "wrong", "not run"


@dataclass(frozen=True)
class Result:
    """One of ok, slow, wrong, not run; `why` is a part of a sentence, and there for all but ok.

    check is kernels, memory, rates or ranks; `where` the backend, instruction set or device.
    """

    check: str
    name: str
    where: str
    result: str
    why: str = ""
    dtype: str = ""
    repetitions: int = 0

    def __str__(self) -> str:
        parts = [part for part in (self.name, self.dtype, self.where) if part]
        return f"{', '.join(parts)}{': ' if self.why else ''}{self.why}"
