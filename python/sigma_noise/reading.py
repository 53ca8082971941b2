"""Measurements from disk, for the verbs of `sigma noise`."""

from pathlib import Path

from sigma_train.errors import WrongInput

from sigma_noise import parts, steps, trace
from sigma_noise.trace import Trace


def read_any(path: Path) -> Trace:
    """A file or a folder, of a training that still goes on as well.  Raises: WrongInput."""
    return parts.read(path) if path.is_dir() and parts.has_any(path) else trace.read(path)


def read_quanta(path: Path) -> Trace:
    """A measurement of `sigma noise run` or an import, to be compared.  Raises: WrongInput, for a record of a training
    too: the work of its steps is not fixed, as it goes with the batch, so that runs of equal code differ.
    """
    found = read_any(path)
    if steps.has_steps(found):
        raise WrongInput(
            f"{path}: a record of sigma train, whose steps are no fixed work to compare; make runs of both machines "
            "with `sigma noise run`, or read each record with `sigma noise analyze`"
        )
    return found
