"""bench/ on a GPU as far as a CPU can show it: the clock, the peers' interfaces, the suite on no real GPU."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_peers
import pytest
import torch
from sigma_cli import bench
from sigma_train.errors import WrongInput, verdict
from support import NO_OTHER_PLUGINS, OF_BENCH

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import clock
import oracle
import peers_gpu
import shapes
from race import OURS, CannotRun, Race, first_calls

ROOT = Path(__file__).parent.parent
HZ, FLUSH_MS = 10**9, 1.0


class Stream:
    """torch.cuda with one stream in ms of its own, on which work takes the time that it says; and a list of it."""

    def __init__(self):
        self.ms, self.log = 0.0, []

    def run(self, what, ms):
        self.ms += ms
        self.log.append(what)

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)

        def record():
            event.at = self.ms
            self.log.append("event")

        event.record, event.elapsed_time = record, lambda end: end.at - event.at
        return event

    def _sleep(self, cycles):
        self.run("hold", cycles / HZ * 1e3)

    def synchronize(self):
        self.log.append("wait")

    def get_device_properties(self, device):
        return SimpleNamespace(name="fake", major=9, minor=0, multi_processor_count=1, total_memory=2**30,
                               L2_cache_size=500 * 2**20)  # fmt: skip

    def max_memory_allocated(self):
        return 2**20


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(clock.Gpu, "device", torch.device("meta"))
    stream = Stream()
    gpu = clock.Gpu(stream)
    assert gpu.buffer.nbytes == 1000 * 2**20, "twice the L2"
    gpu.buffer = SimpleNamespace(nbytes=gpu.buffer.nbytes, zero_=lambda: stream.run("flush", FLUSH_MS))
    stream.log.clear()
    stream.ms = 20.0  # whatever came before: how sums of floats round is part of the fake
    return gpu


def test_a_call_on_a_gpu_is_timed_alone_behind_a_flush(gpu):
    """Defends: a flush or a hold inside the interval, a warm L2, a turn shorter than an event can tell."""
    turn = gpu.turn(lambda: gpu.cuda.run("call", 0.05), 1)
    assert gpu.cuda.log[: clock.WARM_UPS] == ["call"] * clock.WARM_UPS
    gpu.cuda.log.clear()
    before = gpu.now()
    turn()
    assert gpu.now() - before == pytest.approx(5e-5)
    assert gpu.cuda.log == ["wait", "hold", *["flush", "event", "call", "event"] * 40, "wait"]


@pytest.mark.parametrize(
    "ms, calls, queued", [(1e-4, 1, 64), (0.05, 20, 60), (0.5, 20, 20), (30, 1, 1), (1, 100, 100)]
)
def test_a_turn_is_scaled_to_the_calls_asked_for(gpu, ms, calls, queued):
    turn = gpu.turn(lambda: gpu.cuda.run("call", ms), calls)
    gpu.cuda.log.clear()
    turn()
    assert gpu.cuda.log.count("call") == queued
    assert gpu.now() == pytest.approx(calls * ms / 1e3)


def test_a_hold_lasts_twice_as_long_as_the_host_needed_to_queue_a_turn(gpu, monkeypatch):
    """Defends: gaps between launches in the time of short kernels."""
    host = iter(range(1000))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(host) * 0.01)
    slept = []
    gpu.cuda._sleep = lambda cycles: slept.append(cycles / HZ)
    turn = gpu.turn(lambda: gpu.cuda.run("call", 0.5), 1)
    turn()
    assert slept == [0, pytest.approx(0.08)], "4 calls in a turn, 0.01 s to queue each, and as much again"
    monkeypatch.setattr(clock, "MOST_HOLD_S", 0.02)
    gpu.turn(lambda: gpu.cuda.run("call", 0.5), 1)()
    assert slept[-1] == pytest.approx(0.02)


def test_the_order_of_turns_is_the_same_by_either_clock(gpu):
    def order(turn, now):
        ran = []
        rivals = {name: turn(lambda name=name: ran.append(name), 1) for name in "ab"}
        ours = turn(lambda: ran.append(OURS), 1)
        ran.clear()
        race = Race(rivals, rounds=5, clock=now)
        for _ in range(5):
            race.until_ours()
            ours()
        race.finish()
        return [a for i, a in enumerate(ran) if i == 0 or ran[i - 1] != a]

    host = clock.Host()
    on_cpu = order(host.turn, host.now)
    assert on_cpu == order(gpu.turn, gpu.now)
    assert len(on_cpu) > 10


def test_on_a_gpu_second_calls_are_looked_at_and_a_wrong_peer_is_a_line():
    """Defends: everyone that compiles counted as slow; a race lost to one library."""
    compiled = set()
    now = [0.0]

    def call(name):
        def run():
            now[0] += 0.1 if name in compiled else 60
            compiled.add(name)
            if name == "fails":
                raise RuntimeError("no kernel\nfor this device")
            return name

        return run

    def check(who, got):
        assert who != "wrong", "off by 1"

    names = (OURS, "right", "wrong", "fails", "bound_dense")
    _, reasons, slow = first_calls({n: call(n) for n in names}, check, (), lambda: now[0], on_gpu=True)
    assert slow == []
    assert reasons["fails"] == "RuntimeError: no kernel for this device"
    assert reasons["wrong"].startswith("AssertionError: off by 1")
    assert set(reasons) == {"fails", "wrong"}
    for name in (OURS, "bound_dense"):

        def breaks():
            raise RuntimeError("ours")

        with pytest.raises(RuntimeError, match="ours"):
            first_calls({name: breaks}, None, on_gpu=True)


@pytest.mark.parametrize("load", shapes.LOADS)
@pytest.mark.parametrize("E, k", [(5, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("name", [*peers_gpu.LAYERS, *peers_gpu.FORWARD])
def test_a_peer_is_asked_as_its_source_wants_and_answers_as_the_oracle(name, E, k, load, monkeypatch):
    """Defends: transposed or interleaved weights, wrong widths of integers, lost gradients."""
    for module, content in fake_peers.modules().items():
        monkeypatch.setitem(sys.modules, module, content)
    shape = shapes.Shape("test", E=E, k=k, H=32, I=16, T=24)
    x, weights, gate_up, down = shapes.layer_inputs(shape, torch.bfloat16)
    index, grad_out = shapes.choices(shape, load), torch.ones(24, 32, dtype=torch.bfloat16)
    want = oracle.layer(x, weights, gate_up, down, index, grad_out)
    layer = (peers_gpu.LAYERS | peers_gpu.FORWARD)[name]
    with torch.no_grad():
        close(name, [layer(x, index, weights, gate_up, down)], want[:1])
    if name in peers_gpu.LAYERS:
        leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
        out = layer(x, index, weights, gate_up, down)
        close(name, [out, *torch.autograd.grad(out, leaves, grad_out)], want)
    with pytest.raises(CannotRun, match=r"f32|bf16 alone"):
        layer(x.float(), index, weights.float(), gate_up.float(), down.float())


def close(who, got, want):
    """Nearer than the races ask, which would let a bf16 answer pass that is none."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a - b).float().norm() <= 0.02 * b.float().norm(), f"{who}: output {i}"


