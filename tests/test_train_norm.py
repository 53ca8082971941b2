"""Where ranks meet for the norm of their gradients, and what it is."""

import time

import pytest
import torch
import torch.distributed as dist
from sigma_train.optim import clip
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sigma_kernels import collectives


class Sums(TorchDispatchMode):
    """When this rank asked others to add up."""

    def __init__(self) -> None:
        super().__init__()
        self.at_ns: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as what DTensor makes of it
        if "all_reduce" in str(func):
            self.at_ns.append(time.monotonic_ns())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh():
    """Of two ranks, of which the other one is made up."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def spread(mesh: DeviceMesh) -> torch.nn.Linear:
    """With this rank's half of weights and gradients."""
    model = torch.nn.Linear(6, 4)
    for name, whole in [*model.named_parameters()]:
        mine, grad = whole.detach().chunk(2)[0], torch.randn(2, *whole.shape[1:])
        parameter = torch.nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)]))
        parameter.grad = DTensor.from_local(grad, mesh, [Shard(0)])
        setattr(model, name, parameter)
    return model


def test_the_exchange_of_the_norm_is_seen(mesh, monkeypatch):
    """Defends: an exchange within `get_total_norm` that nobody is told of, so that a rank which waits there is taken
    for one that works; another norm than torch's, to the bit.
    """
    model, rows = spread(mesh), []
    want = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], foreach=True).full_tensor()
    monkeypatch.setattr(collectives, "OBSERVERS", [lambda *told: rows.append(told)])
    with Sums() as sums:
        assert clip(model, 1e9) == want.item()
    ((what, _, _, _, waits_ns, ended_ns),) = rows
    assert what == "norm"
    (asked_ns,) = sums.at_ns
    assert waits_ns <= asked_ns <= ended_ns


def test_ranks_that_share_nothing_meet_nobody():
    model = torch.nn.Linear(6, 4)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    want = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], foreach=True)
    assert clip(model, 1e9) == want.item()
