"""How fast a device copies, reads and multiplies: one measurement of each in turn, in batches."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

import sigma_kernels as sk
from sigma_kernels.validation.inputs import SIZES

clock = time.perf_counter
LEAST_S = 0.02  # of one measurement: as many calls as take so long
BUFFER = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes, beyond what caches hold
# Of the matrices of a dense product: torch's bf16 makes 1 GF/s on a CPU without instructions for it.
SIDE = {("cpu", "f32"): 1024, ("cpu", "bf16"): 256, ("cuda", "f32"): 8192, ("cuda", "bf16"): 8192}


@dataclass
class Rate:
    """What one call moves or computes, in units of 1e9, and its measurements by batch; `up` where more is better."""

    name: str
    unit: str
    amount: float
    call: Callable[[], object]
    device: str = "cpu"
    up: bool = True
    calls: int = 1
    batches: list[list[float]] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        return [value for batch in self.batches for value in batch]

    @property
    def best(self) -> float:
        """The median of the best batch: what the device can do where nobody disturbs it."""
        medians = [median(batch) for batch in self.batches]
        return max(medians) if self.up else min(medians)

    @property
    def spread(self) -> float:
        """The deviation of a measurement, robust and relative: 1.4826 times the median distance from the median."""
        middle = median(self.values)
        return 1.4826 * median(abs(value - middle) for value in self.values) / middle


def rates(device: str) -> list[Rate]:
    """Copy, read, dense products of torch and grouped products of ours on one device."""
    kind = torch.device(device).type
    source = torch.ones(BUFFER[kind] // 4, device=device)
    target = torch.empty_like(source)
    gigabytes = source.nbytes / 1e9
    found = [
        Rate("memory copy", "GB/s", 2 * gigabytes, lambda: target.copy_(source), device),
        Rate("memory read", "GB/s", gigabytes, source.sum, device),
    ]
    size = SIZES["full"]
    indices = torch.arange(size.T, device=device)[:, None] % size.E
    offsets = sk.group_by_expert(indices, size.E).offsets
    for label, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        n = SIDE[kind, label]
        a = torch.linspace(-1, 1, n * n, device=device).to(dtype).view(n, n)
        square = partial(torch.mm, a, a)
        found.append(Rate(f"torch dense product, {label}", "GF/s", 2 * n**3 / 1e9, square, device))
        x = torch.linspace(-1, 1, size.T * size.H, device=device).to(dtype).view(size.T, size.H)
        weight = torch.linspace(-1, 1, 2 * size.I * size.H, device=device).to(dtype)
        weight = weight.view(1, 2 * size.I, size.H).repeat(size.E, 1, 1)
        amount = 2 * size.T * size.H * 2 * size.I / 1e9
        product = partial(sk.grouped_gemm, x, weight, offsets)
        found.append(Rate(f"grouped product, {label}", "GF/s", amount, product, device))
    return found


def seconds(rate: Rate) -> float:
    """Of one call, on average of rate.calls."""
    wait = torch.cuda.synchronize if torch.device(rate.device).type == "cuda" else (lambda: None)
    wait()
    start = clock()
    for _ in range(rate.calls):
        rate.call()
    wait()
    return (clock() - start) / rate.calls


def warm_up(all_rates: Sequence[Rate]) -> None:
    """Once each, and from the second time the number of calls of a measurement."""
    for rate in all_rates:
        seconds(rate)
        rate.calls = min(1000, max(1, int(LEAST_S / max(seconds(rate), 1e-9))))


def measure(all_rates: Sequence[Rate], rounds: int) -> None:
    """One more batch of each: one measurement of each a round, so that what disturbs one moment disturbs all alike."""
    for rate in all_rates:
        rate.batches.append([])
    with torch.no_grad():
        for _ in range(rounds):
            for rate in all_rates:
                rate.batches[-1].append(rate.amount / seconds(rate))
