"""What the ranks of tests/test_plan_ranks.py do and report; in a module, as a forked process imports it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = {
    "c10d._allgather_base_.default": "all_gather",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
    "c10d.alltoall_base_.default": "all_to_all",
    "c10d.allreduce_.default": "all_reduce",
    "_c10d_functional.all_reduce.default": "all_reduce",
    "_c10d_functional.all_reduce_.default": "all_reduce",
}
AROUND = ("wait_tensor", "_wrap_tensor_autograd")  # move nothing
OPERAND = {
    "all_gather": 0,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "all_reduce": 0,
}  # the larger, or what is sent


class Counted(TorchDispatchMode):
    """Every collective of this process: kind, dtype, bytes handed to it and, of uneven ones, rows to each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as what DTensor makes of it
        name = str(func)
        if "c10d" in name and not any(part in name for part in AROUND):
            kind = COLLECTIVES[name]
            operand = args[OPERAND[kind]]
            tensors = operand if isinstance(operand, list) else [operand]
            sent = args[4] if kind == "all_to_all" else None
            self.calls.append({
                "kind": kind, "dtype": str(tensors[0].dtype).removeprefix("torch."), "sent": sent,
                "bytes": sum(t.nbytes for t in tensors),
            })  # fmt: skip
        return func(*args, **(kwargs or {}))


def part(tensor: Any) -> Tensor:
    """Of a DTensor this rank's."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Kept:
    """What autograd saves of one forward, each storage once: bytes without parameters and tables."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.saved = model, {}

    def pack(self, x: Any) -> Any:
        own = (*self.model.parameters(), *self.model.buffers())
        held = {
            part(p).untyped_storage().data_ptr() for p in own if p.dtype == torch.float32
        }  # no copies in bf16
        storage = part(x).untyped_storage()
        if storage.data_ptr() not in held:
            self.saved.setdefault(storage.data_ptr(), part(x))  # held, so that no other takes its place
        return x

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.saved.values())


def held(tensors: list[Any]) -> int:
    return sum(part(x).nbytes for x in tensors)


def steps(rank: int, folder: Path, cases: list[tuple[int, list[str]]], cache: str) -> None:
    """A step of every case that has so many ranks, one after the other in the same process."""
    for number, (ranks, settings) in enumerate(cases):
        if rank < ranks:
            step(rank, ranks, folder / str(number), settings, cache)


def to_ranks(routing: Any, ranks: int) -> dict[str, Any]:
    """Of a layer k, and tokens and choices to each rank, counted one by one."""
    per_rank = routing.num_experts // ranks
    tokens = [[expert // per_rank for expert in token] for token in routing.indices.tolist()]
    return {
        "top_k": routing.top_k,
        "visits": [sum(rank in token for token in tokens) for rank in range(ranks)],
        "choices": [sum(token.count(rank) for token in tokens) for rank in range(ranks)],
    }


def step(rank: int, ranks: int, folder: Path, settings: list[str], cache: str) -> None:
    """One step of the trainer on one of several ranks: what it routed, handed to collectives, and holds after."""
    folder.mkdir(exist_ok=True)
    place = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()}, SIGMA_CACHE=cache)
    torch.set_num_threads(1)
    import torch.distributed as dist
    from rich.console import Console
    from sigma_train.config import load_config
    from sigma_train.loop import Trainer
    from sigma_train.ranks import Ranks

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    (folder / "run").mkdir(exist_ok=True)
    config = load_config("smoke", None, settings, {"train": {"out": str(folder / "run"), "threads": 1}})
    trainer = Trainer(config, Console(quiet=True), False, Ranks(rank, ranks))
    parameters = list(trainer.model.parameters())
    norms: list[int] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: norms.append(held([p.grad for p in parameters])))
    routed: list[dict[str, Any]] = []
    for moe in trainer.model.moe_layers():
        moe.register_forward_hook(lambda moe, *_: routed.append(to_ranks(moe.last_routing, ranks)))
    kept = Kept(trainer.model)
    with Counted() as counted, torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        trainer.ranks.summed(False, False, False)  # as `Trainer._run` does before each step
        trainer._train_step()
    moments = [x for state in trainer.optimizer.state.values() for x in state.values()]
    found = {
        "calls": counted.calls, "weights": held(parameters), "gradients": norms[0], "moments": held(moments),
        "kept": kept.bytes, "routed": routed,
    }  # fmt: skip
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    if trainer.metrics is not None:
        trainer.metrics.close()
    dist.destroy_process_group()
