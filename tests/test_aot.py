"""The equipment of `sigma bench --aot`, which compiles all kernels: here one of each target, and what must be found."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sigma_cli.aot import GPUS, judged, loads
from sigma_cli.aot_launches import Shape, layer, others
from sigma_cli.aot_page import TOLD, bounds, form, plan, work
from sigma_cli.commands import app
from sigma_train.errors import WrongInput, verdict
from triton.compiler import make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature
from typer.testing import CliRunner

SHAPE = Shape(2048, 96, 1, 1024, 512)
TALL = Shape(8192, 96, 1, 1024, 512)  # whose rows are multiplied by tiles of 128
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def compiled_anew(shared, monkeypatch):
    """By this run; some tests ask for the same kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared / "triton"))


def products(architecture: str, dtype: torch.dtype = torch.bfloat16) -> list:
    return layer(SHAPE, dtype, architecture, GPUS[architecture].processors)


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_the_gate_and_up_projection(architecture):
    """Defends: a block size that spills or does not fit, a product off the matrix units, narrow loads.

    One of each assembly; all kernels of all five are `sigma bench --aot --quick`, which .ci/run has.
    """
    verdict = judged(products(architecture)[0], GPUS[architecture], torch.bfloat16)
    assert verdict.wrong == ()
    assert verdict.resources.registers
    assert 0 < verdict.resources.occupancy(GPUS[architecture]) <= 1


