"""Fixtures: every backend this machine has, and fresh memory that starts as NaN."""

import os
from collections.abc import Iterator

# Before torch is imported: with `pytest -n` threads outnumber cores, and those that wait must not do so at full speed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

import sigma_kernels as sk
from sigma_kernels.ops.triton_rows import IS_INTERPRETED

if IS_INTERPRETED:  # a process that test_triton.py starts: see there
    import interpreted

    interpreted.install()
    np.seterr(all="ignore")  # idle lanes of a block compute exp(-inf - -inf) and store it nowhere
else:
    collect_ignore_glob = ["test_triton_*.py"]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """An output that a kernel leaves unwritten shows as NaN."""
    torch.manual_seed(0)
    fill, strict = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(
    params=["triton"] if IS_INTERPRETED else ["cpu", "reference"]
)  # what runs on tensors of a CPU
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with sk.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose cache of tokens all programs of the session share."""
    return {**os.environ, "SIGMA_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "2"}
