"""What becomes of a failure where exit code 1 is a verdict: a gate must not read a defect as a regression."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from sigma_train.errors import verdict

from sigma_noise.codes import Exit


@contextmanager
def failures_are(code: Exit) -> Iterator[None]:
    """Around a verb: whatever goes wrong ends with `code` and its sentence, or traceback; wrong input stays 2."""
    try:
        yield
    except typer.Exit:  # a verdict
        raise
    except Exception as error:
        found = verdict(error)
        if found is not None and found[0] == Exit.USAGE:
            raise
        if found is None:
            traceback.print_exc()
        else:
            print(f"error: {found[1]}", file=sys.stderr)
        raise typer.Exit(code) from None
