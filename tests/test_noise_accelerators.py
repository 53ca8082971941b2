"""Pollers of accelerators against fakes of NVML and AMD SMI that replay a script."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sigma_noise import accelerators
from sigma_noise.accelerators import NVML_REASONS, Poller, amd, nvidia
from sigma_noise.attribution import attribute_trace
from sigma_noise.lost import Lost
from sigma_noise.trace import Trace

SECOND = 1_000_000_000


class NotSupported(Exception):
    pass


class Script:
    """A clock, and what holds at each reading of it."""

    def __init__(self, steps):
        self.steps, self.at = steps, -1

    def clock(self):
        self.at = min(self.at + 1, len(self.steps))
        return self.at * SECOND

    @property
    def now(self):
        return self.steps[min(self.at, len(self.steps) - 1)]


def fake_nvml(script, *, devices=1, old=False, refuses=()):
    def reasons(handle):
        return script.now[handle]

    def violation(handle, policy):
        if "violation" in refuses:
            raise NotSupported("Not Supported")
        return SimpleNamespace(referenceTime=0, violationTime=1000 * policy + script.at)

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: devices,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980, 2: 2619}[kind],
        nvmlDeviceGetTemperature=lambda handle, sensor: 40 + script.at,
        nvmlDeviceGetPowerUsage=lambda handle: 350_500,
        nvmlDeviceGetViolationStatus=violation,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        NVML_PERF_POLICY_POWER=0,
        NVML_PERF_POLICY_THERMAL=1,
    )
    name = "nvmlDeviceGetCurrentClocks" + ("Throttle" if old else "Event") + "Reasons"
    setattr(nvml, name, reasons)
    return nvml


def polled(devices, script):
    poller = Poller(devices, clock=script.clock)
    for _ in script.steps:
        # All devices of a poll are asked at the same step of the script.
        at = script.at + 1
        for _device in devices:
            script.at = at - 1
        poller.poll()
    poller.close()
    return poller


def spans(poller, name):
    series = poller.rows(0)[0, "event", name]
    return list(zip(series.start_ns // SECOND, series.end_ns // SECOND, strict=True))


@pytest.mark.parametrize("old", [False, True], ids=["event reasons", "throttle reasons"])
def test_nvml_intervals_are_exact(old):
    """Defends: bits of NVML taken for others, intervals that miss their begin, end or a gap, an open one lost."""
    steps = [0x0, 0x4, 0x4 | 0x20, 0x20, 0x0, 0x20, 0x1, 0x48, 0x48]
    script = Script([{0: bits} for bits in steps])
    poller = polled(nvidia(fake_nvml(script, old=old)), script)
    events = {name for _, kind, name in poller.rows(0) if kind == "event"}
    assert events == {
        "gpu0 " + r for r in ("sw power cap", "sw thermal", "idle", "hw slowdown", "hw thermal")
    }
    assert spans(poller, "gpu0 sw power cap") == [(1, 3)]
    assert spans(poller, "gpu0 sw thermal") == [(2, 4), (5, 6)]
    assert spans(poller, "gpu0 idle") == [(6, 7)]
    assert spans(poller, "gpu0 hw thermal") == [(7, 9)]
    assert spans(poller, "gpu0 hw slowdown") == [(7, 9)]


def test_every_bit_of_nvml_has_its_name():
    """Defends: the table, against the numbers of nvml.h (section 0x1 to 0x100), and a bit that is newer than it."""
    for bit in range(12):
        script = Script([{0: 1 << bit}])
        poller = polled(nvidia(fake_nvml(script)), script)
        (name,) = [n for _, kind, n in poller.rows(0) if kind == "event"]
        assert name == "gpu0 " + NVML_REASONS.get(1 << bit, f"reason {1 << bit:#x}")
    assert NVML_REASONS[0x8] == "hw slowdown"
    assert NVML_REASONS[0x80] == "power brake"


def test_nvml_gauges():
    script = Script([{0: 0}] * 3)
    rows = polled(nvidia(fake_nvml(script)), script).rows(2)
    assert rows[2, "counter", "gpu0_sm_mhz"].value.tolist() == [1980.0] * 3
    assert rows[2, "counter", "gpu0_memory_mhz"].value.tolist() == [2619.0] * 3
    assert rows[2, "counter", "gpu0_temperature_c"].value.tolist() == [40.0, 41.0, 42.0]
    assert rows[2, "counter", "gpu0_power_w"].value == pytest.approx([350.5] * 3)
    assert rows[2, "counter", "gpu0_thermal_violation_ns"].value.tolist() == [1000.0, 1001.0, 1002.0]
    assert rows[2, "counter", "gpu0_sm_mhz"].start_ns.tolist() == [0, SECOND, 2 * SECOND]


def test_a_device_that_cannot_say_something():
    """Defends: a refused call made at every poll, or that hides what the device can say."""
    script = Script([{0: 0x20}] * 4)
    poller = polled(nvidia(fake_nvml(script, refuses=("violation",))), script)
    assert poller.info["unread"]["gpu0 thermal_violation_ns"] == "NotSupported: Not Supported"
    assert spans(poller, "gpu0 sw thermal") == [(0, 4)]
    assert len(poller.rows(0)[0, "counter", "gpu0_sm_mhz"]) == 4


def test_two_devices_have_intervals_of_their_own():
    """Defends: gpu1's reason ended by gpu10's silence, or by the other device's."""
    bits = [{1: 0x4, 10: 0x20}, {1: 0, 10: 0x20}, {1: 0x4, 10: 0x20}]
    script = Script([{i: step.get(i, 0) for i in range(11)} for step in bits])
    devices = [nvidia(fake_nvml(script, devices=11))[i] for i in (1, 10)]
    poller = Poller(devices, clock=lambda: script.at * SECOND)
    for step in range(3):
        script.at = step
        poller.poll()
    script.at = 3
    poller.close()
    assert spans(poller, "gpu1 sw power cap") == [(0, 1), (2, 3)]
    assert spans(poller, "gpu10 sw thermal") == [(0, 3)]