@pytest.mark.parametrize("transposed", [True, False])
def test_the_products_of_grouped_gemm(transposed, monkeypatch):
    for module, content in fake_peers.modules().items():
        monkeypatch.setitem(sys.modules, module, content)
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    x, weight = torch.randn(8, 6).bfloat16(), torch.randn(3, 4, 6).bfloat16()
    weight = weight.transpose(1, 2) if transposed else weight.transpose(1, 2).contiguous()
    want = torch.cat([x[:3] @ weight[0], x[3:] @ weight[2]])
    close("product", [peers_gpu.gmm_product(x, weight, offsets)], [want])
    b = torch.randn(8, 4).bfloat16()
    outer = torch.stack([x[:3].t() @ b[:3], torch.zeros(6, 4).bfloat16(), x[3:].t() @ b[3:]])
    close("outer", [peers_gpu.gmm_outer(x, b, offsets)], [outer])
    out = torch.empty_like(outer)
    assert peers_gpu.gmm_outer(x, b, offsets, out) is out


def test_a_sonicmoe_that_wants_rows_to_alternate_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sonicmoe", SimpleNamespace())
    old = SimpleNamespace(moe_general_routing_inputs=lambda x, router_scores: None)
    monkeypatch.setitem(sys.modules, "sonicmoe.functional", old)
    shape = shapes.Shape("test", E=2, k=1, H=8, I=8, T=4)
    x, weights, gate_up, down = shapes.layer_inputs(shape, torch.bfloat16)
    with pytest.raises(CannotRun, match="gate and up rows to alternate"):
        peers_gpu.sonicmoe(x, shapes.choices(shape, "balanced"), weights, gate_up, down)


