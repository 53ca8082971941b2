"""Four ranks of tests/test_noise_steps.py of which one is late; in a module, as a spawned process imports it."""

import json
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sigma_noise.parts import Parts
from sigma_noise.recorder import Recorder, now_ns

from sigma_kernels import collectives
from sigma_kernels.collectives import observed

LATE = 2


def run(rank: int, ranks: int, store: str, folder: str, steps: int, sleep_s: float) -> None:
    """All-reduces, before each of which rank 2 sleeps; its sleeps are written down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    recorder, slept = Recorder(rank), []
    step, number = recorder.code("quantum", "step"), recorder.code("counter", "step")
    call, blocked = recorder.code("quantum", "sum"), recorder.code("quantum", "blocked")

    def see(what: str, layer: int, is_backward: bool, arrived: int, waits: int, ended: int) -> None:
        recorder.add(call, arrived, ended)
        recorder.add(blocked, waits, ended)

    dist.barrier()
    collectives.OBSERVERS.append(see)
    x = torch.ones(1000)
    for i in range(steps):
        began = now_ns()
        if rank == LATE:
            time.sleep(sleep_s)
            slept.append((now_ns() - began) * 1e-9)
        with observed("sum"):
            dist.all_reduce(x)
        recorder.add(step, began, now_ns())
        recorder.add(number, began, began, i + 1)
    collectives.OBSERVERS.remove(see)
    about = {
        "boot": "here",
        "groups": {"0": {"all": list(range(ranks))}},
        "collectives": {"sum": "all"},
    }
    Parts(Path(folder), rank, {}, about).add(recorder.taken())
    if rank == LATE:
        Path(folder, "truth.json").write_text(json.dumps(slept))
    dist.destroy_process_group()
