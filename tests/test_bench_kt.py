"""bench/peer_kt.py's training, asked as kt-kernel's sources want to be: no processor that it needs was at hand."""

import sys
from pathlib import Path
from types import SimpleNamespace

import fake_peers
import pytest
import torch
from torch.nn import Parameter

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import oracle
import peer_kt
import shapes
from race import CannotRun


class Wrapper:
    """KTMoEWrapper of mode "sft", full_weight_grad and no adapters: a gradient has one memory, for ever."""

    def __init__(self, **how):
        assert (how["mode"], how["method"]) == ("sft", "AMXBF16_SFT")
        assert (how["lora_rank"], how["full_weight_grad"]) == (0, True)
        self.how, self.saved, self.buffers = how, None, {}

    def load_weights_from_tensors(self, gate, up, down, order):
        E, I, H = (self.how[key] for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
        assert gate.shape == up.shape == (E, I, H)
        assert down.shape == (E, H, I)
        assert all(w.is_contiguous() and w.dtype == torch.bfloat16 for w in (gate, up, down))
        assert order.tolist() == list(range(E))
        assert order.dtype == torch.int64

    def init_full_weight_grad_buffers(self, gate_proj, up_proj, down_proj):
        for name, w in (("gate", gate_proj), ("up", up_proj), ("down", down_proj)):
            setattr(self, f"{name}_proj_buf", Parameter(w.contiguous()))
            self.buffers[name] = torch.full_like(w, float("nan"))

    def forward(self, x, index, weights, save_for_backward):
        assert len(x) <= self.how["chunked_prefill_size"]
        assert index.shape == weights.shape == (len(x), self.how["num_experts_per_tok"])
        assert save_for_backward
        self.leaves = [t.float().requires_grad_() for t in (x, weights)]
        gate_up = torch.cat([self.gate_proj_buf, self.up_proj_buf], 1).detach().float().requires_grad_()
        down = self.down_proj_buf.detach().float().requires_grad_()
        self.leaves += [gate_up, down]
        self.saved = fake_peers.experts(self.leaves[0], index, *self.leaves[1:])
        return self.saved.detach().bfloat16()

    def backward(self, grad_out):
        assert self.saved is not None, "no forward"
        of_x, of_weights, of_gate_up, of_down = torch.autograd.grad(self.saved, self.leaves, grad_out.float())
        self.saved = None
        for name, made in zip(("gate", "up", "down"), (*of_gate_up.chunk(2, 1), of_down), strict=True):
            parameter, buffer = getattr(self, f"{name}_proj_buf"), self.buffers[name]
            buffer.copy_(made if parameter.grad is None else made + buffer)
            parameter.grad = buffer
        return of_x.bfloat16(), of_weights

    def release_authoritative_optimizer_grads(self):
        for name in self.buffers:
            getattr(self, f"{name}_proj_buf").grad = None


@pytest.fixture
def package(monkeypatch):
    moe = SimpleNamespace(AMXBF16_SFT_MOE=object)
    fake = SimpleNamespace(KTMoEWrapper=Wrapper, kt_kernel_ext=SimpleNamespace(moe=moe))
    monkeypatch.setattr(peer_kt, "package", lambda: fake)
    return fake


def inputs(dtype=torch.bfloat16):
    torch.manual_seed(0)
    shape = shapes.Shape("test", E=5, k=2, H=64, I=32, T=24)
    leaves = [t.requires_grad_() for t in shapes.layer_inputs(shape, dtype)]
    return leaves, shapes.choices(shape, "zipf"), torch.randn(24, 64).to(dtype)


@pytest.mark.parametrize("releases", [True, False])
def test_gradients_are_the_oracles(package, releases):
    """Defends: gate and up taken for one another, gradients of a turn before, ones that are added to where a turn is to
    make them anew, and the other way about.
    """
    leaves, index, grad_out = inputs()
    want = oracle.layer(*(t.detach() for t in leaves), index, grad_out)[1:]
    training = peer_kt.Training(leaves, index, grad_out, releases)
    training()
    training()
    down = training.experts.down_proj_buf.grad
    assert (down is None) == releases
    if not releases:
        assert (down - 2 * want[3]).norm() <= 0.02 * (2 * want[3]).norm()
    oracle.assert_agrees("kt_kernel", got := training.gradients(), want, 64)
    for a, b in zip(got, want, strict=True):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()


def test_who_cannot_take_part_says_why(package, monkeypatch):
    with pytest.raises(CannotRun, match="no f32 experts"):
        peer_kt.Training(*inputs(torch.float32), True)()

    def breaks(self, *_, **__):
        raise ValueError("of another\nversion")

    monkeypatch.setattr(Wrapper, "forward", breaks)
    with pytest.raises(CannotRun, match=r"^ValueError: of another version$"):
        peer_kt.Training(*inputs(), True)()
    del package.kt_kernel_ext.moe.AMXBF16_SFT_MOE
    with pytest.raises(CannotRun, match="AVX512-BF16 alone"):
        peer_kt.Training(*inputs(), True)()