def test_no_gpu_is_one_sentence_and_exit_code_2(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("raced"))
    with pytest.raises(WrongInput) as raised:
        bench.run("test", True, 1, None, None, device="cuda")
    code, sentence = verdict(raised.value)
    assert code == 2
    assert sentence == f"--device cuda: torch {torch.__version__} sees no GPU here"


def test_what_nvidia_smi_knows(monkeypatch):
    def answers(command, **_):
        assert command[1] == "--id=GPU-7"
        assert command[2].startswith("--query-gpu=driver_version,")
        return SimpleNamespace(stdout="570.1, 1755 MHz, 1980 MHz, 2619 MHz, 700.00 W\n")

    monkeypatch.setattr(clock.subprocess, "run", answers)
    assert clock.nvidia_smi(7) == dict(
        zip(clock.SMI, ("570.1", "1755 MHz", "1980 MHz", "2619 MHz", "700.00 W"), strict=True)
    )

    def fails(*_, **__):
        raise subprocess.CalledProcessError(6, "nvidia-smi")

    monkeypatch.setattr(clock.subprocess, "run", fails)
    assert clock.nvidia_smi(7) == {}


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_bench_runs_on_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    """Defends: data left on the CPU, a peer or a race that only a CPU could run.  How: tests/fake_gpu.py."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    for name, value in NO_OTHER_PLUGINS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code = bench.run("bf16 or route", False, 1, 2, tmp_path / "gpu.md", tmp_path / "gpu.json",
                     extra=["--tiny", *OF_BENCH, "-p", "fake_gpu"], device="cuda")  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"]["name"] == "A GPU that is not there"
    assert found["device"]["flush_bytes"] == 2**12
    lines = {r["group"]: {c["name"]: c.get("reason") for c in r["candidates"]} for r in found["races"]}
    assert len(lines) == 13
    for group in ("layer/forward/bf16", "layer/forward+backward/bf16", "decode/forward/bf16"):
        raced = {name for name, reason in lines[group].items() if reason is None}
        assert raced >= {
            "sigma",
            "torch_grouped_mm",
            "padded_bmm",
            "hf_grouped_mm",
            "grouped_gemm",
            "megablocks",
        }
        assert lines[group]["sonicmoe"].startswith("not importable: ModuleNotFoundError: No module named")
        assert lines[group]["liger"].startswith("AssertionError: liger: output 0 is off by")
    for group, of_bytes in (("layer/forward/bf16", "read"), ("layer/forward+backward/bf16", "read_write")):
        assert lines[group].keys() >= {"dense", "dense_f32", of_bytes}
        assert "sigma_nothing_kept" not in lines[group], "whose blocks are a CPU's"
    assert lines["decode/forward/bf16"]["sigma_int8"] is None
    for name in ("vllm_fused_experts", "hf_eager"):
        assert lines["layer/forward/bf16"][name] is None
    assert lines["layer/forward+backward/bf16"]["vllm_fused_experts"] == peers_gpu.FORWARD_ALONE
    assert lines["decode/forward/bf16"]["llama_cpp_mul_mat_id"] == "it runs on a CPU"
    assert lines["grouped_gemm/a.T@b/bf16"]["grouped_gemm"] is None
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# Results on a GPU\n")
    assert "A GPU that is not there (sm_90, 132 multiprocessors, 80 GiB, 1.0 GiB of it used at most)" in text
    assert "--device cuda" in text
    assert "flushes L2 outside of its time" in text
