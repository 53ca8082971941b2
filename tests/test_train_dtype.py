"""`train.dtype`: bf16 multiplies so and nothing else, trains like f32, and is part of what a run is."""

from collections import defaultdict

import pytest
import torch
from sigma_train import loop
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint
from sigma_train.config import ConfigError
from sigma_train.generate import load_run
from sigma_train.metrics import read_metrics
from sigma_train.products import has_products_of_bf16
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = ["data.max_bytes=200000", "train.batch_size=4", "train.steps=6"]


class Operands(TorchDispatchMode):
    """Collects, by operator, the dtypes of floating-point tensors that go in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = {x.dtype for x in args if isinstance(x, torch.Tensor) and x.dtype.is_floating_point}
        self.dtypes[func._opname] |= found
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype, product", [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_of_the_dtype_and_all_else_is_f32(make_trainer, dtype, product):
    """Defends: a cast that is not made; one made where bits matter: router, softmax of the loss, sums, weights."""
    trainer = make_trainer("run", f"train.dtype={dtype}")
    with Operands() as seen:
        trainer._train_step()
    assert seen.dtypes["moe_experts"] == {product}
    assert seen.dtypes["moe_experts_backward"] == {product, torch.float32}, "f32 are the sums kept for it"
    dense = product if has_products_of_bf16() else torch.float32
    assert seen.dtypes["mm"] == {dense, torch.float32}, "f32 is the router's"
    assert seen.dtypes["_scaled_dot_product_flash_attention_for_cpu"] == {dense}
    for name in ("route", "_log_softmax", "embedding", "_fused_adamw_"):
        assert seen.dtypes[name] <= {torch.float32}, name
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.dtype == torch.float32, name


@pytest.mark.parametrize("kind", [[], ["model.num_experts=1"], ["train.grad_accum=2"]], ids=str)
def test_bf16_trains_like_f32(make_trainer, kind):
    """A rounding to bf16 is off by up to 2**-9, a mean over 256 tokens by 2**-13; four times that for 30 steps."""
    settings = ["train.steps=30", "optim.lr=1e-3", *kind]
    curves = {}
    for dtype in ("f32", "bf16"):
        trainer = make_trainer(dtype, f"train.dtype={dtype}", *settings)
        trainer.run()
        curves[dtype] = [row["loss"] for row in read_metrics(trainer.out / "metrics.jsonl") if "loss" in row]
    assert curves["bf16"] != curves["f32"]
    assert curves["bf16"] == pytest.approx(curves["f32"], rel=2**-11)
    assert curves["f32"][-1] < curves["f32"][0] - 0.3


def test_checkpoints_are_f32_and_name_the_dtype(make_trainer):
    trainer = make_trainer("run", "train.dtype=bf16")
    trainer.run()
    checkpoint = load_checkpoint(latest_checkpoint(trainer.checkpoints))
    assert checkpoint.extra["settings"]["train.dtype"] == "bf16"
    tensors = [*checkpoint.model_state.values(), *checkpoint.optim_state.values()]
    assert {x.dtype for x in tensors} == {torch.float32}
    config, model, _ = load_run(trainer.out)
    assert config.train.dtype == "bf16"
    with Operands() as seen, torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert seen.dtypes["moe_experts"] == {torch.float32}, "generate and export are f32"


def test_another_dtype_is_not_resumed(make_trainer):
    make_trainer("run", "train.dtype=bf16").run()
    with pytest.raises(ConfigError, match=r"train\.dtype was 'bf16' and is 'f32'"):
        make_trainer("run", "train.dtype=f32", resume=True)
    assert make_trainer("run", "train.dtype=bf16", resume=True).step == 6


def test_a_checkpoint_older_than_the_setting_is_f32(make_trainer, monkeypatch):
    of_now = loop.shaping_settings

    def of_then(config):
        return {key: value for key, value in of_now(config).items() if key != "train.dtype"}

    with monkeypatch.context() as then:
        then.setattr(loop, "shaping_settings", of_then)
        make_trainer("run", "train.dtype=f32").run()
    assert make_trainer("run", "train.dtype=f32", resume=True).step == 6
    with pytest.raises(ConfigError, match=r"train\.dtype was 'f32' and is 'bf16'"):
        make_trainer("run", "train.dtype=bf16", resume=True)
