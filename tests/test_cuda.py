"""The CUDA backend from the public functions down: its bindings and kernels run on the emulator of tests/simt.

With --device cuda on a GPU, where the emulator's schedules that differ by seed are the GPU's own.
"""

import fcntl
import importlib.util
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from support import assert_close, tolerance, value_and_grads
from test_ops_absent import SHAPES as SHAPES_ABSENT
from test_ops_absent import check_absent
from test_ops_route_with_sums import ROWS, SCORES, check_row, check_sums, leaf

import sigma_kernels as sk
from sigma_kernels import _C, reference
from sigma_kernels.backends import Backend, _tables, register_table
from sigma_kernels.ops import cuda

ROOT = Path(__file__).parent.parent
OPS = [op for op, rows in _tables.items() if any(row.name == "cuda" for row in rows)]
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="session")
def emulated(shared: Path) -> ModuleType:
    """The module _C.cuda, its kernels compiled by g++: by the first worker that needs it."""
    module = shared / f"simt_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(shared / "simt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            compile_module(module)
    spec = importlib.util.spec_from_file_location("simt_kernels", module)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native


def compile_module(module: Path) -> None:
    simt = ROOT / "tests/simt"
    kernels = [*(ROOT / "csrc/cuda").glob("*.cu"), *(simt / "emulator").glob("*.cpp")]
    includes = [
        simt / "emulator/include",
        ROOT / "csrc",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.name}.o"
        optimised = "-O1" if source in kernels else "-O0"  # bindings only pass on
        subprocess.run(["g++", *flags, optimised, "-x", "c++", "-c", source, "-o", out], check=True)
        return out

    with tempfile.TemporaryDirectory(dir=module.parent) as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        bindings = folder / "bindings.cpp"  # in one: to read pybind11's headers takes seconds
        parts = (ROOT / "csrc/cuda/bindings.cpp", simt / "module.cpp")
        bindings.write_text("".join(f'#include "{part}"\n' for part in parts))
        objects = list(pool.map(compile_one, [bindings, *kernels]))
        subprocess.run(["g++", "-shared", *objects, "-o", folder / module.name], check=True)
        (folder / module.name).rename(module)


@pytest.fixture
def reseed(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], None]]:
    """The CUDA backend runs all; on the emulator a call of this gives the threads another order.

    There every operation has the row of this backend alone, and takes tensors of a CPU.
    """
    if device.type == "cuda":
        with sk.backend("cuda"):
            yield lambda seed: None
        return
    emulated = request.getfixturevalue("emulated")
    monkeypatch.setattr(cuda, "_native", emulated)
    monkeypatch.setattr(cuda, "launch", lambda name, data, *arguments: getattr(emulated, name)(*arguments, 0))
    before = dict(_tables)
    for op in OPS:
        (row,) = (row for row in before[op] if row.name == "cuda")
        register_table(op, [Backend("cuda", row.run, row.dtypes, "cpu")])
    yield emulated.set_seed
    emulated.set_seed(0)
    for op in OPS:
        register_table(op, before[op])


@pytest.mark.parametrize("score, normalize", [("softmax", False), ("softmax", True), ("sigmoid", True)])
@pytest.mark.parametrize("T, E, k", [(0, 5, 2), (1, 1, 1), (40, 96, 1), (33, 37, 8)])
def test_route(reseed, T, E, k, score, normalize):
    """Defends: arguments in the wrong order, workspace too small, strided logits taken as contiguous."""
    logits = torch.randn(T, E + 3)[:, :E]
    routing = sk.route(logits, k, score=score, normalize=normalize)
    want = reference.route(logits.double(), k, score=score, normalize=normalize)
    assert all(map(torch.equal, routing[0:1] + routing[2:], want[0:1] + want[2:]))
    assert_close(routing.weights, want.weights, tolerance(f32, E))
    if T and not (normalize and k == 1):
        grad = torch.randn(T, k)
        got, expected = (
            value_and_grads(
                lambda x, route=route: route(x, k, score=score, normalize=normalize).weights, [x], g
            )[1]
            for route, x, g in ((sk.route, logits, grad), (reference.route, logits.double(), grad.double()))
        )
        assert_close(got, expected, tolerance(f32, E))


