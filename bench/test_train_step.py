"""One training step of a whole language model, with malloc as it is installed and as `sigma train` has it."""

import pytest
import train_step
from shapes import DTYPES, short
from sigma_train.loop import keep_freed_memory


@pytest.mark.parametrize("dtype", DTYPES[:1], ids=short)
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_train_step(race, device, tmp_path, pytestconfig, dtype):
    train_step.race_steps(race, device, tmp_path, pytestconfig.getoption("--tiny"), dtype)


@pytest.mark.keeps_memory
@pytest.mark.parametrize("dtype", DTYPES[::-1], ids=short)  # bf16 first: --tiny races that
@pytest.mark.filterwarnings("ignore")
def test_train_step_kept(race, device, tmp_path, pytestconfig, dtype):
    if device.type != "cpu":
        pytest.skip("malloc and autocast as sigma train sets them are a CPU's")
    keep_freed_memory()
    train_step.race_steps(race, device, tmp_path, pytestconfig.getoption("--tiny"), dtype, "kept")
