"""The digests that kernels are held against.  `python -m sigma_kernels.validation.digests` makes them from f64."""

import hashlib
import json
import sys
from importlib.resources import files

import torch
from torch import Tensor

from sigma_kernels.backends import backend
from sigma_kernels.validation.cases import DTYPES, EXACT, Exact
from sigma_kernels.validation.inputs import NARROW, SIZES, Inputs, Size

Digests = dict[str, dict[str, str]]  # {"op/dtype": {output: digest}}
STORED = files("sigma_kernels.validation") / "digests.json"


def digest(x: Tensor) -> str:
    """sha256 of the shape and the bytes in order of a contiguous tensor; -0 counts as 0, whose sign sums do not fix."""
    x = x.detach().cpu().contiguous()
    if x.dtype.is_floating_point:
        x = x + 0.0  # -0 + 0 is 0; all else stays as it is
    found = hashlib.sha256(str(list(x.shape)).encode())
    found.update(x.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def stored(size: Size) -> Digests:
    return json.loads(STORED.read_text())[size.name]


def of_definition(case: Exact, size: Size) -> Digests:
    """Of one operation, from the reference in f64, rounded once to each dtype."""
    found: Digests = {}
    for wide in (True, False) if case.is_wide else (False,):
        with backend("reference"):
            outputs = (case.define or case.run)(Inputs(size, torch.float64, wide=wide))
        for name in case.dtypes:
            dtype = DTYPES[name]
            if not case.is_wide or wide == (dtype not in NARROW):
                found[f"{case.op}/{name}"] = {
                    output: digest(x.to(dtype) if x.dtype.is_floating_point else x)
                    for output, x in outputs.items()
                }
    return found


def main() -> None:
    """Print the content of digests.json: of the definitions, never of the kernels that are judged by it."""
    made: dict[str, Digests] = {size.name: {} for size in SIZES.values()}
    for size in SIZES.values():
        for case in EXACT:
            made[size.name] |= of_definition(case, size)
            print(f"{size.name}: {case.op}", file=sys.stderr)
    json.dump(made, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()
