"""How `sigma noise` ends: verdicts and exit codes, in one place.

A code is never a count: 256 failures would wrap to 0 in a shell.
"""

from enum import IntEnum, StrEnum


class Exit(IntEnum):
    OK = 0  # nothing to object to: equivalent, improved, within the budget
    REGRESSED = 1  # or a budget exceeded
    USAGE = 2
    INCONCLUSIVE = 3  # too few or too scattered runs to say
    UNFIT = 4  # a machine on which nothing can be said
    INTERNAL = 5  # a defect of ours


class Verdict(StrEnum):
    IMPROVED = "improved"
    EQUIVALENT = "equivalent"
    REGRESSED = "regressed"
    INCONCLUSIVE = "inconclusive"
    UNFIT = "unfit"

    @property
    def exit(self) -> Exit:
        return _EXITS[self]


_EXITS = {
    Verdict.IMPROVED: Exit.OK,
    Verdict.EQUIVALENT: Exit.OK,
    Verdict.REGRESSED: Exit.REGRESSED,
    Verdict.INCONCLUSIVE: Exit.INCONCLUSIVE,
    Verdict.UNFIT: Exit.UNFIT,
}
FAILING = tuple(verdict for verdict in Verdict if verdict.exit)  # that end a command with another code than 0
