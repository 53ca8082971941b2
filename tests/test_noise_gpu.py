"""The profiler on a GPU: `pytest --device cuda tests/test_noise_gpu.py`.  Its logic is shown in test_noise_cuda*.py."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import noise_spins
import numpy as np
import pytest
import torch
from sigma_noise import cuda, cuda_replays, gpu
from sigma_noise.compare import Verdict, compare
from sigma_noise.plan import Plan
from sigma_noise.trace import read
from sigma_noise.windows import exchanges_of
from sigma_train.ranks import Ranks

GEMM = Plan(kernels=("gemm",), modes=("fwq",), backend="cuda", quantum_s=1e-3, duration_s=1.0, warm_up_s=0.5)


@pytest.fixture
def this_gpu(device: torch.device) -> gpu.Gpu:
    torch.set_default_device("cpu")  # as in the program, which moves what it draws; `device` takes it back
    return gpu.found()


def test_spins_of_a_side_stream_are_found(this_gpu):
    """Acceptance 26.  Defends: quanta whose events leave out what a stream waits for; detours of another length."""
    step = cuda_replays.STEPS["gemm"](this_gpu, cuda_replays.sizes_of("gemm", GEMM), 0)
    quanta, spins = noise_spins.measured(this_gpu, this_gpu.captured(step), noise_spins.SideStream(), 2.0)
    found, noise = noise_spins.found(quanta, spins)
    hit = found.is_found
    cycles_per_s = noise_spins.CYCLES / spins.seconds
    print(
        f"{this_gpu.about['name']}: {len(quanta)} replays of {np.median(quanta.seconds) * 1e6:.0f} us, {len(spins)} "
        f"spins at {np.median(cycles_per_s) / 1e9:.3f} GHz, recall {found.recall:.3f}, precision "
        f"{found.precision:.3f}, {found.length_s[hit].mean() * 1e3:.3f} ms against {spins.seconds.mean() * 1e3:.3f}, "
        f"noise {noise.share:.1%}"
    )
    assert len(spins) >= 20
    assert np.ptp(cycles_per_s) < 0.2 * np.median(cycles_per_s)  # a clock, whatever it is turned to
    assert found.recall >= 0.95
    assert found.length_s[hit].mean() == pytest.approx(spins.seconds.mean(), rel=0.05)


def test_two_halves_of_the_same_work_are_equivalent(this_gpu):
    """Acceptance 26.  Ten runs of a second in turns, five an arm, within 2 % of each other."""
    medians = []
    for _ in range(10):
        result = cuda_replays.fixed_work(this_gpu, "gemm", GEMM, Ranks())
        medians.append(float(np.median(result.series["gemm"].seconds)))
    compared = compare({"median_s": medians[::2]}, {"median_s": medians[1::2]}, margins={"median_s": 0.02})
    print(*(metric.sentence for metric in compared.metrics))
    assert compared.verdict == Verdict.EQUIVALENT


@pytest.mark.parametrize("kernel", ["gemm", "copy", "grouped", "spin"])
def test_fixed_time(this_gpu, kernel):
    """Acceptance 26.  Defends: counts that do not follow the time of a chunk, gaps between launches taken for noise."""
    if kernel == "spin" and this_gpu.native is None:
        pytest.skip("the CUDA kernels were not built here")
    plan = replace(GEMM, kernels=(kernel,), modes=("ftq",), quantum_s=0.02)
    trace = cuda.measure(plan, Ranks(), this_gpu)
    print(json.dumps(trace.ranks[0]["measured"], indent=1), *trace.ranks[0]["warnings"], sep="\n")
    assert len(trace.names()) == 1 or kernel == "spin"
    for name in trace.names():
        series, how = trace.get(0, "quantum", name), trace.ranks[0]["measured"][name]
        assert name.endswith("_ftq")
        assert 40 <= len(series) <= 50
        assert (np.diff(series.start_ns) > 0.019e9).all()
        assert np.median(series.value) == pytest.approx(plan.quantum_s / how["chunk"]["quantum_s"], rel=0.2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here, and an all-to-all wants two")
def test_all_to_all_of_two_gpus(tmp_path):
    """Acceptance 26.  Defends: an end before the last arrival, by the clocks of two GPUs."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "sigma_cli",
        "noise",
        "run",
        "--backend",
        "cuda",
        "--kernel",
        "a2a",
    ]
    out = tmp_path / "run"
    ended = subprocess.run(
        [*command, "--nproc", "2", "--duration", "2s", "--out", str(out)],
        env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    trace = read(out)
    exchanges, wrong = exchanges_of(trace)
    assert exchanges is not None, wrong
    parts = exchanges.parts
    residuals = [[o["residual_ns"] for o in about["clock"]["offsets"]] for about in trace.ranks.values()]
    print(
        f"{len(parts.step)} rounds, {parts.impossible} impossible, undecided {parts.undecided}, {residuals} ns"
    )
    assert parts.impossible <= 0.01 * len(parts.step)
    assert parts.local_s.mean() == pytest.approx(1e-3, rel=0.5)


def test_an_all_to_all_of_two_ranks_on_one_gpu_is_refused(tmp_path):
    """Defends: a traceback of NCCL's.  CUDA_VISIBLE_DEVICES leaves both the first one."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "sigma_cli",
        "noise",
        "run",
        "--backend",
        "cuda",
        "--kernel",
        "a2a",
    ]
    ended = subprocess.run(
        [*command, "--nproc", "2", "--duration", "1s", "--out", str(tmp_path / "run")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "--kernel a2a wants a GPU for each rank, found ranks 0 and 1 on" in ended.stderr
