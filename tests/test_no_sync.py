"""Nothing on the way through a layer on a GPU waits for it: no number is asked, no shape depends on one.

The public functions run forward and backward on tensors that hold nothing (`meta`), through the very launchers, whose
kernels are not started.  A value that is asked for does not exist; that is what a GPU would have been waited for.  A
value that is sent is a tensor of the CPU, and none may be met.
"""

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from sigma_cli.aot_launches import recorded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sigma_kernels as sk
from sigma_kernels.triton import experts


class Rows(TorchDispatchMode):
    """Runs sigma's operations by their rows, as on a GPU, where `meta` would ask for their shapes alone."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        self.seen.append(name)
        if any(x.is_cpu for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
            raise RuntimeError(f"{name}: a tensor of the CPU beside those on meta")
        if not name.startswith("sigma::"):
            return op(*args, **(kwargs or {}))
        with self:
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch) -> Iterator[tuple[list, list[str]]]:
    """Launches and calls of operations while the table's Triton rows run everything."""

    backends = import_module("sigma_kernels.backends")  # the package's attribute of that name is the function

    def triton_row(op, *_):
        return next(row for row in backends._tables[op] if row.name == "triton")

    def sends(*_, **__):
        raise RuntimeError("numbers of Python's sent to meta")

    monkeypatch.setattr(backends, "_first", triton_row)
    monkeypatch.setattr(torch, "tensor", sends)
    monkeypatch.setattr(torch.Tensor, "new_tensor", sends)
    with recorded("sm_90", 132) as launches, Rows() as rows:
        yield launches, rows.seen


def step(k: int, dtype: torch.dtype) -> None:
    """Route, compute, differentiate, and what else a step may call."""
    T, E, H, I = 64, 8, 32, 48
    make = {"device": "meta", "dtype": dtype, "requires_grad": True}
    x, router = torch.empty(T, H, **make), torch.empty(E, H, **make)
    gate_up, down = torch.empty(E, 2 * I, H, **make), torch.empty(E, H, I, **make)
    routing, sums = sk.route_with_sums(x @ router.t(), k, score="sigmoid", normalize=k > 1)
    out = sk.moe_experts(x, routing.indices, routing.weights, gate_up, down)
    out = out + sk.unpermute(
        sk.grouped_gemm(sk.permute(x, routing), gate_up[:, :H], routing.offsets), routing
    )
    (out.sum() + sums.probabilities.square().sum() + sums.square).backward()
    for tensor in (x, router, gate_up, down):
        assert tensor.grad.shape == tensor.shape
    with torch.no_grad():
        sk.moe_experts(x, routing.indices.long(), routing.weights, gate_up, down)
        narrow = [torch.empty(w.shape, dtype=torch.float8_e4m3fn, device="meta") for w in (gate_up, down)]
        for scales in ([(E, 2 * I), (E, H)], [(E, 1, 1), (E, 1, 1)]):
            of_gate_up, of_down = (torch.empty(shape, device="meta") for shape in scales)
            sk.moe_experts_fp8(x, routing.indices, routing.weights, narrow[0], of_gate_up, narrow[1], of_down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_no_call_waits_for_the_gpu(gpu, k, dtype):
    step(k, dtype)
    launches, seen = gpu
    names = {launch.name for launch in launches}
    assert {"route", "count_slots", "gate_up", "grouped_gemm", "swiglu_backward", "grouped_outer"} <= names
    assert "sigma::moe_experts_backward" in seen


WAITS = {
    "item": lambda x, offsets: offsets[-1].item(),
    "tolist": lambda x, offsets: offsets.tolist(),
    "cpu": lambda x, offsets: offsets.cpu(),
    "nonzero": lambda x, offsets: offsets.nonzero(),
    "boolean indexing": lambda x, offsets: x[x > 0],
    "bool": lambda x, offsets: bool(offsets.sum() > 0),
    "to": lambda x, offsets: x.to("cpu"),
    "a number sent": lambda x, offsets: torch.tensor([1.0], device=x.device),
    "numbers sent": lambda x, offsets: x.new_tensor([1.0, 2.0]),
    "a tensor sent": lambda x, offsets: torch.ones(2).to(x.device),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_call_that_waits_is_found(gpu, monkeypatch, wait):
    """Defends: equipment that sees nothing: each way of waiting, hidden in the layer's forward."""
    gate_up = experts.gate_up

    def hides(x, proj, offsets, *rest):
        wait(x, offsets)
        return gate_up(x, proj, offsets, *rest)

    monkeypatch.setattr(experts, "gate_up", hides)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(1, torch.float32)
