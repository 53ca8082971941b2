"""Fixtures: every backend this machine has, and fresh memory that starts as NaN.

`pytest --device cuda` runs the tests of a GPU's backends on a GPU, from the files that otherwise show them right in
Triton's interpreter and in the emulator, and test_gpu.py and test_noise_gpu.py.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

# Before torch is imported: with `pytest -n` threads outnumber cores, and those that wait must not do so at full speed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # same bits, as torch wants it said

import numpy as np
import pytest
import torch

import sigma_kernels as sk
from sigma_kernels.ops.triton_rows import IS_INTERPRETED

if IS_INTERPRETED:  # a process that test_triton.py starts: see there
    import interpreted

    interpreted.install()
    np.seterr(all="ignore")  # idle lanes of a block compute exp(-inf - -inf) and store it nowhere

IN_THE_INTERPRETER = ("test_triton_*.py",)
# Begun first, so that no worker of `pytest -n` is left with one of them when the others are done.
LONG = ("test_triton.py", "test_train_ranks.py", "test_bench_device.py", "test_bench.py", "test_cuda.py")
ON_A_GPU = ("test_triton_[!i]*.py", "test_cuda.py", "test_gpu.py", "test_noise_gpu.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where the tensors of tests lie"
    )
    parser.addoption("--kills", type=int, default=20, help="of the fault campaign (-m faults)")
    parser.addoption("--page", help="markdown file that the fault campaign writes")


def pytest_configure(config: pytest.Config) -> None:
    if is_on_gpu(config) and (IS_INTERPRETED or not torch.cuda.is_available()):
        raise pytest.UsageError("--device cuda: torch sees no GPU here, or TRITON_INTERPRET is set")


def is_on_gpu(config: pytest.Config) -> bool:
    return config.getoption("--device") == "cuda"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    name = collection_path.name
    if is_on_gpu(config):
        return not any(fnmatch(name, pattern) for pattern in ON_A_GPU) or None
    is_left_out = name in ("test_gpu.py", "test_noise_gpu.py") or (
        not IS_INTERPRETED and any(fnmatch(name, pattern) for pattern in IN_THE_INTERPRETER)
    )
    return is_left_out or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: what runs on the tensors of a test; test_gpu.py names its own."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in named:
        is_triton = IS_INTERPRETED or is_on_gpu(metafunc.config)
        metafunc.parametrize("backend", ["triton"] if is_triton else ["cpu", "reference"], indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors are made that name no device."""
    found = torch.device(request.config.getoption("--device"))
    if found.type == "cpu":
        yield found
        return
    torch.set_default_device(found)
    yield found
    torch.set_default_device(None)
    torch.cuda.empty_cache()  # for the other processes of `pytest -n`


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(device: torch.device) -> Iterator[None]:
    """An output that a kernel leaves unwritten shows as NaN."""
    torch.manual_seed(0)
    fill, strict = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    # The reference's own operations have on a GPU no deterministic kernels, some of them.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(strict)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with sk.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of `pytest -n` have, of this run alone."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(scope="session")
def cache(shared: Path) -> dict[str, str]:
    """An environment whose cache of tokens all programs of the run share."""
    return {**os.environ, "SIGMA_CACHE": str(shared / "cache"), "OMP_NUM_THREADS": "2"}


@pytest.fixture
def make_trainer(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    cache: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable]:
    """make(name, *settings, resume): trainers of the preset smoke and SMALL, which the file of the test has.

    Each in the folder `name`, closed at the end; bounds of the machine are not timed.
    """
    from rich.console import Console
    from sigma_train import loop
    from sigma_train.config import load_config
    from sigma_train.folder import claimed

    monkeypatch.setattr(loop, "dense_tokens_per_s", lambda config: 1.0)
    monkeypatch.setattr(loop, "product_flops_per_s", lambda dtype: 1e12)
    common = [*request.module.SMALL, f"data.cache_dir={cache['SIGMA_CACHE']}"]
    with contextlib.ExitStack() as stack:

        def make(name: str, *settings: str, resume: bool = False) -> loop.Trainer:
            out = tmp_path / name
            config = load_config("smoke", None, [*common, *settings], {"train": {"out": str(out)}})
            with claimed(out):
                trainer = loop.Trainer(config, Console(quiet=True), resume)
            stack.callback(trainer.metrics.close)
            return trainer

        yield make
