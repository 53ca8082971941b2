"""One training step of a whole language model against transformers' own classes on the same weights and tokens.

8 layers (one with --tiny), hidden size 256, 96 experts (8) top-1 with I=256, 4,096 tokens of vocabulary, 8 x 256
tokens: forward, loss, backward and fused AdamW.  With kept memory malloc keeps what is freed, as `sigma train` has it
do; in bf16 everyone's matrix products are under autocast as in `sigma train`, weights and moments f32, but for one of
transformers whose weights and moments are bf16: half the bytes to move, and another training.
"""

import json
from pathlib import Path

import bounds
import oracle
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from shapes import short
from sigma_train.config import Config
from sigma_train.export import transformers_config, transformers_state
from sigma_train.model import LanguageModel, precision

import sigma_kernels as sk
from sigma_kernels.integrations import transformers as sk_hf

EXPERTS, BETA = "layers.0.mlp.experts.gate_up_proj", 0.9  # AdamW's first, its default


def settings(num_layers: int, num_experts: int, dtype: torch.dtype = torch.float32) -> Config:
    model = {
        "num_layers": num_layers,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_experts": num_experts,
    }
    return Config.from_dict({"model": model, "train": {"dtype": short(dtype)}})


def as_transformers(
    model: LanguageModel,
    config: Config,
    folder: Path,
    experts: str | None,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """The same weights, of that dtype, in transformers' class, with its experts run by that implementation."""
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(transformers_config(config, model, eos_id=0)))
        save_file(transformers_state(model, config), folder / "model.safetensors", metadata={"format": "pt"})
    chosen = {"experts_implementation": experts} if experts else {}
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=dtype, **chosen
    ).train()


def step_of(model: torch.nn.Module, tokens: torch.Tensor, config: Config):
    """A call that trains by one step, in the config's dtype.

    Returns: the loss before it, and what the optimizer knows of the gradient of a layer's experts: after one step, all.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    experts = next((p for name, p in model.named_parameters() if name.endswith(EXPERTS)), None)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def step() -> torch.Tensor:
        with precision(config):
            out = model(inputs)
        logits = (out if isinstance(out, torch.Tensor) else out.logits).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), optimizer.state.get(experts, {}).get("exp_avg")

    return step


def first_step(model: LanguageModel, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss, and what AdamW has of the gradient of the experts, by the reference in f32."""
    with sk.backend("reference"):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        gradient = torch.autograd.grad(loss, dict(model.named_parameters())[EXPERTS])[0]
    return loss.item(), (1 - BETA) * gradient


def race_steps(race, device, folder: Path, tiny: bool, dtype: torch.dtype, memory: str = "") -> None:
    torch.manual_seed(0)
    sk_hf.register()
    num_layers, num_experts, batch, length = (1, 8, 2, 16) if tiny else (8, 96, 8, 256)
    config = settings(num_layers, num_experts, dtype)
    ours = LanguageModel(config)
    tokens = torch.randint(config.model.vocab_size, (batch, length + 1))
    want = first_step(ours, tokens)
    theirs = {
        name: as_transformers(ours, config, folder / "moe", implementation)
        for name, implementation in (
            ("hf_with_sigma_experts", "sigma"),
            ("hf_grouped_mm", "grouped_mm"),
            ("hf_eager", "eager"),
        )
    }
    if dtype == torch.bfloat16:
        theirs["hf_grouped_mm_bf16_weights"] = as_transformers(
            ours, config, folder / "moe", "grouped_mm", dtype
        )
    tokens = tokens.to(device)

    def dense(dtype: torch.dtype):
        twin = settings(num_layers, 1, dtype)
        model = as_transformers(LanguageModel(twin), twin, folder / "dense", None)
        return step_of(model.to(device), tokens, twin)

    race(
        f"train_step/{short(dtype)}",
        step_of(ours.to(device), tokens, config),
        shape=f"{num_layers} layers, E{num_experts} k1 H256 I256, {batch} x {length} tokens",
        memory=memory,
        check=lambda who, got: oracle.assert_step(who, *got, want[0], want[1].to(device), dtype),
        once={"hf_eager"},
        **bounds.of_dtypes("hf_dense", dense, dtype),
        **{name: step_of(model.to(device), tokens, config) for name, model in theirs.items()},
    )
