"""Every kernel of one backend, in every dtype, against the stored digests, again and again while time lasts."""

import time
from collections.abc import Callable, Iterator

import torch

from sigma_kernels import _C
from sigma_kernels.backends import backend, refusal
from sigma_kernels.ops.library import empty_cache
from sigma_kernels.validation.cases import CASES, DTYPES, Close, Comparison, Exact
from sigma_kernels.validation.digests import Digests, digest, stored
from sigma_kernels.validation.inputs import Inputs, Size
from sigma_kernels.validation.result import NOT_RUN, OK, WRONG, Result


def check(
    name: str,
    size: Size,
    seconds: float,
    *,
    device: str = "cpu",
    known: Digests | None = None,
    begin: Callable[[str, str], None] = lambda op, dtype: None,
) -> Iterator[Result]:
    """One result for each operation and dtype.

    Each is computed once at least, and then in rounds until `seconds`, shared among the dtypes, are over.  An operation
    that was wrong once stays so: a fault that comes and goes is one.
    begin: told what runs next, so that who watches this process knows what it died of.
    """
    known = stored(size) if known is None else known
    where = place(name, device)
    for label, dtype in DTYPES.items():
        end = time.monotonic() + seconds / len(DTYPES)
        cases, faults, times = [], {}, dict.fromkeys((case.op for case in CASES), 0)
        for case in CASES:
            if label not in case.dtypes:
                continue
            if obstacle := missing(case, name, dtype, device):
                yield Result("kernels", case.op, where, NOT_RUN, obstacle, label)
            else:
                cases.append(case)
        inputs, turn = Inputs(size, dtype, device), 0
        while cases and (turn == 0 or time.monotonic() < end):
            for case in [case for case in cases if case.op not in faults]:
                begin(case.op, label)
                fault = judged(case, name, inputs, known.get(f"{case.op}/{label}", {}), turn)
                times[case.op] += 1
                if fault:
                    faults[case.op] = f"{fault}, in repetition {times[case.op]}"
            turn += 1
        for case in cases:
            found = faults.get(case.op, "")
            yield Result("kernels", case.op, where, WRONG if found else OK, found, label, times[case.op])
        empty_cache()


def place(name: str, device: str) -> str:
    """What computes: a backend, and of the CPU's the instruction set."""
    return f"cpu {_C.isa()}" if name == "cpu" else f"{name} on {device}"


def missing(case: Exact | Close, name: str, dtype: torch.dtype, device: str) -> str | None:
    """Why this backend has no kernel for a case, if so."""
    if name == "cuda" and case.op == "moe_experts_int8":
        return "backend 'cuda' takes no int8 weights"
    with backend(name):
        for row in case.rows:
            if why := refusal(row, torch.empty(0, dtype=asked(row, dtype), device=device)):
                return why
    return None


def asked(row: str, dtype: torch.dtype) -> torch.dtype:
    """What a row of the table of backends computes on: routers take narrow logits in f32."""
    if row == "group_by_expert":
        return torch.int32
    return torch.promote_types(dtype, torch.float32) if row.startswith("route") else dtype


def judged(case: Exact | Close, name: str, inputs: Inputs, known: dict[str, str], turn: int) -> str | None:
    """What is wrong with one repetition of a case."""
    try:
        with backend(name):
            if isinstance(case, Close):
                return next(filter(None, map(excess, case.compare(inputs, turn))), None)
            outputs = case.run(inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:  # of a device that gave up
        if "allocate memory" in str(error):
            raise
        return f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if outputs.keys() != known.keys():
        return f"no digest is stored for {', '.join(sorted(outputs.keys() ^ known.keys()))}"
    wrong = [output for output, x in outputs.items() if digest(x) != known[output]]
    return f"the {wrong[0]} is not, bit for bit, what it should be" if wrong else None


def excess(comparison: Comparison) -> str | None:
    """Which result is off by more than its dtype explains; NaN is."""
    output, got, want, bound = comparison
    size = (want.square().mean().sqrt() + want.abs()).clamp(min=1e-30)
    off = ((got.double() - want.double()).abs() / size).max().item()
    return None if off <= bound else f"the {output} is off by {off:.1e} of its size, more than {bound:.1e}"
