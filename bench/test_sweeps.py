"""The expert layer over T at shape A, and over E at constant T and constant bytes of weights."""

import layer
import pytest
from shapes import DTYPES, SWEEP_E, SWEEP_T, short


@pytest.mark.parametrize("shape", SWEEP_T + SWEEP_E, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sweep_forward(race, device, dtype, shape):
    layer.forward(race, device, shape.name, dtype, shape, "balanced")


@pytest.mark.parametrize("shape", SWEEP_T + SWEEP_E, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sweep_forward_backward(race, device, dtype, shape):
    layer.forward_backward(race, device, shape.name, dtype, shape, "fresh", "balanced")
