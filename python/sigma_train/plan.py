"""What a training configuration will hold, send and take on P ranks: a model on paper, from exact shapes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sigma_train.accelerators import Accelerator
from sigma_train.config import Config
from sigma_train.plan_memory import Memory, memory
from sigma_train.plan_shapes import Layout, Shapes
from sigma_train.plan_time import GB, TFLOP, Flops, Shares, Times, flops, times
from sigma_train.plan_wire import Collective, collectives

USABLE = 0.9  # of a device's memory; the rest is for libraries and what an allocator cannot use
LOADS = (1, 1.25, 1.5, 2, 3, 4, 8, 16, 32, 64, 96)


@dataclass(frozen=True)
class Plan:
    """One configuration on one layout of one accelerator."""

    config: Config
    shapes: Shapes
    layout: Layout
    device: Accelerator
    shares: Shares
    memory: Memory
    messages: list[Collective]
    flops: Flops
    times: Times
    crowds: list[tuple[float, float]]  # the busiest expert's load over the mean, seconds of a step

    @property
    def tokens(self) -> int:
        """Of a step of all ranks."""
        t = self.config.train
        return t.batch_size * t.seq_len * t.grad_accum * self.layout.ranks

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE * self.device.memory_gb * GB

    def mfu(self, step_s: float) -> float:
        """FLOPs of the model over those that the peak would give in that time."""
        peak = self.device.bf16_tflops if self.config.train.dtype == "bf16" else self.device.f32_tflops
        return self.flops.total / (step_s * self.layout.ranks * peak * TFLOP)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in numbers and names that JSON has."""
        return {
            "parameters": {
                "total": self.shapes.total,
                "active_in_layers": self.shapes.active_in_layers,
            },
            "layout": asdict(self.layout) | {"replicas": self.layout.replicas},
            "tokens_per_step": self.tokens,
            "dtype": self.config.train.dtype,
            "accelerator": asdict(self.device),
            "shares": asdict(self.shares),
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},
            "fits": self.fits,
            "collectives": [asdict(c) | {"sent": c.sent} for c in self.messages],
            "flops_per_step": asdict(self.flops) | {"total": self.flops.total},
            "seconds": {
                "parts": self.times.compute | self.times.wire,
                "parts_not_hidden": self.times.exposed,
                "in_order": self.times.in_order,
                "expected": self.times.expected,
                "overlapped": self.times.overlapped,
            },
            "mfu": {
                name: self.mfu(getattr(self.times, name)) for name in ("in_order", "expected", "overlapped")
            },
            "tokens_per_s": self.tokens / self.times.expected,
            "bound": self.times.bound,
            "step_s_by_busiest_load": [{"load": load, "step_s": s} for load, s in self.crowds],
        }


def make_plan(
    config: Config,
    shapes: Shapes,
    layout: Layout,
    device: Accelerator,
    shares: Shares,
    loads: Sequence[float] = LOADS,
) -> Plan:
    messages = collectives(config, shapes, layout)
    c = config.model
    most = c.num_experts / min(c.layer_top_k)  # a token has but one row for an expert
    crowds = [
        (float(load), _step_under(config, shapes, layout, device, shares, load).expected)
        for load in loads
        if load <= most and c.num_experts > 1
    ]
    return Plan(
        config, shapes, layout, device, shares, memory(config, shapes, layout), messages,
        flops(config, shapes, layout.ranks), times(config, shapes, layout, messages, device, shares), crowds,
    )  # fmt: skip


def _step_under(
    config: Config, shapes: Shapes, layout: Layout, device: Accelerator, shares: Shares, load: float
) -> Times:
    messages = collectives(config, shapes, layout, load=load)
    return times(config, shapes, layout, messages, device, shares, load)
