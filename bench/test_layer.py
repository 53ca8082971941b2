"""The expert layer on the shapes of known models."""

import layer
import pytest
from shapes import DTYPES, LAYERS, LOADS, short


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_forward(race, device, dtype, shape, load):
    layer.forward(race, device, "layer", dtype, shape, load)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("memory", ["fresh", "kept"])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_forward_backward(race, device, dtype, shape, memory, load):
    layer.forward_backward(race, device, "layer", dtype, shape, memory, load)
