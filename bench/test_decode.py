"""Few tokens, where reading the weights is all of it.

A turn is a pass over as many calls as it takes until every expert has been asked, as a step of decoding goes through
the layers of a model: no weight is in a cache when it is asked for, whatever T and k.
"""

import bounds
import oracle
import peer_ggml
import peer_kt
import peers
import peers_gpu
import pytest
import torch
from race import OURS
from shapes import DECODE, DTYPES, layer_inputs, short

import sigma_kernels as sk

INT8 = "sigma_int8"  # checked against the oracle of the rounded weights
APART = {"llama_cpp_mul_mat_id": peer_ggml.Layer, "kt_kernel": peer_kt.Layer}


def choices_of_pass(shape, device) -> list[torch.Tensor]:
    """index [T, k] of each call; together they name every expert."""
    order = torch.randperm(shape.E, generator=torch.Generator().manual_seed(0))
    calls = -(-shape.E // shape.R)
    return list(order.repeat(shape.R)[: calls * shape.R].view(calls, shape.T, shape.k).to(device))


@pytest.mark.parametrize("shape", DECODE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_decode(race, device, dtype, shape):
    x, weights, gate_up, down = layer_inputs(shape, dtype, device)
    indices = choices_of_pass(shape, device)

    def exact(*experts):
        return [oracle.layer(x, weights, *experts, index)[0] for index in indices]

    small = [t for w in (gate_up, down) for t in sk.quantize_experts(w)]
    want = {
        INT8: exact(small[0] * small[1][..., None], small[2] * small[3][..., None]),
        OURS: exact(gate_up, down),
    }

    def int8(x, index, weights, gate_up, down):
        return sk.moe_experts_int8(x, index, weights, *small)

    def over(layer):
        @torch.no_grad()
        def run():
            return [layer(x, index, weights, gate_up, down) for index in indices]

        return run

    def apart(name):
        layer = peers.built(APART[name], shape.T, shape.k, gate_up, down)
        return over(lambda *inputs: layer(*inputs).clone())  # of memory that its next call writes to

    rivals, missing = peers.LAYERS | peers.FEW_TOKENS, {}
    if device.type == "cuda":
        rivals |= peers_gpu.LAYERS | peers_gpu.FORWARD
        missing = dict.fromkeys(APART, "it runs on a CPU")
    race(
        f"decode/forward/{short(dtype)}",
        over(sk.moe_experts),
        shape=shape,
        load=f"a pass of {len(indices)} calls",
        check=lambda who, got: oracle.assert_agrees(who, got, want.get(who, want[OURS]), shape.H),
        apart=APART,
        missing=missing,
        limits={"padded_bmm": 2},  # all experts padded at each call
        flops=len(indices) * shape.flops,
        moved=gate_up.nbytes + down.nbytes,
        moved_by={INT8: sum(t.nbytes for t in small)},
        index=torch.cat(indices),
        note="every expert is asked in a pass, so that weights come from memory",
        bound_read=bounds.read(gate_up, down),
        **{name: over(layer) for name, layer in ({INT8: int8} | rivals).items()},
        **{name: apart(name) for name in APART if name not in missing},
    )
