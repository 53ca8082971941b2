"""The fixture `race`, and the file of results that `sigma bench` reads."""

import json
import resource
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from clock import Gpu, Host
from race import FEW_ROUNDS, OURS, Race, absent, first_calls, record
from torch import Tensor

import sigma_kernels as sk

RACES = pytest.StashKey[list[dict[str, Any]]]()
CLOCK = pytest.StashKey[Host | Gpu]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("races")
    group.addoption("--rounds", type=int, default=7, help="rounds of each race")
    group.addoption("--quick", action="store_true", help="shape A only")
    group.addoption(
        "--tiny", action="store_true", help="one race of each test, too small to measure anything"
    )
    group.addoption("--threads", type=int, default=None, help="torch.set_num_threads")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="what is raced")
    group.addoption("--race-json", type=Path, default=None, help="write the results there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RACES] = []
    on_gpu = config.getoption("--device") == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: torch {torch.__version__} sees no GPU here")
    config.stash[CLOCK] = Gpu() if on_gpu else Host()
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    if config.getoption("--tiny"):
        shapes.shrink_all()  # before the tests are imported


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items
    if config.getoption("--device") == "cpu":
        kept = [i for i in kept if parameter(i, "shape", None) not in shapes.STEPS]
    if config.getoption("--quick"):
        kept = [i for i in kept if parameter(i, "shape", shapes.A) == shapes.A]
    if config.getoption("--tiny"):
        kept = list({i.originalname: i for i in reversed(kept)}.values())[::-1]
    kept = sorted(kept, key=lambda i: i.get_closest_marker("keeps_memory") is not None)
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = kept
    for item in items:  # pytest-benchmark times ours, by the clock that times the others
        item.add_marker(pytest.mark.benchmark(timer=config.stash[CLOCK].now))


def parameter(item: pytest.Item, name: str, default: object) -> object:
    return item.callspec.params.get(name, default) if hasattr(item, "callspec") else default


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the data lie; they are made on the CPU, so that they are the same anywhere."""
    return pytestconfig.stash[CLOCK].device


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """race(group, ours, shape=..., peer=..., bound_dense=...): who is checked, then run in turns and recorded.

    check:  called with each candidate's name and first result, before the clock; bounds are not checked.
    limits: rounds of those too slow for all, FEW_ROUNDS where the first call took longer than SLOW_S; once: those
            timed in their first call alone, on a CPU; apart: those with threads of their own; missing: reasons of
            those who take no part.
    calls:  so many a turn, where one is too short for the clock.
    flops, moved: of one call, for GF/s and GB/s; moved_by: bytes of those who move others.
    index:  whom the tokens go to, for the rows per expert.
    """
    config, clock = request.config, request.config.stash[CLOCK]
    on_gpu = clock.device.type == "cuda"

    def run(
        group: str,
        ours: Callable[[], object],
        *,
        shape: object = "",
        load: str = "",
        memory: str = "",
        check: Callable[[str, Any], None] | None = None,
        limits: Mapping[str, int] | None = None,
        once: Collection[str] = (),
        apart: Collection[str] = (),
        missing: Mapping[str, str] | None = None,
        calls: int = 1,
        flops: int | None = None,
        moved: int | None = None,
        moved_by: Mapping[str, int] | None = None,
        index: Tensor | None = None,
        note: str = "",
        **others: Callable[[], object],
    ) -> None:
        once = () if on_gpu else once  # a first call there compiles
        times, reasons, slow = first_calls({OURS: ours, **others}, check, once, clock.wall, on_gpu)
        assert OURS not in reasons, reasons[OURS]
        rounds = config.getoption("--rounds")
        regular = {
            name: clock.turn(call, calls)
            for name, call in others.items()
            if name not in once and name not in reasons
        }
        turns = Race(
            regular, rounds, dict.fromkeys(slow, FEW_ROUNDS) | dict(limits or {}), apart, clock=clock.now
        )
        benchmark.group = "/".join(part for part in (group, str(shape), load, memory) if part)
        benchmark.pedantic(clock.turn(ours, calls), setup=turns.until_ours, rounds=rounds, iterations=1)
        turns.finish()
        sized = isinstance(shape, shapes.Shape)
        lines = [record(OURS, list(benchmark.stats.stats.data), calls)]
        lines += [record(n, turns.times[n], calls, (moved_by or {}).get(n)) for n in regular]
        lines += [record(n, t) for n, t in times.items()]
        lines += [absent(n, why) for n, why in (reasons | dict(missing or {})).items()]
        config.stash[RACES].append({
            "group": group, "shape": str(shape), "load": load, "memory": memory, "flops": flops, "moved": moved,
            "calls": calls, "note": note, "sizes": asdict(shape) if sized else None,
            "rows": shapes.spread(index, shape.E) if sized and index is not None else None, "candidates": lines,
        })  # fmt: skip
        write(config)
        sk.empty_cache()  # the next race is of other sizes
        clock.release()

    return run


def write(config: pytest.Config) -> None:
    """After every race, so that a long run that is ended has not been for nothing."""
    target = config.getoption("--race-json")
    if target is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"peak_bytes": peak, "device": config.stash[CLOCK].about(), "races": config.stash[RACES]}
        target.write_text(json.dumps(found, indent=1))
