"""How long training stands still for a checkpoint, and what steps cost while one is written.

    python bench/save_pause.py --preset tiny-96 --steps 60 --set train.save_every=5 --out /tmp/pause
    python -m torch.distributed.run --standalone --nproc-per-node 2 bench/save_pause.py ...

Takes the arguments of `sigma train`; the first save, whose copy has fresh pages, stands apart.
"""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import sigma_cli
from sigma_train.loop import Trainer

times: dict[str, list[float]] = {
    "save": [],
    "step": [],
    "step while one is written": [],
    "save, of which waiting": [],
}


def timed(method: Callable[..., Any], kind: Callable[[Trainer], str]) -> Callable[..., Any]:
    def call(trainer: Trainer, *args: Any) -> Any:
        name, began = kind(trainer), time.perf_counter()
        result = method(trainer, *args)
        times[name].append(time.perf_counter() - began)
        return result

    return call


def time_waits() -> None:
    """For the checkpoint before; a program that has no Saver does not wait."""
    with contextlib.suppress(ImportError):
        from sigma_train.saver import Saver

        Saver.wait = timed(Saver.wait, lambda _: "save, of which waiting")  # type: ignore[method-assign]


def kind_of_step(trainer: Trainer) -> str:
    saver = getattr(trainer, "saver", None)
    is_written = saver is not None and saver._pending is not None and not saver._pending[0].done()
    return "step while one is written" if is_written else "step"


def main() -> None:
    Trainer._save = timed(Trainer._save, lambda _: "save")  # type: ignore[method-assign]
    Trainer._train_step = timed(Trainer._train_step, kind_of_step)  # type: ignore[method-assign]
    time_waits()
    sys.argv.insert(1, "train")
    try:
        sigma_cli.main()
    finally:
        if os.environ.get("RANK", "0") == "0":
            first, *saves = times["save"] or [0.0]
            print(f"first save {first * 1e3:.0f} ms; then median of")
            for name, values in {**times, "save": saves}.items():
                if values:
                    low, middle, high = (f"{f(values) * 1e3:.0f}" for f in (min, statistics.median, max))
                    print(f"{len(values):4d} {name}: {middle} ms ({low} to {high})")


if __name__ == "__main__":
    main()
