"""A plugin of pytest, `-p fake_gpu`: bench/ with --device cuda on a machine that has no GPU.

What is placed on cuda lies in the CPU's memory and is marked: an operation on tensors of both places fails as it would
on a GPU.  Events read the host's clock; the libraries of peers_gpu.py are fakes of tests/fake_peers.py, without
SonicMoE, and with a Liger that is wrong.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import clock
import fake_peers


def place(tensor):
    """Where its memory is said to be: cuda, cpu, or either, which is of a factory that was told another's device."""
    return getattr(tensor.untyped_storage(), "place", "cpu")


def put(result, where):
    for tensor in tree_leaves(result):
        if isinstance(tensor, torch.Tensor):
            tensor.untyped_storage().place = where
    return result


class OnCpu(TorchFunctionMode):
    """Moves to cuda become copies that are marked, those back to the CPU copies that are not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch._C._nn._parse_to:  # how a module reads the arguments of its own .to
            return function(*args, **kwargs)
        given = [d for d in (*args, *kwargs.values()) if isinstance(d, torch.device)]
        wanted = "cpu" if function is torch.Tensor.cpu else given[0].type if given else None
        if function is torch.nn.functional.one_hot:  # makes its memory within, where nobody can mark it
            return torch.eye(kwargs["num_classes"], dtype=torch.long)[args[0]]
        if wanted not in ("cuda", "cpu"):
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        result = function(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        of_tensor = args and isinstance(args[0], torch.Tensor)
        if of_tensor and place(args[0]) == wanted:
            return result
        return put(result.clone() if of_tensor else result, "either" if wanted == "cpu" else wanted)


class Apart(TorchDispatchMode):
    """No operation may take tensors of both places, as on a GPU; scalars, copies and indices on the CPU excepted."""

    EXCEPTED = ("aten::copy_", "aten::index", "aten::index_put")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        places = {place(t) for t in tensors if t.dim()}
        name = function._schema.name
        if {"cuda", "cpu"} <= places and name not in self.EXCEPTED:
            raise RuntimeError(f"{name}: some tensors on cuda, some on the CPU")
        before = {t.untyped_storage()._cdata for t in tensors}
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        found = {place(t) for t in tensors}
        in_backward = (
            torch._C._current_graph_task_id() != -1
        )  # whose engine makes zeros where no gradient came
        made_of_nothing = "either" if in_backward else "cpu"
        where = next((p for p in ("cuda", "cpu", "either") if p in found), made_of_nothing)
        put([t for t in made if t.untyped_storage()._cdata not in before], where)
        return result


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


PROPERTIES = SimpleNamespace(
    name="A GPU that is not there", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
    L2_cache_size=2**10, uuid="0",
)  # fmt: skip

clock.LEAST_FLUSH, clock.TURN_S, clock.WARM_UPS = 2**12, 1e-9, 1
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda device: PROPERTIES
torch.cuda.Event = Event
torch.cuda._sleep = lambda cycles: None
torch.cuda.synchronize = lambda: None
torch.cuda.empty_cache = lambda: None
torch.cuda.max_memory_allocated = lambda: 2**30

found = fake_peers.modules()
found["liger_kernel.ops"].LigerFusedMoEFunction = SimpleNamespace(apply=lambda x, *_: 9 * x)
sys.modules.update({name: m for name, m in found.items() if not name.startswith("sonicmoe")})
for mode in (Apart(), OnCpu()):
    mode.__enter__()
