"""The Triton kernels without a GPU: test_triton_*.py in Triton's interpreter, in processes of their own.

The interpreter is chosen before triton is imported, and for a whole process: torch.compile, in other tests of this one,
would meet it as well.  One file alone: TRITON_INTERPRET=1 pytest tests/test_triton_route.py
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from support import NO_OTHER_PLUGINS, check_tf32

import sigma_kernels as sk
from sigma_kernels.ops import triton_rows

FILES = sorted(Path(__file__).parent.glob("test_triton_*.py"))
SHARES = [  # of about the same time
    [file for file in FILES if "experts" in file.stem],
    [file for file in FILES if "gemm" in file.stem],
    [file for file in FILES if not any(name in file.stem for name in ("experts", "gemm", "fp8"))],
    [file for file in FILES if "fp8" in file.stem],
]
A_LAYER = [FILES[0].with_name("test_triton_experts.py"), "-k", "equals_reference and 33 and 17 and float32"]

in_the_interpreter = pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) < (3, 9),
    reason="before Triton 3.9 its interpreter has no fp8e4b8, and no descriptors of mixed strides",
)


@in_the_interpreter
@pytest.mark.acceptance
@pytest.mark.parametrize("files", SHARES, ids=lambda files: files[0].stem)
def test_in_the_interpreter(files):
    passes_there(*files)


@in_the_interpreter
def test_a_layer_in_the_interpreter():
    """Of what the acceptance step runs whole, the one that all kernels of a layer have a part in."""
    passes_there(*A_LAYER)


def passes_there(*args: str | Path) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "pytest_timeout", *args]
    env = {**os.environ, "TRITON_INTERPRET": "1", **NO_OTHER_PLUGINS}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


def test_triton_is_imported_when_it_is_called_and_not_before():
    code = "import sigma_kernels, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_without_triton_its_rows_say_so(monkeypatch):
    """Defends: an import error in the middle of a call."""
    monkeypatch.setattr(triton_rows, "find_spec", lambda name: None)
    row = triton_rows.triton_row("permute", "permute", (torch.float32,))
    reason = "triton is not installed (pip install 'sigma-kernels[triton]')"
    assert row.missing == row.obstacle(torch.float32, "cuda") == reason


def test_kernels_run_on_the_device_of_the_data(monkeypatch):
    """Defends: a launch on the current GPU for tensors of another one."""
    entered = []

    @contextmanager
    def device_of(data):
        entered.append(data)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(
        triton_rows, "import_module", lambda name: SimpleNamespace(permute=lambda x, n: len(entered))
    )
    x = torch.randn(3)
    assert triton_rows.triton_row("permute", "permute", (torch.float32,)).run(x, 2) == 1
    assert entered[0] is x


SETTERS = {
    "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "set_float32_matmul_precision": "torch.set_float32_matmul_precision('high')",
    "of matmul": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "of cuda": "torch.backends.cuda.matmul.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("setter", SETTERS.values(), ids=SETTERS)
def test_tf32_is_torchs_setting(setter):
    """Defends: torch's getters, of which the older raises once a newer setter was used.  A setting stays: a process."""
    forked.spawn(check_tf32, (setter,), 1)


def test_a_call_on_a_cpu_names_the_reason():
    routing = sk.route(torch.randn(4, 8))
    with (
        sk.backend("triton"),
        pytest.raises(RuntimeError, match="'triton': it runs on cuda, the data lie on cpu"),
    ):
        sk.permute(torch.randn(4, 8), routing)