@pytest.mark.parametrize("architecture, rows", [("sm_80", 32), ("gfx942", 64)])
def test_a_block_that_spills_is_found(architecture, rows):
    """Defends: a gate that passes everything.  One warp holds two sums of 32 x 128, one of AMD's two of 64 x 128."""
    launch = products(architecture)[0]
    bad = replace(
        launch, options={**launch.options, "BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 1}
    )
    assert any("spills" in reason for reason in judged(bad, GPUS[architecture], torch.bfloat16).wrong)


def test_a_block_that_does_not_fit_is_found():
    """Defends: shared memory beyond what a program may take, which only a launch would refuse."""
    launch = products("sm_80")[0]
    bad = replace(launch, options={**launch.options, "BLOCK_K": 128, "num_stages": 8})
    assert any("shared memory" in reason for reason in judged(bad, GPUS["sm_80"], torch.bfloat16).wrong)


def test_a_scattered_operand_is_found():
    """Defends: columns of weights apart in memory, read two bytes at a time."""
    launch = products("sm_80")[0]
    strides = {"stride_n": 3, "stride_k": 1024}
    args = tuple(strides.get(name, x) for name, x in zip(launch.kernel.arg_names, launch.args, strict=False))
    assert any(
        "by 1 or 2" in reason for reason in judged(replace(launch, args=args), GPUS["sm_80"], BF16).wrong
    )


def test_loads_are_told_apart():
    """Defends: the reading of both assemblies."""
    sass = "LDG.E R1 ; LDG.E.128 R4 ; LDGSTS.E.BYPASS.LTC128B.128 [R1] ; LDG.E.U16 R2 ; LDGDEPBAR ; LDGSTS.E.64 [R2]"
    assert loads(sass, GPUS["sm_90"]) == {4: 1, 16: 2, 2: 1, 8: 1}
    amd = """
        global_load_dwordx4 v[0:3]
        buffer_load_ushort v1
        global_load_dword v2
        buffer_load_dword v3, s[0:3], 0 offen lds
        buffer_load_dwordx2 v[4:5]
    """
    assert loads(amd, GPUS["gfx950"]) == {16: 2, 2: 1, 4: 1, 8: 1}


def test_another_number_of_tokens_compiles_nothing():
    """Defends: T, or what is made of it, in what Triton compiles a kernel for."""
    kinds = [specialised(Shape(T, 96, 2, 1024, 512)) for T in (1601, 1840, 2000, 2048)]
    assert all(found == kinds[0] for found in kinds)


def specialised(shape: Shape) -> set[tuple[str, str]]:
    """Kernels and what they are compiled for, of everything that a layer calls."""
    backend, processors = make_backend(GPUS["sm_90"].target), GPUS["sm_90"].processors
    found = set()
    for launch in layer(shape, BF16, "sm_90", processors) + others(shape, BF16, "sm_90", processors):
        bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        args = [MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for x in launch.args]
        _, kinds, options = bind(*args, **launch.options)
        found.add((launch.name, f"{kinds} {options}"))
    return found


def test_the_page_has_the_kernels_that_are_launched():
    """Defends: docs/results/aot.md made before the block sizes of today."""
    page = (Path(__file__).parent.parent / "docs/results/aot.md").read_text()
    told = Counter(
        tuple(line.split(" | ")[:3]) for line in page.splitlines() if line.count("|") == 12 and "`" in line
    )
    want = Counter()
    for (_, dtype), call in plan(quick=False):
        block = [call.bound.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
        want["| " + form(call), dtype, " x ".join(map(str, block)) if None not in block else ""] += 1
    assert told == want


@pytest.mark.parametrize("architecture, told", [("sm_90", "e4m3.e4m3"), ("gfx942", "_fp8_fp8")])
def test_fp8_is_multiplied_as_it_is_stored(architecture, told):
    """Defends: e4m3 that is widened first, in tiles that are not NVIDIA's smaller ones, where Triton widens it."""
    gpu = GPUS[architecture]
    calls = others(TALL, BF16, architecture, gpu.processors)
    launch = next(call for call in calls if "fp8 by block" in form(call))
    assert launch.bound["BLOCK_M"] == 128
    assert judged(launch, gpu, BF16).wrong == ()
    assert told in launch.compiled(gpu.target).asm["ptx" if architecture == "sm_90" else "amdgcn"]


def test_hopper_adds_no_more_fp8_than_a_step_in_few_bits():
    """Defends: sums of all of K in what Hopper's units add fp8 in, which no interpreter shows."""
    calls = others(TALL, BF16, "sm_90", GPUS["sm_90"].processors)
    launch = next(call for call in calls if "fp8 by channel" in form(call))
    code = launch.compiled(GPUS["sm_90"].target).asm["ttgir"]
    assert "maxNumImpreciseAcc = 128 : i32" in code


def test_a_descriptor_that_is_not_used_is_found():
    """Defends: a compiler that makes pointers of descriptors, as it does for sm_80."""
    launch = products("sm_90")[0]
    assert judged(launch, GPUS["sm_90"], BF16).resources.tma
    assert "no UTMALDG or UTMASTG" in judged(launch, GPUS["sm_80"], BF16).wrong


def test_a_product_off_the_matrix_units_is_found():
    launch = products("sm_90", torch.float32)[0]
    assert "no [HQ]G?MMA" in judged(launch, GPUS["sm_90"], torch.bfloat16).wrong


def test_the_launches_of_a_layer():
    """Defends: bounds of a launch that computes nothing, a form that is told wrongly."""
    launches = products("sm_90")
    assert [form(call) for call in launches] == [
        "`gate_up` (TMA)",
        "`grouped_gemm` (map, weights, TMA)",
        "`grouped_gemm` (TMA, by token, columns contiguous)",
        "`swiglu_backward`",
        "`grouped_outer` (TMA, a by token)",
        "`grouped_outer` (TMA, b by token)",
        "`grouped_gemm` (map, TMA, columns contiguous)",
    ]
    moved, flops, wanted = work(launches[0], SHAPE)
    assert wanted == 2 * 2048 * 1024 * 1024
    assert flops == wanted * 32 / (2048 / 96)
    weights = 96 * 1024 * 1024 * 2
    assert weights < moved < weights * 1.1


@pytest.mark.parametrize("architecture", GPUS)
def test_paper_bounds_add_up(architecture):
    for shape in TOLD:
        *lines, last = bounds(GPUS[architecture], shape, torch.bfloat16)
        least = sum(max(float(row[4]), float(row[5])) for row in lines)
        assert abs(float(last[4].split()[0]) - least) <= len(lines)
        assert 0 < int(last[5].split("%")[0]) <= 100


@pytest.mark.parametrize(
    "option", [["layer"], ["--rounds", "3"], ["--threads", "1"], ["--json", "x.json"]], ids=str
)
def test_options_of_races_are_refused(option):
    """Defends: an option that is taken and means nothing."""
    result = CliRunner().invoke(app, ["bench", "--aot", *option])
    assert isinstance(result.exception, WrongInput)
    assert str(result.exception) == "--aot races nothing: it takes --quick and --output alone"


def test_without_triton_the_answer_says_what_brings_it():
    code, text = verdict(ModuleNotFoundError("No module named 'triton'", name="triton"))
    assert (code, text) == (
        1,
        "the module triton is not installed; pip install 'sigma-kernels[triton]' brings it",
    )
