"""What accelerators say about themselves while they are measured: clocks, temperature, power, and why they slow down.

Reasons to slow down are flags of the moment, so they are polled, and become events "gpu0 sw thermal" from the first
poll that saw the flag to the first that did not, which is exact to one gap between polls.  Accumulated violation time,
where a driver has it, is kept as a counter beside them: what falls between polls is in there.

The libraries (pynvml of nvidia-ml-py, amdsmi) are optional and are imported on use: their command line programs,
started five times a second, would be noise of their own.
"""

import importlib
import time
from collections.abc import Callable, Collection
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np

from sigma_noise.ticker import Ticker
from sigma_noise.trace import Key, Series

# Bits of nvmlDeviceGetCurrentClocksEventReasons (NVML, group nvmlClocksEventReasons).
NVML_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "sw power cap",
    0x8: "hw slowdown",
    0x10: "sync boost",
    0x20: "sw thermal",
    0x40: "hw thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
NVML_VIOLATIONS = {"power": "NVML_PERF_POLICY_POWER", "thermal": "NVML_PERF_POLICY_THERMAL"}
# Flags of amdsmi_get_violation_status, on MI300 and later.
AMD_REASONS = {
    "prochot_thrm": "processor hot",
    "ppt_pwr": "package power",
    "socket_thrm": "socket thermal",
    "vr_thrm": "regulator thermal",
    "hbm_thrm": "memory thermal",
}
# Groups of bits of indep_throttle_status, on MI100, MI200 and Navi (SMU_THROTTLER_* of the amdgpu driver).
AMD_GROUPS = {0: "power", 16: "current", 32: "thermal", 48: "other"}


class Device(Protocol):
    """One accelerator: what it says now, by name; reasons to slow down that hold now; what it cannot say, and why."""

    name: str
    unread: dict[str, str]

    def gauges(self) -> dict[str, float]: ...

    def reasons(self) -> set[str]: ...