@pytest.mark.parametrize("balance_score", SCORES)
@pytest.mark.parametrize("score, normalize", [("softmax", False), ("softmax", True), ("sigmoid", True)])
@pytest.mark.parametrize("T, E, k", [(0, 5, 2), (1, 1, 1), (70, 96, 1), (33, 130, 8)])
def test_route_with_sums(reseed, T, E, k, score, normalize, balance_score):
    """Defends: arguments in the wrong order, workspace without room for the sums, other bits in another order."""
    logits = leaf(T, E, strided=True)
    runs = []
    for seed in (0, 1, 2):
        torch.manual_seed(0)
        reseed(seed)
        runs.append(check_sums(logits, k, balance_score, score=score, normalize=normalize))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("balance_score", SCORES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_sums_of_rows_without_a_finite_largest(reseed, row, balance_score):
    """Defends: NaN where the squared log sum exp is infinite."""
    check_row(row, balance_score)


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("T, H, k", [(0, 8, 1), (1, 1, 1), (9, 33, 1), (7, 64, 3)])
def test_permute_and_unpermute(reseed, T, H, k, dtype):
    """Defends: there and back, with gradients for rows and weights."""
    routing = sk.group_by_expert(torch.randint(0, 5, (T, k)), 5)
    x, weights = torch.randn(T, H, dtype=dtype), torch.rand(T, k, dtype=dtype)

    def through(permute, unpermute):
        return lambda x, w: unpermute(2 * permute(x, routing.row_map, k), routing.row_map, w, k, len(x))

    ops = torch.ops.sigma
    got = value_and_grads(through(ops.permute, ops.unpermute), [x, weights])
    want = value_and_grads(through(reference.permute, reference.unpermute), [x.double(), weights.double()])
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, H))


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("R, N, K, E", [(0, 5, 3, 2), (1, 1, 1, 1), (9, 67, 33, 4), (40, 72, 136, 3)])
def test_grouped_gemm(reseed, R, N, K, E, transpose):
    """Defends: both layouts and weights that lie the other way, with both gradients."""
    offsets = torch.tensor([0, *sorted(torch.randint(0, R + 1, (E - 1,)).tolist()), R])
    x, weight = torch.randn(R, K, dtype=bf16), torch.randn(E, K, N, dtype=bf16)
    weight = weight.transpose(1, 2) if transpose else weight
    got = value_and_grads(
        lambda x, w: sk.grouped_gemm(x, w, offsets, transpose_weight=transpose), [x, weight]
    )
    want = value_and_grads(
        lambda x, w: reference.grouped_gemm(x, w, offsets, transpose_weight=transpose),
        [x.double(), weight.double()],
    )
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(bf16, 1))


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
@pytest.mark.parametrize(
    "T, H, I, E, k", [(0, 8, 8, 2, 1), (1, 1, 1, 1, 1), (20, 40, 24, 6, 1), (11, 33, 17, 4, 3)]
)
def test_moe_experts(reseed, T, H, I, E, k, dtype):
    """Defends: the whole layer, its four gradients and the path that records none."""
    index = torch.randint(0, E, (T, k))
    inputs = [
        torch.randn(T, H, dtype=dtype),
        torch.rand(T, k, dtype=dtype),
        torch.randn(E, 2 * I, H, dtype=dtype) / H**0.5,
        torch.randn(E, H, I, dtype=dtype) / I**0.5,
    ]
    got = value_and_grads(lambda x, w, *p: sk.moe_experts(x, index, w, *p), inputs)
    want = value_and_grads(
        lambda x, w, *p: reference.moe_experts(x, index, w, *p), [x.double() for x in inputs]
    )
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, 4))
    with torch.no_grad():
        assert torch.equal(sk.moe_experts(inputs[0], index, *inputs[1:]), got[0])


