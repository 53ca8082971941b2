"""What `sigma doctor --validate` makes of kernels and memory: sound ones are fit, one wrong bit is named."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch

import sigma_kernels as sk
from sigma_kernels.validation import cases, kernels, memory
from sigma_kernels.validation.digests import of_definition, stored
from sigma_kernels.validation.inputs import SIZES, Inputs, Size
from sigma_kernels.validation.result import NOT_RUN, OK, WRONG, Result

backends = import_module("sigma_kernels.backends")  # the package's attribute of that name is the function
QUICK = SIZES["quick"]
SMALL = Size("small", 96, 12, 256, 64)  # what the plain torch reference computes in no time
VALIDATE = ["doctor", "--validate", "--quick"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def wrong_ones(results: list[Result]) -> list[str]:
    return [str(x) for x in results if x.result != OK]


@pytest.mark.parametrize("case", cases.EXACT, ids=lambda case: case.op)
def test_what_is_stored_is_what_the_definition_gives(case):
    """Defends: digests that were taken from the kernels which they judge."""
    known = of_definition(case, QUICK)
    assert known == {name: stored(QUICK)[name] for name in known}
    assert known.keys() == {f"{case.op}/{dtype}" for dtype in case.dtypes}


def test_every_digest_is_of_a_case():
    for size in SIZES.values():
        assert stored(size).keys() == {f"{case.op}/{dtype}" for case in cases.EXACT for dtype in case.dtypes}


@pytest.mark.parametrize("count", [1, 2])
def test_this_machine_is_fit_at_any_number_of_threads(threads, count):
    threads(count)
    results = list(kernels.check("cpu", QUICK, 0))
    assert not wrong_ones(results)
    assert len(results) == sum(len(case.dtypes) for case in cases.CASES)


def test_the_size_of_a_real_layer_in_one_dtype(monkeypatch):
    """Defends: sums at the full size that are not exact after all."""
    monkeypatch.setattr(kernels, "DTYPES", {"bf16": torch.bfloat16})
    chosen = [c for c in cases.CASES if c.op in ("unpermute", "moe_experts_int8")]
    monkeypatch.setattr(kernels, "CASES", chosen)
    assert not wrong_ones(list(kernels.check("cpu", SIZES["full"], 0)))


def test_the_reference_has_the_same_bits(monkeypatch):
    """Defends: digests that hold for one order of sums alone: plain torch sums in another, in f32."""
    known = {name: found for case in cases.EXACT for name, found in of_definition(case, SMALL).items()}
    monkeypatch.setattr(kernels, "CASES", cases.EXACT)
    results = list(kernels.check("reference", SMALL, 0, known=known))
    assert not [str(x) for x in results if x.dtype == "f32" and x.result != OK]
    narrow = {x.result for x in results if x.dtype == "bf16" and x.name != "route"}
    assert narrow == {NOT_RUN}, "the reference has no bf16"


def flip(x: torch.Tensor, bit: int = 0) -> None:
    """One bit of the last element."""
    as_integers = {2: torch.int16, 4: torch.int32}[x.element_size()]
    x.view(as_integers).view(-1)[-1] ^= 1 << bit


OPERATIONS = [
    ("permute", "permute", "output"),
    ("unpermute_backward", "unpermute", "gradient of weights"),
    ("grouped_gemm", "grouped_gemm", "output"),
    ("grouped_outer", "grouped_gemm", "gradient of weight"),
    ("moe_experts_backward", "moe_experts", "gradient of down_proj"),
]


@pytest.mark.parametrize("row, op, output", OPERATIONS)
def test_one_flipped_bit_is_seen(monkeypatch, row, op, output):
    """Of the lowest order, in one element of one dtype; operation, dtype and backend are named, and nothing else."""
    (native,) = [r for r in backends._tables[row] if r.name == "cpu"]

    def hurt(*args):
        result = native.run(*args)
        written = args[0] if result is None else result[-1] if isinstance(result, tuple) else result
        if written.dtype == torch.bfloat16:
            flip(written)
        return result

    monkeypatch.setattr(kernels, "backend", lambda name: swapped(row, hurt))
    monkeypatch.setattr(kernels, "CASES", [case for case in cases.CASES if case.op == op])
    known = {name: d for c in cases.EXACT if c.op == op for name, d in of_definition(c, SMALL).items()}
    results = list(kernels.check("cpu", SMALL, 0, known=known))
    assert wrong_ones(results) == [
        f"{op}, bf16, cpu {sk._C.isa()}: the {output} is not, bit for bit, what it should be, in repetition 1"
    ]


@contextlib.contextmanager
def swapped(row: str, run: Callable) -> Iterator[None]:
    """The table with another function for the CPU in one row."""
    rows = backends._tables[row]
    changed = [dataclasses.replace(r, run=run) if r.name == "cpu" else r for r in rows]
    backends.register_table(row, changed)
    try:
        yield
    finally:
        backends.register_table(row, rows)


def test_a_fault_that_comes_and_goes_is_one(monkeypatch):
    """Defends: a last repetition that is good, and so all of them."""
    monkeypatch.setattr(kernels, "DTYPES", {"f32": torch.float32})
    permute, calls = next(c for c in cases.EXACT if c.op == "permute"), []

    def hurt(inputs):
        out = permute.run(inputs)
        calls.append(1)
        if len(calls) == 3:
            flip(out["output"])
        return out

    case = cases.Exact("permute", hurt, permute.rows)
    monkeypatch.setattr(kernels, "CASES", [case])
    (found,) = kernels.check("cpu", SMALL, 0.5, known=of_definition(permute, SMALL))
    assert (found.result, found.repetitions, len(calls)) == (WRONG, 3, 3)
    assert found.why.endswith("in repetition 3")


def test_what_rounds_is_held_to_its_bound(monkeypatch):
    """Defends: a comparison that passes NaN, or experts that are off by a little."""
    fine = torch.ones(4, dtype=torch.float64)
    assert kernels.excess(cases.Comparison("x", fine * (1 + 1e-7), fine, 1e-6)) is None
    assert "off by 1.0e-05" in kernels.excess(cases.Comparison("x", fine * (1 + 2e-5), fine, 1e-6))
    assert "off by nan" in kernels.excess(cases.Comparison("x", fine * torch.nan, fine, 1e-6))
    for case in cases.CLOSE:
        found = list(case.compare(Inputs(SMALL, torch.float32), 0))
        assert all(kernels.excess(c._replace(got=c.got * (1 + 1e-3))) for c in found if c.want.numel())


def test_memory_that_holds():
    assert memory.failing_bits(1 << 20) is None


@pytest.mark.parametrize("bit", [0, 17, 63])
def test_a_bit_that_does_not_hold_is_named(monkeypatch, bit):
    """A bit of one word that is always zero."""
    equal = torch.equal

    def stuck(held, content):
        held.view(-1)[1000] &= ~(1 << bit) if bit < 63 else (1 << 63) - 1
        return equal(held, content)

    monkeypatch.setattr(torch, "equal", stuck)
    found = memory.failing_bits(1 << 16)
    assert f"bits [{bit}] of the word at byte 8000 did not hold" in found


def test_addresses_that_fall_together_are_found(monkeypatch):
    """Defends: patterns that repeat: two places that are one hold the same walking one."""
    equal = torch.equal

    def aliased(held, content):
        held[64:128] = held[:64]
        return equal(held, content)

    monkeypatch.setattr(torch, "equal", aliased)
    assert memory.failing_bits(1 << 16).startswith("with its own address")