class Poller:
    """Asks all devices about every `period_s`, on a thread of its own.

    with Poller() as poller:
        ...
    rows, info = poller.rows(rank), poller.info
    """

    def __init__(
        self,
        devices: list[Device] | None = None,
        *,
        period_s: float = 0.15,
        seed: int = 0,
        cpus: Collection[int] = (),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.absent: dict[str, str] = {}
        if devices is None:
            devices, self.absent = find()
        self._devices, self._clock = devices, clock
        self._ticker = Ticker(self.poll, period_s, seed, cpus)
        self._gauges: dict[str, list[tuple[int, float]]] = {}
        self._since: dict[str, int] = {}
        self._spans: dict[str, list[tuple[int, int]]] = {}
        self._failed: dict[str, str] = {}

    def __enter__(self) -> "Poller":
        if self._devices:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._devices:
            self._ticker.stop()
        self.close()

    @property
    def info(self) -> dict[str, Any]:
        unread = dict(self.absent) | self._failed
        for device in self._devices:
            unread |= {f"{device.name} {what}": why for what, why in device.unread.items()}
        return self._ticker.account | {"devices": [d.name for d in self._devices], "unread": unread}

    def poll(self) -> None:
        """One look at every device.  What a library raises is no reason to end a measurement: it is noted."""
        for device in self._devices:
            now = self._clock()
            try:
                for what, value in device.gauges().items():
                    self._gauges.setdefault(f"{device.name}_{what}", []).append((now, value))
                self._note(device.name, device.reasons(), now)
            except Exception as error:  # NVMLError, AmdSmiException: classes of modules that may be absent
                self._failed.setdefault(device.name, f"{type(error).__name__}: {error}")
                self._note(device.name, set(), now)

    def close(self) -> None:
        """Reasons that still hold end now."""
        now = self._clock()
        for name, began in self._since.items():
            self._spans.setdefault(name, []).append((began, now))
        self._since = {}

    def rows(self, rank: int) -> dict[Key, Series]:
        found: dict[Key, Series] = {}
        for name, said in self._gauges.items():
            stamps = np.array([at for at, _ in said], np.int64)
            found[rank, "counter", name] = Series(stamps, stamps, np.array([v for _, v in said]))
        for name, spans in self._spans.items():
            start, end = np.array(spans, np.int64).T
            found[rank, "event", name] = Series(start.copy(), end.copy(), np.ones(len(start)))
        return found

    def _note(self, device: str, reasons: set[str], now: int) -> None:
        names = {f"{device} {reason}" for reason in reasons}
        for name in names - self._since.keys():
            self._since[name] = now
        for name in [n for n in self._since if n.startswith(f"{device} ") and n not in names]:
            self._spans.setdefault(name, []).append((self._since.pop(name), now))


def find() -> tuple[list[Device], dict[str, str]]:
    """All accelerators that a library knows, numbered as it numbers them, and why there are no others.

    gpu0, gpu1, ... of one vendor; where there are two, nvidia0 and amd0 are different devices.
    """
    of_vendor: dict[str, list[Any]] = {}
    absent: dict[str, str] = {}
    for library, vendor, of_library in (("pynvml", "nvidia", nvidia), ("amdsmi", "amd", amd)):
        try:
            of_vendor[vendor] = of_library(importlib.import_module(library))
        except ImportError:
            absent[library] = "not installed"
        except Exception as error:  # no driver: NVMLError; no shared library: OSError, KeyError
            absent[library] = f"{type(error).__name__}: {error}"
    present = {vendor: devices for vendor, devices in of_vendor.items() if devices}
    for vendor, devices in present.items() if len(present) > 1 else ():
        for device in devices:
            device.name = device.name.replace("gpu", vendor)
    return [device for devices in present.values() for device in devices], absent


def nvidia(nvml: ModuleType) -> list[Device]:
    nvml.nvmlInit()
    return [
        Nvidia(nvml, nvml.nvmlDeviceGetHandleByIndex(i), f"gpu{i}") for i in range(nvml.nvmlDeviceGetCount())
    ]


def amd(smi: ModuleType) -> list[Device]:
    smi.amdsmi_init()
    return [Amd(smi, handle, f"gpu{i}") for i, handle in enumerate(smi.amdsmi_get_processor_handles())]


class _Asker:
    """Calls that a driver refuses once are not made again; the refusal is kept in `unread`."""

    def __init__(self) -> None:
        self.unread: dict[str, str] = {}

    def ask(self, what: str, call: Callable[[], Any]) -> Any:
        """None if it was or is refused."""
        if what in self.unread:
            return None
        try:
            return call()
        except Exception as error:  # each library has an exception of its own
            self.unread[what] = f"{type(error).__name__}: {error}"
            return None


class Nvidia(_Asker):
    def __init__(self, nvml: ModuleType, handle: Any, name: str) -> None:
        super().__init__()
        self.name, self._nvml, self._handle = name, nvml, handle
        # The name before driver 535; the number is the same.
        self._get_reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or (
            nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        )

    def gauges(self) -> dict[str, float]:
        nvml, handle = self._nvml, self._handle
        asked = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) * 1e-3,
        }
        for what, policy in NVML_VIOLATIONS.items():
            asked[f"{what}_violation_ns"] = lambda p=policy: (
                nvml.nvmlDeviceGetViolationStatus(handle, getattr(nvml, p)).violationTime
            )
        said = {what: self.ask(what, call) for what, call in asked.items()}
        return {what: float(value) for what, value in said.items() if value is not None}

    def reasons(self) -> set[str]:
        bits = self.ask("reasons", lambda: self._get_reasons(self._handle)) or 0
        known = {reason for bit, reason in NVML_REASONS.items() if bits & bit}
        unknown = bits & ~sum(NVML_REASONS)
        return known | ({f"reason {unknown:#x}"} if unknown else set())


class Amd(_Asker):
    def __init__(self, smi: ModuleType, handle: Any, name: str) -> None:
        super().__init__()
        self.name, self._smi, self._handle = name, smi, handle
        self._metrics: dict[str, Any] = {}

    def gauges(self) -> dict[str, float]:
        self._metrics = self.ask("metrics", lambda: self._smi.amdsmi_get_gpu_metrics_info(self._handle)) or {}
        wanted = {
            "sm_mhz": ("current_gfxclk",),
            "memory_mhz": ("current_uclk",),
            "temperature_c": ("temperature_hotspot",),
            "power_w": ("current_socket_power", "average_socket_power"),
        }
        found = {}
        for what, keys in wanted.items():
            numbers = [n for key in keys if (n := _number(self._metrics.get(key))) is not None]
            if numbers:
                found[what] = numbers[0]
        return found

    def reasons(self) -> set[str]:
        violations = self.ask("violations", lambda: self._smi.amdsmi_get_violation_status(self._handle))
        if violations is not None:
            return {reason for key, reason in AMD_REASONS.items() if violations.get(f"active_{key}") is True}
        bits = _number(self._metrics.get("indep_throttle_status"))
        return {group for low, group in AMD_GROUPS.items() if int(bits or 0) >> low & 0xFFFF}


def _number(said: Any) -> float | None:
    """AMD SMI says "N/A" for what a device lacks, and true or false is no number."""
    return float(said) if isinstance(said, int | float) and not isinstance(said, bool) else None
