"""Fixtures: every backend this machine has, and fresh memory that starts as NaN."""

import os
from collections.abc import Iterator

import pytest
import torch

import sigma_kernels as sk


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


@pytest.fixture(params=["cpu", "reference"])  # what runs on tensors of a CPU
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with sk.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose cache of tokens all programs of the session share."""
    return {**os.environ, "SIGMA_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "2"}
