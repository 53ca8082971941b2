"""The profiler on a GPU: `pytest --device cuda tests/test_noise_gpu.py`.  Its logic is shown in test_noise_cuda.py."""

import noise_spins
import numpy as np
import pytest
import torch
from sigma_noise import cuda
from sigma_noise.compare import Verdict, compare
from sigma_noise.plan import Plan

GEMM = Plan(kernels=("gemm",), modes=("fwq",), backend="cuda", quantum_s=1e-3, duration_s=1.0, warm_up_s=0.5)


@pytest.fixture
def gpu(device: torch.device) -> cuda.Gpu:
    torch.set_default_device("cpu")  # as in the program, which moves what it draws; `device` takes it back
    return cuda.found()


def test_spins_of_a_side_stream_are_found(gpu):
    """Acceptance 26.  Defends: quanta whose events leave out what a stream waits for; detours of another length."""
    step = cuda.STEPS["gemm"](gpu, cuda.sizes_of("gemm", GEMM), 0)
    quanta, spins = noise_spins.measured(gpu, gpu.captured(step), noise_spins.SideStream(), 2.0)
    found, noise = noise_spins.found(quanta, spins)
    hit = found.is_found
    cycles_per_s = noise_spins.CYCLES / spins.seconds
    print(
        f"{gpu.about['name']}: {len(quanta)} replays of {np.median(quanta.seconds) * 1e6:.0f} us, {len(spins)} spins "
        f"at {np.median(cycles_per_s) / 1e9:.3f} GHz, recall {found.recall:.3f}, precision {found.precision:.3f}, "
        f"{found.length_s[hit].mean() * 1e3:.3f} ms against {spins.seconds.mean() * 1e3:.3f}, noise {noise.share:.1%}"
    )
    assert len(spins) >= 20
    assert np.ptp(cycles_per_s) < 0.2 * np.median(cycles_per_s)  # a clock, whatever it is turned to
    assert found.recall >= 0.95
    assert found.length_s[hit].mean() == pytest.approx(spins.seconds.mean(), rel=0.05)


def test_two_halves_of_the_same_work_are_equivalent(gpu):
    """Acceptance 26.  Ten runs of a second in turns, five an arm, within 2 % of each other."""
    medians = []
    for _ in range(10):
        of_kernel, _ = cuda.replayed(gpu, "gemm", GEMM, lambda: None)
        medians.append(float(np.median(of_kernel["gemm"].seconds)))
    result = compare({"median_s": medians[::2]}, {"median_s": medians[1::2]}, margins={"median_s": 0.02})
    print(*(metric.sentence for metric in result.metrics))
    assert result.verdict == Verdict.EQUIVALENT
