"""`sigma plan`: the plan of one configuration as tables or JSON, or the page of several."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sigma_train.console import say
from sigma_train.options import ConfigFile, Dtype, Overrides, Preset

if TYPE_CHECKING:
    from rich.console import Console

    from sigma_train.accelerators import Accelerator
    from sigma_train.plan import Plan
    from sigma_train.plan_time import Shares


def plan(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, max=1 << 20, help="how many devices")] = None,
    expert_ranks: Annotated[
        int | None, typer.Option(min=1, help="ranks that share one set of experts; all where not given")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="same as --set train.batch_size=N")] = None,
    dtype: Dtype = None,
    accelerator: Annotated[str, typer.Option(help="A100, H100, H200, B200 or MI300X")] = "H200",
    tflops: Annotated[float | None, typer.Option(help="peak of dense products in the run's dtype")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="memory of a device, 1e9 bytes")] = None,
    memory_gb_s: Annotated[float | None, typer.Option(help="its bandwidth")] = None,
    node_gb_s: Annotated[float | None, typer.Option(help="one way, of a device to its node's others")] = None,
    network_gb_s: Annotated[float | None, typer.Option(help="one way, of a device out of its node")] = None,
    node_ranks: Annotated[int | None, typer.Option(min=1, help="devices of a node")] = None,
    efficiency: Annotated[float | None, typer.Option(help="share of the peak, experts' products")] = None,
    dense_efficiency: Annotated[float | None, typer.Option(help="the same, all other products")] = None,
    memory_share: Annotated[float | None, typer.Option(help="share of the memory's bandwidth")] = None,
    link_share: Annotated[float | None, typer.Option(help="share of a link's bandwidth")] = None,
    latency_us: Annotated[
        float | None, typer.Option(help="of a message, for each doubling of the ranks")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="all figures as one JSON object")] = False,
    page: Annotated[
        Path | None,
        typer.Option(help="no plan of one: write the page of 20 B and 200 B at 64 to 2,048 ranks"),
    ] = None,
) -> None:
    """Say what a training configuration holds, sends and takes on so many ranks, without any of them."""
    import json as json_module

    from rich.console import Console

    from sigma_train.accelerators import accelerator as named
    from sigma_train.config import load_config
    from sigma_train.errors import WrongInput

    rates = {
        "experts": efficiency, "dense": dense_efficiency, "memory": memory_share, "link": link_share,
        "latency_us": latency_us,
    }  # fmt: skip

    def device(dtype: str) -> "Accelerator":
        peak = {} if tflops is None else {f"{dtype}_tflops": tflops}  # the router's stays: f32 in both
        return _overridden(
            named(accelerator), peak, memory_gb=memory_gb, memory_gb_s=memory_gb_s, node_gb_s=node_gb_s,
            network_gb_s=network_gb_s, node_ranks=node_ranks,
        )  # fmt: skip

    if page is not None:
        if (
            any(x is not None for x in (preset, config, overrides, ranks, expert_ranks, batch_size, dtype))
            or json
        ):
            raise WrongInput(
                "--page plans its own settings: it takes options of the accelerator and shares alone"
            )
        from sigma_train.plan_page import write_page

        typer.echo(f"wrote {write_page(page, device('bf16'), _shares('bf16', rates))}")
        return
    if ranks is None:
        raise WrongInput("--ranks must be given, the number of devices to plan for")
    options = {"batch_size": batch_size, "dtype": dtype}
    train = {key: value for key, value in options.items() if value is not None}
    cfg = load_config(preset, config, list(overrides or []), {"train": train})

    hardware = device(cfg.train.dtype)

    from sigma_train.plan import make_plan
    from sigma_train.plan_shapes import layout, shapes

    shares = _shares(cfg.train.dtype, rates)
    where = layout(cfg, ranks, expert_ranks, hardware.node_ranks)
    made = make_plan(cfg, shapes(cfg), where, hardware, shares)
    if json:
        typer.echo(json_module.dumps(made.as_dict(), indent=2))
    else:
        show(made, Console())


def _overridden(device: "Accelerator", peak: dict[str, float], **given: float | None) -> "Accelerator":
    from sigma_train.errors import WrongInput

    values = peak | {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            option = "tflops" if name in peak else name.replace("_", "-")
            raise WrongInput(f"--{option} must be a number above 0, found {value}")
    changed = ", ".join(f"{name} {value:g} as given" for name, value in values.items())
    source = f"{device.source}; {changed}" if changed else device.source
    return replace(device, **values, source=source)  # type: ignore[arg-type]


def _shares(dtype: str, given: dict[str, float | None]) -> "Shares":
    from sigma_train.errors import WrongInput
    from sigma_train.plan_time import MEASURED

    options = {
        "experts": "efficiency", "dense": "dense-efficiency", "memory": "memory-share", "link": "link-share",
    }  # fmt: skip
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if name == "latency_us" and not (math.isfinite(value) and value >= 0):
            raise WrongInput(f"--latency-us must be a number of at least 0, found {value}")
        if name in options and not 0 < value <= 1:
            raise WrongInput(f"--{options[name]} must be a number above 0 and at most 1, found {value}")
    return replace(MEASURED[dtype], **values)


def show(made: "Plan", console: "Console") -> None:
    """Four tables, and what they assume."""
    from sigma_train.plan_time import TFLOP

    p, where, device = made, made.layout, made.device
    nodes = math.ceil(where.ranks / where.node_ranks)
    console.print(
        f"[bold]{_count(p.shapes.total)} parameters[/bold], {_count(p.shapes.active_in_layers)} of the layers "
        f"active a token; {where.ranks} x {device.name} in {nodes} node{'s' * (nodes > 1)}; "
        f"{where.expert_ranks} ranks share a set of experts, {where.replicas} "
        f"set{'s' * (where.replicas > 1)}; {p.config.train.dtype}; {p.tokens:,} tokens a step",
        highlight=False,
    )
    _show_memory(p, console)
    if p.messages:
        _show_wire(p, console)
    _show_time(p, console)
    console.print(
        f"A step: {p.flops.total / TFLOP:,.4g} TFLOP, MFU {p.mfu(p.times.expected):.1%}, "
        f"{p.tokens / p.times.expected:,.0f} tokens/s; most of it: [bold]{p.times.bound}[/bold]",
        highlight=False,
    )
    if p.crowds:
        _show_crowds(p, console)
    for line in assumptions(p):
        say(console, f"- {line}", "dim")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _bytes(size: float) -> str:
    from rich.filesize import decimal

    return decimal(round(size), precision=2)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds >= 1e-2 else f"{seconds * 1e3:.3g}"


def _table(console: "Console", title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


MEMORY_ROWS = {
    "weights": ("weights, f32", "exact"),
    "gradients": ("gradients, f32", "exact"),
    "moments": ("AdamW's moments, f32", "exact"),
    "activations": ("activations of a micro-step", "exact if balanced"),
    "copies": ("weights in bf16 for the backward", "exact"),
    "logits": ("logits and their gradients", "estimate"),
    "gathered": ("gathered weights, gradients to scatter", "estimate"),
    "exchange": ("rows sent and received", "estimate"),
}


def _show_memory(p: "Plan", console: "Console") -> None:
    from sigma_train.plan import USABLE

    rows = [[name, _bytes(getattr(p.memory, key)), kind] for key, (name, kind) in MEMORY_ROWS.items()]
    verdict = "fits" if p.fits else "DOES NOT FIT"
    usable = USABLE * p.device.memory_gb
    room = f"{verdict}: {usable:,.0f} GB of {p.device.memory_gb:,.0f} usable"
    rows.append(["all", _bytes(p.memory.total), room])
    _table(console, "Memory of the fullest rank", ["what", "bytes", ""], rows)


def _show_wire(p: "Plan", console: "Console") -> None:
    rows = []
    for c in p.messages:
        most = "" if c.most is None else _bytes(c.most)
        rows.append([c.what, f"{c.calls:,}", _bytes(c.handed), _bytes(c.inside), _bytes(c.outside), most])
    title = "Messages of a rank and step"
    _table(console, title, ["what", "calls", "handed over", "sent in node", "out of it", "at most"], rows)


def _show_time(p: "Plan", console: "Console") -> None:
    whole = p.times.compute | p.times.wire
    exposed = p.times.exposed
    rows: list[list[Any]] = [[part, _ms(s), _ms(exposed[part])] for part, s in whole.items()]
    rows.append(["a step", _ms(p.times.in_order), _ms(p.times.expected)])
    rows.append(["MFU", f"{p.mfu(p.times.in_order):.1%}", f"{p.mfu(p.times.expected):.1%}"])
    _table(console, "Time, ms", ["part", "nothing hidden", "FSDP hidden: expected"], rows)
    say(
        console,
        f"If everything that can overlap did: {_ms(p.times.overlapped)} ms, "
        f"MFU {p.mfu(p.times.overlapped):.1%}",
    )


def _show_crowds(p: "Plan", console: "Console") -> None:
    base = p.times.expected
    rows = [[f"{load:g}", _ms(s), f"{s / base:.2f}"] for load, s in p.crowds]
    _table(
        console,
        "A step by the load of every layer's busiest expert",
        ["over the mean", "ms", "over balanced"],
        rows,
    )


def assumptions(p: "Plan") -> list[str]:
    """What stands behind the figures, and where each comes from."""
    from sigma_train.plan_time import MEASURED

    s, d = p.shares, p.device
    measured = MEASURED[p.config.train.dtype]
    is_measured = (s.experts, s.dense, s.memory) == (measured.experts, measured.dense, measured.memory)
    whence = (
        "measured on one H200 (docs/plan.md), whatever the accelerator" if is_measured else "partly as given"
    )
    return [
        f"{d.name}: {d.source}",
        f"shares of the peak: experts' products {s.experts:.3g}, other products {s.dense:.3g}, memory {s.memory:.3g}: "
        f"{whence}",
        f"shares of links {s.link:g} and {s.latency_us:g} us a message and doubling of ranks: assumed",
        "FLOPs: 6 x (active matrices) x tokens + 6 x layers x sequence x heads x head size x tokens",
        "a model on paper: nothing of this size has run",
    ]
