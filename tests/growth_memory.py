"""What growth adds to a process's peak of memory, which is limited; in a process of its own, warmed by a small growth.

In a module, as a forked process imports it.
"""

import json
import resource
from pathlib import Path

import torch
from sigma_train.config import load_config
from sigma_train.grow_folder import Folder, grow_folder
from sigma_train.grow_run import Base, grow_run
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_pieces import Growth


def status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def allow(more: int) -> None:
    """An allocation fails once the process has so many bytes more than now, which files that it maps are not."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + more, most))


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
    """`large` grown after `small`, both in `folder`, in less memory than `large` has bytes: peak_bytes to peak.json."""
    torch.set_num_threads(1)
    load_config(None, None, [])
    grow(kind, folder / "small", folder / "small-grown")
    before = status_bytes("VmHWM")
    allow(sum(file.stat().st_size for file in (folder / "large").rglob("*") if file.is_file()) * 3 // 4)
    grow(kind, folder / "large", folder / "large-grown")
    (folder / "peak.json").write_text(json.dumps({"peak_bytes": status_bytes("VmHWM") - before}))
