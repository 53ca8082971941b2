"""What this machine is and which backend runs each operation on it."""

import platform
from pathlib import Path

import torch

import sigma_kernels as sk


def report() -> str:
    """The lines that `sigma doctor` prints."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    supported = sk._C.supported_isas()
    isa = sk._C.isa()
    lines = [
        f"sigma-kernels  {sk.__version__}",
        f"torch          {torch.__version__}, {torch.get_num_threads()} threads",
        f"python         {platform.python_version()} on {platform.machine()}",
        f"isa            {isa} ({sk._C.lanes()} lanes); this processor supports {', '.join(supported)}",
        f"huge pages     {huge.read_text().strip() if huge.exists() else 'not offered by this system'}",
        f"cuda           {_cuda()}",
        "",
    ]
    if isa == "base":
        lines.append(f"This is the baseline variant{_baseline(platform.machine())}\n")
    for op, rows in sk.backends().items():
        lines.append(f"{op:22} " + "; ".join(f"{name}: {what}" for name, what in rows.items()))
    return "\n".join(lines)


def _baseline(machine: str) -> str:
    if machine == "aarch64":
        return ", NEON code: the only one on aarch64."
    return ": slow, for processors that no other variant knows."


def _cuda() -> str:
    native = getattr(sk._C, "cuda", None)
    if native is None:
        built = "kernels not built (pip install . -C cmake.define.SIGMA_CUDA=ON)"
    else:
        driver = native.driver_version()
        seen = f"driver for CUDA {driver}" if driver else "no driver here"
        built = f"kernels built with CUDA {native.runtime_version()}, {seen}"
    return f"{built}; {'a GPU' if torch.cuda.is_available() else 'none'} seen by torch"
