"""Accelerators by their datasheets: what `sigma plan` reckons with where no option says otherwise.

docs/plan.md says where each figure was looked up.
"""

import difflib
from dataclasses import dataclass

from sigma_train.errors import WrongInput


@dataclass(frozen=True)
class Accelerator:
    """One device and its share of a node's links; rates are peaks, links are counted one way."""

    name: str
    bf16_tflops: float  # dense products, without sparsity
    f32_tflops: float  # of products that are not rounded to TF32
    memory_gb: float  # 1e9 bytes
    memory_gb_s: float
    node_gb_s: float  # from one device to all others of its node together
    network_gb_s: float  # from one device out of its node
    node_ranks: int
    source: str


ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator(
            "A100", 312, 19.5, 80, 2039, 300, 25, 8,
            "NVIDIA A100 80GB SXM datasheet (NVLink 600 GB/s both ways); DGX A100: a 200 Gb/s port a GPU",
        ),
        Accelerator(
            "H100", 989, 67, 80, 3350, 450, 50, 8,
            "NVIDIA H100 SXM datasheet (NVLink 900 GB/s both ways); DGX H100: a 400 Gb/s port a GPU",
        ),
        Accelerator(
            "H200", 989, 67, 141, 4800, 450, 50, 8,
            "NVIDIA H200 SXM datasheet (NVLink 900 GB/s both ways); DGX H200: a 400 Gb/s port a GPU",
        ),
        Accelerator(
            "B200", 2250, 75, 180, 8000, 900, 50, 8,
            "NVIDIA HGX B200 and DGX B200 datasheets (NVLink 1.8 TB/s both ways, 1,440 GB and 64 TB/s of 8 GPUs, "
            "a 400 Gb/s port a GPU)",
        ),
        Accelerator(
            "MI300X", 1307.4, 163.4, 192, 5300, 448, 50, 8,
            "AMD Instinct MI300X data sheet (7 links of 128 GB/s both ways); Azure ND MI300X v5: a 400 Gb/s port a GPU",
        ),
    )
}  # fmt: skip


def accelerator(name: str) -> Accelerator:
    """Raises: WrongInput for a name that is not in the table."""
    by_lower = {known.lower(): a for known, a in ACCELERATORS.items()}
    if found := by_lower.get(name.lower()):
        return found
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = (
        f"did you mean {by_lower[nearest[0]].name!r}?" if nearest else f"there are {', '.join(ACCELERATORS)}"
    )
    raise WrongInput(f"unknown accelerator {name!r}; {hint}")
