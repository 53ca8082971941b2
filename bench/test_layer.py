"""The expert layer on the shapes of known models."""

import layer
import pytest
from shapes import DTYPES, LAYERS, LOADS, short


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_forward(race, dtype, shape, load):
    layer.forward(race, "layer", dtype, shape, load)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("memory", ["fresh", "kept"])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_forward_backward(race, dtype, shape, memory, load):
    layer.forward_backward(race, "layer", dtype, shape, memory, load)