def fake_amd(script, *, has_violations):
    def violations(handle):
        if not has_violations:
            raise NotSupported("AMDSMI_STATUS_NOT_SUPPORTED")
        keys = accelerators.AMD_REASONS
        return {f"active_{key}": (key in script.now) if key != "hbm_thrm" else "N/A" for key in keys}

    def metrics(handle):
        status = "N/A" if has_violations else script.now
        return {
            "current_gfxclk": 2100,
            "current_uclk": "N/A",
            "temperature_hotspot": 61,
            "current_socket_power": "N/A",
            "average_socket_power": 540,
            "indep_throttle_status": status,
        }

    return SimpleNamespace(
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handles=lambda: ["h"],
        amdsmi_get_violation_status=violations,
        amdsmi_get_gpu_metrics_info=metrics,
    )


def test_amd_violations_are_exact():
    script = Script([set(), {"ppt_pwr"}, {"ppt_pwr", "socket_thrm"}, set(), {"vr_thrm"}])
    poller = polled(amd(fake_amd(script, has_violations=True)), script)
    assert spans(poller, "gpu0 package power") == [(1, 3)]
    assert spans(poller, "gpu0 socket thermal") == [(2, 3)]
    assert spans(poller, "gpu0 regulator thermal") == [(4, 5)]
    assert (0, "event", "gpu0 memory thermal") not in poller.rows(0)
    assert poller.rows(0)[0, "counter", "gpu0_power_w"].value.tolist() == [540.0] * 5
    assert (0, "counter", "gpu0_memory_mhz") not in poller.rows(0)


