"""Linear layers and attention whose operands are bf16, by products of bf16 and by those of f32."""

import pytest
import torch
import torch.nn.functional as F
from sigma_train import products
from sigma_train.products import Linear, causal_attention

EPS = 2**-8  # of bf16


@pytest.fixture(params=[True, False], ids=["in f32", "by torch"])
def in_f32(request, monkeypatch):
    """On a processor that has no products of bf16, and on one that has."""
    monkeypatch.setattr(products, "has_products_of_bf16", lambda: not request.param)
    return request.param


def is_in_f32(y):
    return "InF32" in y.grad_fn.name()


def rounded(x):
    return x.bfloat16().double()


def near(got, want, bound):
    """As a whole; `want` is of the rounded operands in f64, and may be zero."""
    return (got.double() - want).norm() <= bound * want.norm() + 1e-6


@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 40), (0, 40), (2, 65, 40)])
def test_a_linear_layer_multiplies_rounded_operands(in_f32, shape):
    """Defends: an operand that is not rounded, or one that is rounded to less; gradients of the wrong shape."""
    torch.manual_seed(0)
    layer, x = Linear(40, 24), torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    grad = torch.randn(*shape[:-1], 24)
    y.backward(grad.to(y.dtype))
    w, flat, g = rounded(layer.weight.detach()), rounded(x.detach()), rounded(grad)
    assert y.dtype == torch.bfloat16
    assert is_in_f32(y) == in_f32
    assert near(y.detach(), flat @ w.t(), EPS)
    assert near(x.grad, g @ w, EPS)
    assert near(layer.weight.grad, g.flatten(0, -2).t() @ flat.flatten(0, -2), EPS)
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_frozen_weights_have_no_gradient(in_f32):
    layer, x = Linear(40, 24).requires_grad_(False), torch.randn(7, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert layer.weight.grad is None
    assert near(x.grad, rounded(layer.weight).sum(0).expand(7, 40), EPS)


def test_a_linear_layer_of_f32_is_torchs(in_f32):
    layer, x = Linear(40, 24), torch.randn(7, 40)
    assert torch.equal(layer(x), F.linear(x, layer.weight))


@pytest.mark.parametrize("S", [1, 17, 130])
def test_attention_multiplies_rounded_operands(in_f32, S):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, S, 16, requires_grad=True) for heads in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_attention(q, k, v)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    exact = [rounded(x.detach()).requires_grad_() for x in (q, k, v)]
    many = [exact[0], *(x.repeat_interleave(2, 1) for x in exact[1:])]
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    scores = (many[0] @ many[1].transpose(2, 3) / 4).masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1) @ many[2]
    assert out.dtype == torch.bfloat16
    assert is_in_f32(out) == in_f32
    assert near(out.detach(), want.detach(), 2 * EPS)
    for got, of in zip(gradients, torch.autograd.grad(want, exact, grad.double()), strict=True):
        assert near(got, of, 4 * EPS)
        assert got.dtype == torch.float32
