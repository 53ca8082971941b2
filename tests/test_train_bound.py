"""What a step is measured against: what else runs on the machine may not lower it."""

from types import SimpleNamespace

import pytest
import torch
from sigma_train import bound
from sigma_train.config import load_config


def test_the_peak_is_the_fastest_of_the_products(monkeypatch):
    """Defends: an MFU of 18,603 %, of a peak that was measured beside other work."""
    took = iter([0.04, 0.02, 0.03, *[0.04] * 3, 0.01, *[0.04] * 100])
    sizes = []

    def seconds(a, b, out):
        sizes.append(out.shape[0])
        return next(took)

    monkeypatch.setattr(bound, "_seconds", seconds)
    assert bound.product_flops_per_s(torch.float32) == pytest.approx(2 * 1024**3 / 0.01)
    assert set(sizes) == {1024}, "a product that takes 5 ms is large enough"
    assert len(sizes) == 3 + 15, "0.3 s of products of 0.02 s"


def test_a_processor_that_is_fast_gets_larger_products(monkeypatch):
    sizes = []
    monkeypatch.setattr(bound, "_seconds", lambda a, b, out: sizes.append(out.shape[0]) or 0.004)
    assert bound.product_flops_per_s(torch.float32) == pytest.approx(2 * 2048**3 / 0.004)
    assert sizes == [1024] * 3 + [2048] * (3 + 75)


def test_a_product_that_takes_longer_than_there_is_time_is_the_peak(monkeypatch):
    """Defends: a run that ends in a traceback where something else has the machine."""
    monkeypatch.setattr(bound, "_seconds", lambda a, b, out: 0.4)
    assert bound.product_flops_per_s(torch.float32) == pytest.approx(2 * 1024**3 / 0.4)


def test_the_dense_twin_is_the_fastest_of_its_steps(monkeypatch):
    """Defends: 678 % of dense; a first step, which touches memory, that counts."""
    config = load_config("smoke", None, [])
    clock = iter([0, 0.5, 10, 13, 20, 21, 30, 32])  # steps of 0.5, 3, 1 and 2 s
    monkeypatch.setattr(bound, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    t = config.train
    assert bound.dense_tokens_per_s(config) == pytest.approx(t.grad_accum * t.batch_size * t.seq_len)
