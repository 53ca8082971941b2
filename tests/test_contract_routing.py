"""A routing, offsets or a bias that the caller made or changed: read right, or refused before memory is touched."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sigma_kernels as sk
from sigma_kernels.ops.grouped_gemm import grouped_outer_

T, K, E, H, I = 6, 2, 3, 5, 4
R = T * K
ROUTING = sk.route(torch.randn(T, E), K)
EXPERTS = sk.nn.Experts(H, I, E)
X, Y = torch.randn(T, H), torch.randn(R, H)
CALLS = {
    "moe_experts": (lambda routing: EXPERTS.forward_routed(X, routing), "hidden_states"),
    "permute": (lambda routing: sk.permute(X, routing), "x"),
    "unpermute": (lambda routing: sk.unpermute(Y, routing), "y"),
}
MAP, OFFSETS, WEIGHTS = ROUTING.row_map, ROUTING.offsets, ROUTING.weights
EVERY = ("moe_experts", "permute", "unpermute")
WEIGHTED = ("moe_experts", "unpermute")
ONCE = "routing.row_map must name each slot of 0..11 once, found "
WRONG = [
    (WEIGHTED, {"weights": WEIGHTS[:, :1]}, ValueError, "routing.weights must be [6, 2], found [6, 1]"),
    (WEIGHTED, {"weights": WEIGHTS[:5]}, ValueError, "routing.weights must be [6, 2], found [5, 2]"),
    (WEIGHTED, {"weights": WEIGHTS.double()}, TypeError, "routing.weights must have the dtype of {data}, "),
    (WEIGHTED, {"weights": WEIGHTS.to("meta")}, ValueError, "routing.weights must lie where {data} does, on cpu"),
    (EVERY, {"row_map": MAP + 10**8}, ValueError, f"{ONCE}{MAP[0] + 10**8} at row 0"),
    (EVERY, {"row_map": MAP - R}, ValueError, f"{ONCE}{MAP[0] - R} at row 0"),
    (EVERY, {"row_map": torch.zeros_like(MAP)}, ValueError, f"{ONCE}0 at row 1"),
    (EVERY, {"row_map": MAP.long()}, TypeError, "routing.row_map must be int32, found torch.int64"),
    (EVERY, {"row_map": torch.cat([MAP, MAP[:1]])}, ValueError, "routing.row_map must be [R], R <= 12 = T*k, "),
    (("moe_experts",), {"row_map": MAP[:-1]}, ValueError, "routing.offsets must rise from 0 to 11, the rows "),
    (("unpermute",), {"row_map": MAP[:-1]}, ValueError, "y must be [11, H], found [12, 5]"),
    (EVERY, {"row_map": MAP.to("meta")}, ValueError, "routing.row_map must lie where {data} does, on cpu, found meta"),
    (EVERY, {"indices": ROUTING.indices[0]}, ValueError, "routing.indices must be [T, k] with k > 0, found [2]"),
    (EVERY, {"indices": ROUTING.indices[:, :0]}, ValueError, "routing.indices must be [T, k] with k > 0, found [6, 0]"),
    (("moe_experts",), {"offsets": OFFSETS * 10**6}, ValueError, "routing.offsets must rise from 0 to 12, the rows "),
    (("moe_experts",), {"offsets": OFFSETS[:-1]}, ValueError, "routing.offsets must be [4], found [3]"),
    (("moe_experts",), {"offsets": OFFSETS.float()}, TypeError, "routing.offsets must be int32 or int64, found"),
    (("moe_experts",), {"offsets": OFFSETS.to("meta")}, ValueError, "routing.offsets must lie where {data} does"),
]  # fmt: skip
CASES = [
    pytest.param(op, fields, kind, message, id=f"{op}-{message[:40]}")
    for ops, fields, kind, message in WRONG
    for op in ops
]


@pytest.mark.parametrize("op, fields, kind, message", CASES)
def test_a_changed_routing_is_refused(backend, op, fields, kind, message):
    """Defends: reads and writes wherever a field of the caller's points."""
    call, data = CALLS[op]
    with pytest.raises(kind) as error:
        call(ROUTING._replace(**fields))
    assert str(error.value).startswith(f"{op}: {message.format(data=data)}")


