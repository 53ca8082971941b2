"""The fixture `race`, and the file of results that `sigma bench` reads."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from race import OURS, Race, first_calls, record

RACES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("races")
    group.addoption("--rounds", type=int, default=7, help="rounds of each race")
    group.addoption("--quick", action="store_true", help="shape A only")
    group.addoption("--threads", type=int, default=None, help="torch.set_num_threads")
    group.addoption("--race-json", type=Path, default=None, help="write the results there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RACES] = []
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    slow = [
        i
        for i in items
        if getattr(i, "callspec", None) and i.callspec.params.get("shape", shapes.A) != shapes.A
    ]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """race(group, ours, shape=..., peer=..., bound_dense=...): who is checked, then run in turns and recorded.

    check:  called with each candidate's name and first result, before the clock; bounds are not checked.
    limits: rounds of those too slow for all; once: those timed in their first call alone.
    flops, moved: of one call, for GF/s and GB/s.
    """
    config = request.config

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
        flops: int | None = None,
        moved: int | None = None,
        **others: Callable[[], object],
    ) -> None:
        times = first_calls({OURS: ours, **others}, check, once)
        rounds = config.getoption("--rounds")
        regular = {name: call for name, call in others.items() if name not in once}
        turns = Race(regular, rounds, limits or {})
        benchmark.group = "/".join(part for part in (group, str(shape), load, memory) if part)
        benchmark.pedantic(ours, setup=turns.until_ours, rounds=rounds, iterations=1)
        turns.finish()
        times |= turns.times
        config.stash[RACES].append({
            "group": group, "shape": str(shape), "load": load, "memory": memory, "flops": flops, "moved": moved,
            "candidates": [record(OURS, list(benchmark.stats.stats.data)), *(record(n, times[n]) for n in others)],
        })  # fmt: skip

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--race-json")
    if target is not None:
        target.write_text(json.dumps(session.config.stash[RACES], indent=1))
