"""The name of this machine's processor."""

import platform
import re
from pathlib import Path


def processor_name() -> str:
    """The model's; of Linux on x86-64 and some others from /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
