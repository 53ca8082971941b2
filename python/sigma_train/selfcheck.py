"""Silent corruption: whether this rank still computes what it should, and holds what the others hold."""

import zlib
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.distributed.moe import local
from sigma_kernels.validation.cases import tolerance
from sigma_train.config import Config
from sigma_train.errors import Failure
from sigma_train.mesh import experts_held
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks

ROWS = 32  # tokens that an expert computes twice


class Corrupted(Failure):
    """A rank that computes or holds what it should not; one sentence that names it."""


def check(model: LanguageModel, config: Config, step: int, ranks: Ranks) -> None:
    """Compute one expert of one layer twice, another at each check; look at all weights, compare copies; a collective.

    Raises: Corrupted, on all ranks alike.
    """
    turn = step // config.guard.check_every
    wrong = wrong_expert(model, config, turn, step) or wrong_weight(model)
    held = digests_of_copies(model, ranks)
    told = ranks.gathered((wrong, held))
    for rank, (wrong, _) in enumerate(told):
        if wrong:
            raise Corrupted(f"step {step}: rank {rank}: {wrong}; nothing of this step was saved")
    for name in sorted({name for _, each in told for name in each}):
        by_rank = {rank: each[name] for rank, (_, each) in enumerate(told) if name in each}
        (usual, count), *others = Counter(by_rank.values()).most_common()
        if others and count == others[0][1]:
            who = "the ranks hold" if len(by_rank) == ranks.size else f"ranks {listed(by_rank)} hold"
            raise Corrupted(f"step {step}: {who} different {name}")
        if others:
            odd = next(rank for rank, digest in by_rank.items() if digest != usual)
            raise Corrupted(f"step {step}: rank {odd} holds another {name} than the other ranks")


def listed(ranks: Iterable[int]) -> str:
    *most, last = map(str, ranks)
    return f"{', '.join(most)} and {last}"


def digests_of_copies(model: LanguageModel, ranks: Ranks) -> dict[str, int]:
    """crc32 of what other ranks hold as well, by names that are the same on these: buffers, parts that are copies."""
    found = {name: crc32(x) for name, x in model.named_buffers()}
    if reshard := getattr(model, "reshard", None):
        reshard()  # after a validation FSDP leaves the model's own parameters whole
    for name, p in model.named_parameters():
        mesh: DeviceMesh | None = getattr(p, "device_mesh", None)
        if mesh is None:  # one process has all
            continue
        own, last = local(p.detach()), mesh.ndim - 1
        if ".experts." in name and mesh.size() < ranks.size:
            held = zip(experts_held(model, name), own, strict=True)
            found |= {f"{name} of expert {e}": crc32(expert) for e, expert in held}
        elif mesh.ndim > 1:
            found[f"{name}, part {mesh.get_local_rank(last)} of {mesh.size(last)}"] = crc32(own)
    return found


def crc32(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().view(-1).view(torch.uint8).numpy().data)


def wrong_expert(model: LanguageModel, config: Config, turn: int, seed: int) -> str | None:
    """An expert of which forward or gradients are not those of the definition in f64, to what the dtype explains."""
    layers = model.moe_layers()
    if not layers:
        return None
    layer = turn % len(layers)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    experts = partial(sk.moe_experts, compute_dtype=dtype)
    projections = [local(p.detach()) for p in layers[layer].experts.parameters()]
    e = turn // len(layers) % projections[0].shape[0]
    H = projections[1].shape[1]
    x, grad = torch.randn(2, ROWS, H, generator=torch.Generator().manual_seed(seed)).to(dtype)
    index, weights = torch.full((ROWS, 1), e), torch.ones(ROWS, 1)
    with torch.no_grad():  # as a step calls it: among all experts
        among_all = experts(x, index, weights, *projections)
    alone = [x, *(p[e : e + 1] for p in projections)]
    got = [among_all, *answers(experts, alone, weights, grad)]
    wide = [t.to(dtype).double() for t in alone]
    want = answers(reference.moe_experts, wide, weights.double(), grad.double())
    bound = tolerance(dtype, max(projections[1].shape[1:]))
    names = ("output", "output", "gradient of x", "gradient of gate_up", "gradient of down")
    for name, g, w in zip(names, got, [want[0], *want], strict=True):
        size = (w.square().mean().sqrt() + w.abs()).clamp(min=1e-30)  # an expert may be dead
        off = ((g.double() - w).abs() / size).max().item()
        if not off <= bound:  # NaN neither
            number = layers[layer].held[e]
            return f"layer {layer}, expert {number}: the {name} is off by {off:.1e} of its size, more than {bound:.1e}"
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
