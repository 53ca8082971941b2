"""What torch expects of an operation: opcheck, gradcheck, compile, and errors that name the argument."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from support import check_baseline, check_isa, check_libgomp, check_unknown_isa
from torch.library import opcheck

import sigma_kernels as sk

OPS = torch.ops.sigma
OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)


def experts(dtype=torch.float32, T=5, H=6, I=4, E=3):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return (
        leaf(T, H),
        torch.tensor([[0], [2], [2], [1], [0]])[:T],
        leaf(T, 1),
        leaf(E, 2 * I, H),
        leaf(E, H, I),
    )


def opcheck_cases():
    x, index, weights, gate_up, down = experts()
    routing = sk.group_by_expert(index, 3)
    y = torch.randn(5, 6, requires_grad=True)
    bias = torch.zeros(7)
    saved = torch.randn(5, 8)
    plain = [t.detach() for t in (x, weights, routing.offsets, routing.row_map, gate_up, down)]
    return {
        "route": (torch.randn(5, 7, requires_grad=True), 2, True, False, bias),
        "route_backward": (
            torch.randn(5, 2),
            torch.randn(5, 7),
            torch.zeros(5, 2, dtype=torch.int32),
            True,
            True,
        ),
        "route_with_sums": (torch.randn(5, 7, requires_grad=True), 2, True, False, bias, False),
        "route_with_sums_backward": (
            torch.randn(5, 2),
            torch.randn(7),
            torch.randn(()),
            torch.randn(5, 7),
            torch.zeros(5, 2, dtype=torch.int32),
            False,
            True,
            True,
        ),
        "group_by_expert": (index.int(), 3),
        "permute": (x, routing.row_map, 1),
        "unpermute": (y, routing.row_map, weights, 1, 5),
        "unpermute_backward": (torch.randn(5, 6), y.detach(), routing.row_map, weights.detach()),
        "grouped_gemm": (x, gate_up, OFFSETS, True),
        "grouped_outer": (torch.randn(5, 3), torch.randn(5, 4), OFFSETS),
        "grouped_outer_": (torch.zeros(3, 3, 4), torch.randn(5, 3), torch.randn(5, 4), OFFSETS, True),
        "moe_experts": tuple(plain),
        "moe_experts not saved": (*plain, False),
        "moe_experts_inference": (x.detach(), index, weights.detach(), *plain[4:], None, None),
        "moe_experts_backward": (torch.randn(5, 6), *plain, saved, [True, True, False], torch.float32),
    }


@pytest.mark.parametrize("name", sorted(opcheck_cases()))
def test_opcheck(name):
    """Defends: schema, fake and autograd registration of every operation."""
    opcheck(getattr(OPS, name.split()[0]).default, opcheck_cases()[name])


def with_sums(logits, score, normalize):
    routing, sums = sk.route_with_sums(logits, 2, score=score, normalize=normalize, balance_score=score)
    return routing.weights, sums.probabilities, sums.square


def test_gradcheck_in_f64():
    """Defends: the wiring of each backward: order, needs_input_grad, saved tensors."""
    x, index, weights, gate_up, down = experts(torch.float64)
    assert torch.autograd.gradcheck(sk.moe_experts, (x, index, weights, gate_up, down))
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for score in ("softmax", "sigmoid"):
        for normalize in (False, True):
            assert torch.autograd.gradcheck(
                lambda l, s=score, n=normalize: sk.route(l, 2, score=s, normalize=n).weights, logits
            )
            assert torch.autograd.gradcheck(lambda l, s=score, n=normalize: with_sums(l, s, n), logits)
    assert torch.autograd.gradcheck(lambda x, w: sk.grouped_gemm(x, w, OFFSETS), (x, gate_up))


def test_compile_fullgraph():
    """Defends: a graph break, or a fake that disagrees with the kernel."""
    moe = sk.nn.MoE(16, 8, 6)
    x = torch.randn(10, 16)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for run in (moe, compiled):
        moe.zero_grad()
        out = run(x)
        out.square().sum().backward()
        grads = [p.grad.clone() for p in moe.parameters()]
        if run is moe:
            want, want_grads = out, grads
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))


def leaf_operations():
    """Each operation as a function of one tensor: {name: (function, input)}."""
    x, index, weights, gate_up, _ = (t.detach() for t in experts())
    routing = sk.group_by_expert(index, 3, weights)
    return {
        "route": (lambda l: sk.route(l, 2, score="sigmoid", normalize=True).weights, torch.randn(5, 7)),
        "permute": (lambda x: sk.permute(x, routing), x),
        "unpermute": (lambda y: sk.unpermute(y, routing), x),
        "grouped_gemm": (lambda x: sk.grouped_gemm(x, gate_up, OFFSETS), x),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("name", sorted(leaf_operations()))
def test_functional_transforms_of_each_operation(name):
    """Defends: tangents that are silently zero, torch.func.grad that does not reach an operation."""
    function, x = leaf_operations()[name]
    leaf = x.clone().requires_grad_()
    function(leaf).square().sum().backward()
    assert torch.equal(torch.func.grad(lambda x: function(x).square().sum())(x), leaf.grad)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(function)(x.expand(2, *x.shape))


def test_functional_transforms_work_or_say_that_they_do_not():
    """Defends: a silent wrong answer under torch.func."""
    x, index, weights, gate_up, down = (t.detach() for t in experts())
    grad = torch.func.grad(lambda x: sk.moe_experts(x, index, weights, gate_up, down).sum())(x)
    leaf = x.clone().requires_grad_()
    sk.moe_experts(leaf, index, weights, gate_up, down).sum().backward()
    assert torch.equal(grad, leaf.grad)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: sk.moe_experts(x, index, weights, gate_up, down))(x.expand(2, 5, 6))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        sk.moe_experts(leaf, index, weights, gate_up, down).square().sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


X, INDEX, WEIGHTS, GATE_UP, DOWN = (t.detach() for t in experts())
LOGITS = torch.randn(4, 6)
NO_CUDA = "it runs on cuda, the data lie on cpu" if hasattr(sk._C, "cuda") else "built without CUDA"
WRONG = [
    (lambda: sk.route(torch.randn(4)), ValueError, "route: logits must be [T, E] with E > 0, found [4]"),
    (lambda: sk.route(LOGITS.long()), TypeError, "route: logits must be floating point, found torch.int64"),
    (lambda: sk.route(LOGITS, 7), ValueError, "route: top_k must lie in 1..6 (E=6), found 7"),
    (lambda: sk.route(LOGITS, 0), ValueError, "route: top_k must lie in 1..6 (E=6), found 0"),
    (
        lambda: sk.route(LOGITS, score="relu"),
        ValueError,
        "route: score must be 'softmax' or 'sigmoid', found 'relu'",
    ),
    (lambda: sk.route(LOGITS, bias=torch.zeros(5)), ValueError, "route: bias must be [6], found [5]"),
    (
        lambda: sk.permute(X.to(torch.float8_e4m3fn), sk.group_by_expert(INDEX, 3)),
        RuntimeError,
        f"no backend can run permute here: 'cuda': {NO_CUDA}; "
        "'triton': it runs on cuda, the data lie on cpu; "
        "'cpu': it takes float32, bfloat16, float16, not float8_e4m3fn; "
        "'reference': it takes float32, float64, not float8_e4m3fn (sigma doctor shows the table)",
    ),
    (
        lambda: sk.moe_experts(X, INDEX + 1, WEIGHTS, GATE_UP, DOWN),
        ValueError,
        "expert indices must lie in 0..2 (E=3), found 3 at token 1",
    ),
    (
        lambda: sk.moe_experts(X, INDEX - 1, WEIGHTS, GATE_UP, DOWN),
        ValueError,
        "expert indices must lie in 0..2 (E=3), found -1 at token 0",
    ),
    (
        lambda: sk.moe_experts(X, INDEX.float(), WEIGHTS, GATE_UP, DOWN),
        TypeError,
        "moe_experts: top_k_index must be int32 or int64, found torch.float32",
    ),
    (
        lambda: sk.moe_experts(X, INDEX, WEIGHTS, GATE_UP[:, :7], DOWN),
        ValueError,
        "moe_experts: gate_up_proj must be [3, 8, 6], found [3, 7, 6]",
    ),
    (
        lambda: sk.moe_experts(X, INDEX, WEIGHTS, GATE_UP, DOWN.double()),
        TypeError,
        "moe_experts: down_proj must have the dtype of hidden_states, torch.float32, found torch.float64",
    ),
    (
        lambda: sk.moe_experts(X, INDEX, WEIGHTS[:2], GATE_UP, DOWN),
        ValueError,
        "moe_experts: top_k_weights must be [5, 1], found [2, 1]",
    ),
    (
        lambda: sk.moe_experts(X, INDEX, WEIGHTS, GATE_UP, DOWN, activation="gelu"),
        ValueError,
        "moe_experts: activation must be 'silu', found 'gelu'",
    ),
    (
        lambda: sk.grouped_gemm(X, GATE_UP, torch.tensor([0, 3, 2, 5])),
        ValueError,
        "grouped_gemm: offsets must rise from 0 to 5, the rows of x, found [0, 3, 2, 5]",
    ),
    (
        lambda: sk.grouped_gemm(X, GATE_UP, torch.tensor([0, 5])),
        ValueError,
        "grouped_gemm: offsets must be [4], found [2]",
    ),
    (
        lambda: sk.backend("metal").__enter__(),
        ValueError,
        "backend: backend must be one of triton, cuda, cpu, reference, found 'metal'",
    ),
    (
        lambda: sk.nn.TopKRouter(4, 3, top_k=5),
        ValueError,
        "TopKRouter: top_k must lie in 1..3, found 5",
    ),
    (
        lambda: sk.nn.Experts(4, 0, 3),
        ValueError,
        "Experts: intermediate_size must be at least 1, found 0",
    ),
    (lambda: sk.nn.MoE(0, 4, 3), ValueError, "TopKRouter: hidden_size must be at least 1, found 0"),
    (lambda: sk.nn.MoE(4, 4, 0), ValueError, "TopKRouter: num_experts must be at least 1, found 0"),
    (
        lambda: sk.route_with_sums(LOGITS, balance_score="softmaxx"),
        ValueError,
        "route_with_sums: balance_score must be 'softmax' or 'sigmoid', found 'softmaxx'",
    ),
    (
        lambda: sk.route_with_sums(torch.randn(4)),
        ValueError,
        "route_with_sums: logits must be [T, E] with E > 0, found [4]",
    ),
    (
        lambda: sk.route_with_sums(LOGITS.long()),
        TypeError,
        "route_with_sums: logits must be floating point, found torch.int64",
    ),
    (
        lambda: sk.route_with_sums(LOGITS, bias=torch.ones(6, device="meta")),
        ValueError,
        "route_with_sums: bias must lie where logits does, on cpu, found meta",
    ),
    (
        lambda: sk.nn.MoE(4, 4, 3, balance_score=""),
        ValueError,
        "TopKRouter: balance_score must be 'softmax' or 'sigmoid', found ''",
    ),
    (
        lambda: sk.nn.load_balancing_loss(LOGITS, torch.ones(6), score=""),
        ValueError,
        "load_balancing_loss: score must be 'softmax' or 'sigmoid', found ''",
    ),
    (
        lambda: sk.nn.load_balancing_loss(sk.route_with_sums(LOGITS)[1], torch.ones(5)),
        ValueError,
        "load_balancing_loss: counts must be [6], found [5]",
    ),
    (
        lambda: sk.nn.load_balancing_loss(LOGITS, torch.ones(6), score="softmaxx"),
        ValueError,
        "load_balancing_loss: score must be 'softmax' or 'sigmoid', found 'softmaxx'",
    ),
    (
        lambda: sk.nn.load_balancing_loss(LOGITS, torch.ones(1)),
        ValueError,
        "load_balancing_loss: counts must be [6], found [1]",
    ),
    (
        lambda: sk.nn.load_balancing_loss(LOGITS, torch.ones(6, 1)),
        ValueError,
        "load_balancing_loss: counts must be [6], found [6, 1]",
    ),
    (
        lambda: sk.nn.load_balancing_loss(LOGITS[None], torch.ones(4)),
        ValueError,
        "load_balancing_loss: logits must be [T, E], found [1, 4, 6]",
    ),
    (
        lambda: sk.nn.update_expert_bias(sk.nn.TopKRouter(4, 3, use_bias=True), torch.ones(1)),
        ValueError,
        "update_expert_bias: counts must be [3], found [1]",
    ),
]


@pytest.mark.parametrize("call, kind, message", WRONG, ids=[message[:50] for *_, message in WRONG])
def test_wrong_input_is_named(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


@pytest.fixture(scope="module")
def imported_first() -> dict[str, object]:
    """What a process finds that imports sigma_kernels before torch, under variables of nothing."""
    code = "import sigma_kernels as sk, json, support; "
    code += "print(json.dumps({'isa': sk._C.isa(), 'libgomp': support.count_libgomp()}))"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))  # an empty one is the folder that this runs in
    result = run_python(code, SIGMA_BACKEND="", SIGMA_ISA="", PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_an_empty_variable_is_unset(imported_first):
    """Defends: SIGMA_BACKEND= refused where SIGMA_ISA= is not."""
    assert imported_first["isa"] == sk._C.supported_isas()[0]


@pytest.mark.parametrize("isa", sk._C.supported_isas())
def test_every_isa_computes_the_same(isa):
    """Defends: lanes, tails and reductions of each build of the one source."""
    forked.spawn(check_isa, (isa,), 1)


BASELINES = {
    "x86_64": "This is the baseline variant: slow, for processors that no other variant knows.",
    "aarch64": "This is the baseline variant, NEON code: the only one on aarch64.",
}


@pytest.mark.parametrize("machine", BASELINES)
def test_doctor_says_what_the_baseline_is(machine):
    """Defends: SSE2 in place of AVX2 that nobody notices, and NEON code that is called slow."""
    forked.spawn(check_baseline, (machine, BASELINES[machine]), 1)


def test_unknown_isa_is_refused():
    forked.spawn(check_unknown_isa, (), 1)


def test_one_libgomp(imported_first):
    """Defends: two OpenMP pools in one process, whichever module was first in it: in a forked one torch was."""
    assert imported_first["libgomp"] == 1
    forked.spawn(check_libgomp, (), 1)


def test_a_checkout_without_the_extension_says_what_to_run(tmp_path):
    import shutil

    source = Path(sk.__file__).parent
    shutil.copytree(source, tmp_path / "sigma_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.meta_path = [f for f in sys.meta_path if "
    code += (
        "'skbuild' not in type(f).__module__ and 'ScikitBuild' not in type(f).__name__]; import sigma_kernels"
    )
    result = run_python(code)
    assert "ImportError: sigma_kernels._C is not built" in result.stderr


def test_second_derivatives_are_right_or_refused():
    """Defends: a gradient of a gradient that autograd takes for constant, as a gradient penalty would."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    routing = sk.group_by_expert(torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [1, 0]]), 3)
    check = torch.autograd.gradgradcheck
    assert check(lambda x, w: sk.grouped_gemm(x, w, OFFSETS), (x, weight))
    assert check(lambda x, w: sk.grouped_gemm(x, w.mT, OFFSETS, transpose_weight=False), (x, weight))
    assert check(lambda x: sk.permute(x, routing), (x,))
    assert check(lambda y, w: sk.unpermute(y, routing._replace(weights=w)), (y, gate))
    logits = torch.randn(5, 7, requires_grad=True)
    inputs = experts()
    for out, leaf in (sk.route(logits).weights, logits), (sk.moe_experts(*inputs), inputs[0]):
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (out.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("index", [2**32, -(2**32), 2**63 - 1])
def test_an_index_beyond_int32_is_no_expert(index):
    """Defends: 2**32 narrowed to expert 0."""
    x, choice, *rest = experts()
    choice[3] = index
    with pytest.raises(ValueError, match=r"expert indices must lie in 0\.\.2 .*or beyond at token 3"):
        sk.group_by_expert(choice, 3)
    with pytest.raises(ValueError, match=r"expert indices must lie in 0\.\.2 .*or beyond at token 3"):
        sk.moe_experts(x, choice, *rest)


def test_an_empty_sum_is_zero():
    """Defends: memory that a product of depth 0 never writes."""
    for is_transposed in (True, False):
        y = torch.full((5, 6), torch.nan)
        x = w = torch.empty(1)
        sk._C.grouped_gemm(
            3, 6, 0, OFFSETS.data_ptr(), x.data_ptr(), 0, w.data_ptr(), 0, 6, y.data_ptr(), is_transposed, 2
        )
        assert y.tolist() == torch.zeros(5, 6).tolist()
    x, *rest = experts(I=0)
    (grad,) = torch.autograd.grad(sk.moe_experts(x, *rest).sum(), x)
    assert grad.tolist() == torch.zeros(5, 6).tolist()
