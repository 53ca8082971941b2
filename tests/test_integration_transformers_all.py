"""Every experts class of the installed transformers: found in its sources, so that none is forgotten."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from support import assert_close, tolerance
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sigma_kernels.integrations import transformers as sk_hf

MODELS = Path(transformers.__file__).parent / "models"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
}


def experts_classes() -> list[tuple[str, str, str]]:
    """(family, module, class) of everything under the decorator that `register` serves."""
    pattern = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    return [
        (path.parent.name, path.stem, name)
        for path in sorted(MODELS.glob("*/modeling_*.py"))
        for name in pattern.findall(path.read_text())
    ]


FOUND = experts_classes()


def tiny_module(family: str, module_name: str, class_name: str) -> torch.nn.Module:
    """The class on the first configuration of its family that has what it asks for, with every size made small."""
    module = importlib.import_module(f"transformers.models.{family}.{module_name}")
    cls = getattr(module, class_name)
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    configs = [
        c for _, c in inspect.getmembers(configuration, inspect.isclass) if issubclass(c, PreTrainedConfig)
    ]
    extra = (
        {"intermediate_size": 24} if "intermediate_size" in inspect.signature(cls.__init__).parameters else {}
    )
    failures = []
    for config_class in configs:
        config = config_class()
        for key, value in SIZES.items():
            if hasattr(config, key):
                setattr(config, key, [value] * 2 if isinstance(getattr(config, key), list) else value)
        try:
            return cls(config, **extra)
        except (AttributeError, TypeError) as error:
            failures.append(f"{config_class.__name__}: {error}")
    raise AssertionError("; ".join(failures))


def test_the_sources_are_found():
    assert len(FOUND) >= 20
    assert ("qwen3_moe", "modeling_qwen3_moe", "Qwen3MoeExperts") in FOUND


@pytest.mark.filterwarnings("ignore")  # transformers' own, of many kinds
@pytest.mark.parametrize("where", FOUND, ids=lambda where: f"{where[0]}.{where[2]}")
def test_experts_equal_eager(where, monkeypatch):
    """Defends: layouts, biases, gates and activations; an expert that no token reaches; gradients of everything."""
    sk_hf.register()
    calls = []
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS, "sigma", lambda *args: calls.append(args) or sk_hf.experts_forward(*args)
    )
    torch.manual_seed(0)
    experts = tiny_module(*where).float()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    E, H = experts.num_experts, experts.down_proj.shape[-1 if experts.is_transposed else 1]
    x = torch.randn(17, H, requires_grad=True)
    index = torch.stack([torch.randperm(E - 1)[:2] for _ in range(17)])  # the last expert stays empty
    weights = torch.rand(17, 2, requires_grad=True)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    grad_out = torch.randn(17, H)
    results = {}
    for name in ("eager", "sigma"):
        experts.config._experts_implementation = name
        out = experts(x, index, weights)
        results[name] = [
            out.detach(),
            *torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True),
        ]
    assert len(calls) == 1, "the class did not go through the interface"
    for what, got, want in zip(["out", *leaves], results["sigma"], results["eager"], strict=True):
        assert (got is None) == (want is None), what
        if want is not None:
            assert_close(got, want, 4 * tolerance(torch.float32, H))
