"""Silent corruption: whether this rank still computes what it should, and holds what the others hold."""

import zlib
from collections import Counter
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.distributed.moe import local
from sigma_train.config import Config
from sigma_train.errors import Failure
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks

ROWS = 32  # tokens that an expert computes twice


class Corrupted(Failure):
    """A rank that computes or holds what it should not; one sentence that names it."""


def check(model: LanguageModel, config: Config, step: int, ranks: Ranks) -> None:
    """Compute one expert of one layer twice, another at each check, and look at all weights; a collective.

    Raises: Corrupted, on all ranks alike.
    """
    turn = step // config.guard.check_every
    wrong = wrong_expert(model, config, turn, step, ranks.rank) or wrong_weight(model)
    held = {name: zlib.crc32(x.numpy().tobytes()) for name, x in model.named_buffers()}
    told = [(wrong, held)]
    if ranks.size > 1:
        told = [(None, {})] * ranks.size
        dist.all_gather_object(told, (wrong, held))
    for rank, (wrong, _) in enumerate(told):
        if wrong:
            raise Corrupted(f"step {step}: rank {rank}: {wrong}; nothing of this step was saved")
    for name in held:
        (usual, count), *others = Counter(each[name] for _, each in told).most_common()
        if others and count == others[0][1]:
            raise Corrupted(f"step {step}: the ranks hold different {name}")
        if others:
            rank = next(r for r, (_, each) in enumerate(told) if each[name] != usual)
            raise Corrupted(f"step {step}: rank {rank} holds another {name} than the other ranks")


def wrong_expert(model: LanguageModel, config: Config, turn: int, seed: int, rank: int = 0) -> str | None:
    """An expert of which forward or gradients are not those of the definition in f64, to what the dtype explains."""
    layers = model.moe_layers()
    if not layers:
        return None
    layer = turn % len(layers)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    projections = [local(p.detach()).to(dtype) for p in layers[layer].experts.parameters()]
    e = turn // len(layers) % projections[0].shape[0]
    H = projections[1].shape[1]
    x, grad = torch.randn(2, ROWS, H, generator=torch.Generator().manual_seed(seed)).to(dtype)
    index, weights = torch.full((ROWS, 1), e), torch.ones(ROWS, 1, dtype=dtype)
    with torch.no_grad():  # as a step calls it: among all experts
        among_all = sk.moe_experts(x, index, weights, *projections)
    alone = [x, *(p[e : e + 1] for p in projections)]
    got = [among_all, *answers(sk.moe_experts, alone, weights, grad)]
    want = answers(reference.moe_experts, [t.double() for t in alone], weights.double(), grad.double())
    # Narrow types round their result alone.
    terms = max(projections[1].shape[1:]) if dtype == torch.float32 else 1
    bound = 8 * torch.finfo(dtype).eps * terms**0.5
    names = ("output", "output", "gradient of x", "gradient of gate_up", "gradient of down")
    for name, g, w in zip(names, got, [want[0], *want], strict=True):
        size = (w.square().mean().sqrt() + w.abs()).clamp(min=1e-30)  # an expert may be dead
        off = ((g.double() - w).abs() / size).max().item()
        if not off <= bound:  # NaN neither
            of_all = rank * projections[0].shape[0] + e
            return f"layer {layer}, expert {of_all}: the {name} is off by {off:.1e} of its size, more than {bound:.1e}"
    return None


def answers(function, leaves: list[Tensor], weights: Tensor, grad: Tensor) -> list[Tensor]:
    """The output of one expert and its gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, gate_up, down = leaves
    out = function(x, torch.zeros(ROWS, 1, dtype=torch.long), weights, gate_up, down)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def wrong_weight(model: LanguageModel) -> str | None:
    for name, p in chain(model.named_parameters(), model.named_buffers()):
        if not local(p.detach()).isfinite().all():
            return f"{name} holds what is no finite number"
    return None
