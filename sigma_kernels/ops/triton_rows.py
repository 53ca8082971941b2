"""The tables' rows that run on Triton, which is imported at their first call: not all have it, and it takes time."""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sigma_kernels.backends import Backend

# Triton's own variable, read as Triton reads it: its kernels then run on tensors of the CPU, for tests.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_row(module: str, function: str, dtypes: tuple[torch.dtype, ...]) -> Backend:
    """A row that calls `function` of sigma_kernels.triton.`module`; under the interpreter only where it is named."""

    @cache
    def found() -> Callable[..., Any]:
        return getattr(import_module(f"sigma_kernels.triton.{module}"), function)

    def run(*args: Any, **kwargs: Any) -> Any:
        data = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device_of(data):  # Triton launches on the current device, wherever the data lie
            return found()(*args, **kwargs)

    missing = None if find_spec("triton") else "triton is not installed (pip install 'sigma-kernels[triton]')"
    return Backend("triton", run, dtypes, "cpu" if IS_INTERPRETED else "cuda", IS_INTERPRETED, missing)
