"""Before anything is injected: is this machine fit for it?  Noise of others drowns what is measured."""

import os

import pytest
from sigma_noise.fitness import BASELINE, baseline_noise

CPU = max(os.sched_getaffinity(0))


def skip_if_unfit(when: str = "before anything is injected") -> None:
    """Half a second of a loop that does nothing, on the last CPU that this process may use."""
    if (share := baseline_noise(0.5, CPU)) > BASELINE:
        pytest.skip(f"{share:.1%} of CPU {CPU} is lost {when}; at most {BASELINE:.0%} may be")
