"""What growth adds to a process's peak of memory; in a process of its own, which a small growth has warmed.

In a module, as a forked process imports it.
"""

import json
from pathlib import Path

import torch
from sigma_train.config import load_config
from sigma_train.grow_folder import Folder, grow_folder
from sigma_train.grow_run import Base, grow_run
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth


def peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def grow(kind: str, source: Path, out: Path) -> None:
    if kind == "run":
        base = Base.named(source)
        grow_run(base, growth(base.config.model.num_layers), "reset", out)
    else:
        folder = Folder.read(source)
        grow_folder(folder, growth(folder.settings["num_hidden_layers"]), 0, 1 << 40, out)


def growth(n: int) -> Growth:
    return Growth(LayerGrowthPlan.interposition(n), 2)


def measure(_: int, kind: str, folder: Path) -> None:
    """`large` grown after `small`, both in `folder`: peak_bytes to peak.json."""
    torch.set_num_threads(1)
    load_config(None, None, [])
    grow(kind, folder / "small", folder / "small-grown")
    before = peak_kb()
    grow(kind, folder / "large", folder / "large-grown")
    (folder / "peak.json").write_text(json.dumps({"peak_bytes": (peak_kb() - before) * 1024}))
