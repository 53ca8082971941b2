"""`train.noise`: when each phase of a step and each collective began and ended, on every rank, in RUN/noise.

The loop says what it does by `turn`; collectives are told by `sigma_kernels.collectives`.  Both are stamps of the clock
by which the ledger counts; a file's `wall_ns` is what makes them the ledger's wall time.
"""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sigma_kernels import collectives
from sigma_train.config import Config
from sigma_train.mesh import Mesh
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks

FOLDER = "noise"
PHASES = ("flags", "data", "forward", "backward", "gradients", "guard", "optimizer", "log")
FLAGS, DATA, FORWARD, BACKWARD, GRADIENTS, GUARD, OPTIMIZER, LOG = range(len(PHASES))
PAUSES = ("checkpoint", "validation", "check", "restart", "record")  # between steps
# Collectives, by the ranks that take part: the first of all, the last of those that share experts.
GROUPS = {
    "all": ("sum", "first", "gathered", "load", "norm", "layers"),
    "shards": ("gather", "scatter"),
    "replicas": ("replicas",),
    "copies": ("experts",),
    "experts": ("counts", "rows", "indices", "weights", "answers"),
}


class RecordWarning(UserWarning):
    """Something about the record that does not keep a run from ending as it does."""


class NoRecord:
    """What the loop speaks to where nothing is recorded."""

    def watch(self, model: LanguageModel, mesh: Mesh | None) -> None:
        """Before the first step, on all ranks."""

    def begin_step(self, number: int) -> None:
        """`number` counts from 1; a step that was begun and is not ended is not recorded."""

    def turn(self, phase: int) -> None:
        """What the step did until here is over, and this phase begins."""

    def end_step(self) -> None:
        """And `save`, where much is held."""

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Between steps."""
        yield

    def save(self) -> None:
        """Have on disk what was recorded until now.  Raises: OSError; nothing is lost then, `close` writes it."""

    def finish(self) -> None:
        """The end of a run that came to one; a collective, after which the files of all ranks are there."""

    def close(self) -> None:
        """The end, whatever led to it."""


def recorder_of(config: Config, ranks: Ranks) -> NoRecord:
    return StepNoise(Path(config.train.out), config, ranks) if config.train.noise else NoRecord()


class StepNoise(NoRecord):
    """One rank's record.  Not for use by several trainers of a process at once: collectives tell all that ask."""

    def __init__(self, out: Path, config: Config, ranks: Ranks) -> None:
        from sigma_noise import parts, recorder, step_counters  # pyarrow, which other runs do without

        self._recorder, self._now = recorder.Recorder(ranks.rank), recorder.now_ns
        self._counters = step_counters.StepCounters(self._recorder)
        code = self._recorder.code
        self._phases = [code("quantum", name) for name in PHASES]
        self._pauses = {name: code("quantum", name) for name in PAUSES}
        self._step, self._blocked = code("quantum", "step"), code("quantum", "blocked")
        self._number, self._attempt = code("counter", "step"), code("counter", "attempt")
        self._codes: dict[tuple[str, int, bool], int] = {}  # what, layer or -1, whether of gradients
        self._hooks: list[RemovableHandle] = []
        self._began = self._since = self._current = self._phase = 0
        self._ranks, self._folder = ranks, out / FOLDER
        self._run = {
            "program": "sigma train",
            "phases": list(PHASES),
            "seed": config.train.seed,
            "threads": config.train.threads,
        }
        self._about: dict[str, Any] = {
            "host": platform.node(),
            "clock": "CLOCK_MONOTONIC",
            "boot": _boot(),
            "wall_ns": time.time_ns() - time.monotonic_ns(),
            "collectives": {},
            "groups": {},
        }
        self._files, self._parts = parts, None

    def watch(self, model: LanguageModel, mesh: Mesh | None) -> None:
        clocks = self._ranks.gathered(self._about["boot"])
        if self._ranks.is_first:
            self._files.make_ready(self._folder, clocks)
        attempt = self._ranks.first(time.time_ns() // 1000)
        if mesh is not None:
            self._watch_collectives(model, mesh, attempt)
        self._parts = self._files.Parts(self._folder, self._ranks.rank, self._run, self._about)
        now = self._now()
        self._recorder.add(self._attempt, now, now, attempt)
        self.save()  # what the first write imports, and a folder that refuses it, are met before the first step
        self._recorder.watch_gc()
        self._counters.begin()

    def _watch_collectives(self, model: LanguageModel, mesh: Mesh, attempt: int) -> None:
        from sigma_train.parallel import observe_shards

        meshes = {
            "shards": mesh.rest["shard"],
            "copies": mesh.experts["data"],
            "experts": mesh.experts["expert"],
        }
        if has_replicas := "replica" in (mesh.rest.mesh_dim_names or ()):
            meshes["replicas"] = mesh.rest["replica"]
        groups = {"all": list(range(self._ranks.size))}
        groups |= {name: part.mesh.flatten().tolist() for name, part in meshes.items()}
        layers = model.moe_layers()
        of_layers, of_none = list(product(range(len(layers)), (False, True))), [(-1, False)]
        for group in groups:
            for what, (layer, is_backward) in product(
                GROUPS[group], of_layers if group == "experts" else of_none
            ):
                name = what if layer < 0 else f"a2a/{layer}/{what}{'/back' * is_backward}"
                self._codes[what, layer, is_backward] = self._recorder.code("quantum", name)
                self._about["collectives"][name] = group
        self._about["groups"] = {str(attempt): groups}
        self._hooks = [
            layer.register_forward_pre_hook(_sets_layer(number)) for number, layer in enumerate(layers)
        ]
        observe_shards(model, has_replicas)
        collectives.OBSERVERS.append(self._see)

    def _see(
        self, what: str, layer: int, is_backward: bool, arrived_ns: int, waits_ns: int, ended_ns: int
    ) -> None:
        code = self._codes.get((what, layer, is_backward))
        if code is not None:
            self._recorder.add(code, arrived_ns, ended_ns)
        # Of what is exchanged beside the model it is only known that the rank was blocked.
        self._recorder.add(self._blocked, waits_ns, ended_ns)

    def begin_step(self, number: int) -> None:
        self._counters.begin_step()
        self._current, self._phase = number, FLAGS
        self._began = self._since = self._now()

    def turn(self, phase: int) -> None:
        now = self._now()
        self._recorder.add(self._phases[self._phase], self._since, now)
        self._phase, self._since = phase, now

    def end_step(self) -> None:
        self.turn(FLAGS)
        self._recorder.add(self._step, self._began, self._since)
        self._recorder.add(self._number, self._began, self._began, self._current)
        self._counters.read()
        self._recorder.make_room()
        if self._recorder.is_full:
            self.save()

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self._recorder.add(self._pauses[cause], began, self._now())

    def save(self) -> None:
        if self._parts is None:
            return
        with self.pause("record"):
            self._parts.add(self._recorder.taken())

    def finish(self) -> None:
        self.close()
        self._ranks.summed(0.0)

    def close(self) -> None:
        self._recorder.unwatch_gc()
        self._counters.end()
        if self._see in collectives.OBSERVERS:
            collectives.OBSERVERS.remove(self._see)
            collectives.Where.layer = -1
        for hook in self._hooks:
            hook.remove()
        if self._parts is not None:
            self._parts.add(self._recorder.taken())
            self._files.fold(self._folder, self._ranks.rank)
            self._parts = None


def _sets_layer(number: int) -> Any:
    def before(module: nn.Module, inputs: object) -> None:
        collectives.Where.layer = number

    return before


def _boot() -> str:
    """Whose clock: processes of one running system share CLOCK_MONOTONIC."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()}, of {os.getpid()}"