def test_amd_throttle_bits_are_exact():
    """Defends: devices before MI300, which refuse the violations and have bits by groups of 16."""
    script = Script([0, 1 << 1, 1 << 36, 1 << 36 | 1 << 22, 1 << 56, "N/A"])
    poller = polled(amd(fake_amd(script, has_violations=False)), script)
    assert spans(poller, "gpu0 power") == [(1, 2)]
    assert spans(poller, "gpu0 thermal") == [(2, 4)]
    assert spans(poller, "gpu0 current") == [(3, 4)]
    assert spans(poller, "gpu0 other") == [(4, 5)]
    assert "NOT_SUPPORTED" in poller.info["unread"]["gpu0 violations"]


def test_what_is_absent_has_a_reason(monkeypatch):
    """Defends: libraries that are missing or find no driver, passed over in silence or fatal."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def no_driver():
        raise NotSupported("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "amdsmi", SimpleNamespace(amdsmi_init=no_driver))
    with Poller() as poller:
        pass
    assert poller.rows(0) == {}
    assert poller.info["devices"] == []
    assert poller.info["unread"] == {"pynvml": "not installed", "amdsmi": "NotSupported: Driver Not Loaded"}


def test_two_vendors_have_names_of_their_own(monkeypatch):
    """Defends: gpu0 of both, whose gauges and reasons are then one series."""
    script = Script([{0: 0x20, 1: 0}])
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(script, devices=2))
    monkeypatch.setitem(sys.modules, "amdsmi", fake_amd(script, has_violations=True))
    devices, absent = accelerators.find()
    assert absent == {}
    assert [(d.name, type(d).__name__) for d in devices] == [
        ("nvidia0", "Nvidia"), ("nvidia1", "Nvidia"), ("amd0", "Amd"),
    ]  # fmt: skip
    script.at = 0
    rows = polled(devices, script).rows(0)
    assert rows[0, "counter", "nvidia0_sm_mhz"].value.tolist() == [1980.0]
    assert rows[0, "counter", "amd0_sm_mhz"].value.tolist() == [2100.0]
    assert (0, "event", "nvidia0 sw thermal") in rows
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert [d.name for d in accelerators.find()[0]] == ["gpu0"]


def test_a_device_that_falls_off_the_bus():
    """Defends: a throttle that lasts for ever because the device stopped answering; a measurement that ends with it."""

    class Falls:
        name, unread = "gpu0", {}
        polls = 0

        def gauges(self):
            self.polls += 1
            if self.polls > 2:
                raise NotSupported("GPU is lost")
            return {"sm_mhz": 1000.0}

        def reasons(self):
            return {"hw thermal"}

    script = Script([0] * 4)
    poller = polled([Falls()], script)
    assert spans(poller, "gpu0 hw thermal") == [(0, 2)]
    assert poller.info["unread"] == {"gpu0": "NotSupported: GPU is lost"}


def test_on_its_thread():
    script = Script([{0: 0x40}])
    with Poller(nvidia(fake_nvml(script)), period_s=0.01) as poller:
        pass
    assert poller.info["ticks"] >= 2
    assert poller.info["cost_s"] > 0
    assert len(poller.rows(0)[0, "event", "gpu0 hw thermal"]) == 1


def test_throttling_is_named():
    """Defends: the whole way: bits replayed, a file's rows, lost time joined to them."""
    script = Script([{0: 0x40 if 3 <= step < 7 else 0x1} for step in range(20)])
    poller = polled(nvidia(fake_nvml(script)), script)
    start = np.arange(0, 20 * SECOND, SECOND // 10)
    slow = (start >= 3 * SECOND) & (start < 7 * SECOND)
    lost = Lost(start, start + SECOND // 10, np.where(slow, 0.03, 0.0), (0, 20 * SECOND))
    found = attribute_trace(Trace({}, {0: {}}, poller.rows(0)), 0, lost)
    assert found.named == "gpu0 hw thermal"
    assert found.share("gpu0 hw thermal") == pytest.approx(1.0)