@pytest.mark.parametrize("shape", SHAPES_ABSENT[:2], ids=str)
def test_absent_choices_add_nothing(reseed, shape):
    """Defends: memory of slots without a row read as if a product had written it."""
    check_absent(shape, bf16)


def test_a_layer_trains(reseed):
    """Defends: an operation that a step of training needs and this backend has no row for."""
    moe = sk.nn.MoE(24, 16, 6, output_scale=4.0).to(bf16)
    wide = sk.nn.MoE(24, 16, 6, output_scale=4.0).double()
    wide.load_state_dict(moe.state_dict())
    x = torch.randn(30, 24, dtype=bf16)
    with sk.backend("cuda"):
        moe(x).float().square().mean().backward(retain_graph=True)
        loss = sk.nn.load_balancing_loss(moe.last_sums, moe.last_routing.counts) + sk.nn.router_z_loss(
            moe.last_sums
        )
        moe.router.weight.grad = None
        loss.backward()
    logits = x.double() @ wide.router.weight.T
    want = sk.nn.load_balancing_loss(logits, moe.last_routing.counts) + sk.nn.router_z_loss(logits)
    want.backward()
    assert_close(loss, want, tolerance(f32, 24))
    assert_close(moe.router.weight.grad, wide.router.weight.grad, tolerance(bf16, 1))
    assert all(p.grad.abs().max() > 0 for p in moe.experts.parameters())


def test_gradients_added_in_place(reseed):
    """Defends: accumulate_grad adds to what is there."""
    layer = sk.nn.Experts(8, 8, 3).to(bf16)
    x, index, weights = (
        torch.randn(6, 8, dtype=bf16),
        torch.randint(0, 3, (6, 1)),
        torch.ones(6, 1, dtype=bf16),
    )
    layer(x, index, weights).sum().backward()
    once = [p.grad.clone() for p in layer.parameters()]
    with sk.accumulate_grad():
        layer(x, index, weights).sum().backward()
    for p, before in zip(layer.parameters(), once, strict=True):
        assert_close(p.grad, 2 * before.double(), tolerance(bf16, 1))


def test_gradients_of_experts_in_f32(reseed):
    """Defends: narrow numbers written into memory of f32."""
    layer = sk.nn.Experts(8, 8, 3)
    x, index, weights = torch.randn(6, 8), torch.randint(0, 3, (6, 1)), torch.ones(6, 1)
    copies = [p.detach().to(bf16).requires_grad_() for p in layer.parameters()]
    sk.moe_experts(x.to(bf16), index, weights.to(bf16), *copies).sum().backward()
    with sk.accumulate_grad():
        for times in (1, 2):
            layer(x, index, weights, bf16).sum().backward()
            for p, copy in zip(layer.parameters(), copies, strict=True):
                assert torch.equal(p.grad, times * copy.grad.float())


def test_what_it_does_not_take(reseed):
    """Defends: float32 products and too many experts refused with a reason."""
    index, weights = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(RuntimeError, match="'cuda': it takes bfloat16, float16, not float32"):
        sk.moe_experts(torch.randn(2, 4), index, weights, torch.randn(1, 8, 4), torch.randn(1, 4, 4))
    with pytest.raises(ValueError, match="backend 'cuda' takes at most 1024 experts, found E=1025"):
        sk.route(torch.randn(2, 1025))


def test_every_operation_has_a_row():
    """Defends: an operation added for the CPU alone, which a model on a GPU then misses."""
    assert set(OPS) == set(_tables) - {"moe_experts_fp8"}, "fp8 is Triton's alone"


@pytest.mark.skipif(hasattr(_C, "cuda"), reason="this installation was built with CUDA")
def test_named_where_it_was_not_built():
    """Defends: a forced backend that is not there says why."""
    with (
        sk.backend("cuda"),
        pytest.raises(RuntimeError, match="cannot run route here: 'cuda': built without CUDA"),
    ):
        sk.route(torch.randn(2, 3))
