"""k that changes from call to call: no state in the layer, and a graph of torch.compile for each k of a layer."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sigma_kernels import nn


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_call_leaves_nothing_to_a_call_with_another_k():
    """Defends: buffers or blocks sized by an earlier k."""
    moe, x = nn.MoE(16, 8, 24), torch.randn(10, 16)
    alone = {k: moe(x, top_k=k) for k in (1, 3, 8, 24)}
    assert all(torch.equal(moe(x, top_k=k), alone[k]) for k in (24, 1, 8, 3, 1))
    assert moe.router.top_k == 1


def test_layers_compiled_each_share_a_graph_for_each_k():
    """Whichever k which of three layers has, four values are four graphs."""
    counter = CompileCounter()
    layers = [nn.MoE(16, 8, 24) for _ in range(3)]
    compiled = [torch.compile(layer, fullgraph=True, backend=counter) for layer in layers]
    x = torch.randn(10, 16)
    for ks in [(1, 2, 3), (3, 1, 2), (4, 4, 4), (2, 2, 2)]:
        for layer, run, k in zip(layers, compiled, ks, strict=True):
            assert torch.equal(run(x, top_k=k), layer(x, top_k=k))
    assert counter.frame_count == 4


def test_a_model_compiled_as_a_whole_has_a_graph_for_each_list_of_k():
    counter = CompileCounter()
    layers = [nn.MoE(16, 8, 24) for _ in range(3)]

    def model(x: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
        for layer, k in zip(layers, ks, strict=True):
            x = layer(x, top_k=k)
        return x

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for ks in [(1, 2, 3), (3, 1, 2), (2, 2, 2), (1, 2, 3)]:
        compiled(torch.ones(10, 16), ks)
    assert counter.frame_count == 3


def test_one_normalised_expert_compiles():
    """Defends: a graph that breaks at the warning which the layer gives as it is."""
    moe = nn.MoE(16, 8, 24, top_k=2, normalize=True)
    run = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(10, 16)
    with pytest.warns(UserWarning, match="router gets no gradient"):
        want = moe(x, top_k=1)
    assert torch.equal(run(x, top_k=1), want)