@pytest.mark.parametrize("op", EVERY)
def test_strided_fields_are_read_right(backend, op):
    """Defends: a view of every second number read as if the numbers lay side by side."""
    call, _ = CALLS[op]
    apart = ROUTING._replace(
        **{name: torch.stack([t, t], -1)[..., 0] for name, t in ROUTING._asdict().items()}
    )
    assert not apart.row_map.is_contiguous()
    assert torch.equal(call(apart), call(ROUTING))


@pytest.mark.parametrize("op", EVERY)
def test_a_wrong_map_is_refused_in_a_compiled_call(op):
    """Defends: checks that are traced away."""
    call, _ = CALLS[op]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ROUTING), call(ROUTING))
    with pytest.raises(ValueError, match="must name each slot"):
        compiled(ROUTING._replace(row_map=MAP + 10**8))


WEIGHT = torch.randn(E, 7, H)
FALLING = [
    torch.tensor([0, 2, 90_000_000, R]),
    torch.tensor([0, 2, 90_000_000, R], dtype=torch.int32),
    torch.tensor([0, 2, 3, R + 2**32]),
    torch.tensor([-(2**32), 2, 3, R]),
    torch.nn.Parameter(torch.tensor([0, 3, 2, R]), requires_grad=False),
]


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("offsets", FALLING, ids=str)
def test_wrong_offsets_are_refused(backend, offsets, compiles):
    """Defends: values that only the operation sees, and 2**32 narrowed to 0."""
    call = (
        torch.compile(sk.grouped_gemm, fullgraph=True, backend="aot_eager") if compiles else sk.grouped_gemm
    )
    call(Y, WEIGHT, OFFSETS.to(offsets.dtype))
    with pytest.raises(ValueError) as error:
        call(Y, WEIGHT, offsets)
    want = f"grouped_gemm: offsets must rise from 0 to {R}, the rows of x, found {offsets.tolist()}"
    assert want in str(error.value)


def test_wrong_offsets_of_grouped_outer():
    with pytest.raises(
        ValueError, match=r"grouped_outer_: offsets must rise from 0 to 12, the rows of a, found"
    ):
        grouped_outer_(torch.zeros(E, H, H), Y, Y, torch.tensor([0, 2, 90_000_000, R]))


META = [
    (lambda: sk.moe_experts(X, ROUTING.indices.to("meta"), WEIGHTS, *EXPERTS.parameters()), "top_k_index"),
    (lambda: sk.grouped_gemm(Y, WEIGHT, OFFSETS.to("meta")), "offsets"),
    (lambda: sk.route(X, bias=torch.zeros(H, device="meta")), "bias"),
    (lambda: sk.group_by_expert(ROUTING.indices, E, WEIGHTS.to("meta")), "weights"),
]


@pytest.mark.parametrize("call, name", META, ids=[name for _, name in META])
def test_an_argument_on_another_device_is_named(call, name):
    with pytest.raises(ValueError, match=rf"\w+: {name} must lie where \w+ does, on cpu, found meta"):
        call()


def checkpointed():
    """{name: (function, its differentiable input)}"""
    moe = sk.nn.MoE(H, I, E)
    logits = torch.randn(T, E)
    return {
        "moe": (moe, X),
        "moe_experts": (lambda x: sk.moe_experts(x, ROUTING.indices, WEIGHTS, *EXPERTS.parameters()), X),
        "route": (lambda l: sk.route(l, K, score="sigmoid", normalize=True).weights, logits),
        "permute": (lambda x: sk.permute(x, ROUTING), X),
        "unpermute": (lambda y: sk.unpermute(y, ROUTING), Y),
        "grouped_gemm": (lambda y: sk.grouped_gemm(y, WEIGHT, OFFSETS), Y),
    }


@pytest.mark.parametrize("name", sorted(checkpointed()))
def test_activation_checkpointing(name):
    """Defends: a backward that unpacks what it saved more than once, which a checkpoint gives out one time."""
    function, x = checkpointed()[name]
    grads = []
    for run in function, lambda x: checkpoint(function, x, use_reentrant=False):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["grouped_gemm", "permute", "unpermute"])
def test_second_derivatives_of_a_checkpoint(name):
    function, x = checkpointed()[name]
    grads = []
    for run in function, lambda x: checkpoint(function, x, use_reentrant=False):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf).square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
