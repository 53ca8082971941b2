"""One training step of a whole language model against transformers' own classes on the same weights and tokens.

8 layers (one with --tiny), hidden size 256, 96 experts top-1 with I=256, 4,096 tokens of vocabulary, 8 x 256 tokens:
forward, loss, backward and fused AdamW.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sigma_train.config import Config
from sigma_train.export import transformers_config, transformers_state
from sigma_train.model import LanguageModel

from sigma_kernels.integrations import transformers as sk_hf


def settings(num_layers: int, num_experts: int) -> Config:
    model = {
        "num_layers": num_layers,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_experts": num_experts,
    }
    return Config.from_dict({"model": model})


def as_transformers(
    model: LanguageModel, config: Config, folder: Path, experts: str | None
) -> torch.nn.Module:
    """The same weights in transformers' class, with its experts run by that implementation."""
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(transformers_config(config, model, eos_id=0)))
        save_file(transformers_state(model, config), folder / "model.safetensors", metadata={"format": "pt"})
    chosen = {"experts_implementation": experts} if experts else {}
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **chosen).train()


def step_of(model: torch.nn.Module, tokens: torch.Tensor):
    """A call that trains by one step and returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def step() -> torch.Tensor:
        out = model(inputs)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_train_step(race, device, tmp_path, pytestconfig):
    torch.manual_seed(0)
    sk_hf.register()
    num_layers, batch, length = (1, 2, 16) if pytestconfig.getoption("--tiny") else (8, 8, 256)
    config = settings(num_layers, 96)
    ours = LanguageModel(config)
    tokens = torch.randint(config.model.vocab_size, (batch, length + 1))
    with torch.no_grad():
        want = F.cross_entropy(ours(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    theirs = {
        name: as_transformers(ours, config, tmp_path / "moe", implementation)
        for name, implementation in (
            ("hf_with_sigma_experts", "sigma"),
            ("hf_grouped_mm", "grouped_mm"),
            ("hf_eager", "eager"),
        )
    }
    twin = settings(num_layers, 1)
    dense = as_transformers(LanguageModel(twin), twin, tmp_path / "dense", None)

    def check(who: str, loss: torch.Tensor) -> None:
        assert abs(loss.item() - want) < 1e-3, f"{who}: the first loss is {loss}, {want} was expected"

    ours, dense, tokens = ours.to(device), dense.to(device), tokens.to(device)
    race(
        "train_step/f32",
        step_of(ours, tokens),
        shape=f"{num_layers} layers, E96 k1 H256 I256, {batch} x {length} tokens",
        check=check,
        once={"hf_eager"},
        bound_hf_dense=step_of(dense, tokens),
        **{name: step_of(model.to(device), tokens) for name, model in theirs.items()},
    )
