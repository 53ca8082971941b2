"""Where a step went wrong: the first tensor, in the order of computation, that holds what is no finite number.

Nothing is watched until then.  The forward of the step is computed again with hooks on every place; where it is finite
the gradients are looked at, from the loss back.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

from sigma_kernels.distributed.moe import local
from sigma_kernels.nn import MoE
from sigma_train.layer_statistics import square_and_largest
from sigma_train.mesh import copies, experts_held
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks

AFTER_ALL = 1 << 60
T = TypeVar("T")
Named = list[tuple[str, Tensor]]


def origin(
    model: LanguageModel, micro_losses: Sequence[Callable[[], Tensor]], loss: float, norm: float, ranks: Ranks
) -> str:
    """What a step's trouble comes from, in words; a collective.

    Args:
        micro_losses: compute the loss of each micro-batch again.
        loss, norm: what the guard judged.  The gradients are there, and not cut if norm is no number.
    """
    gradients = gradients_backward(model)
    if math.isfinite(loss) and math.isfinite(norm):
        return largest_share(gradients, ranks)
    for micro, micro_loss in enumerate(micro_losses):
        if found := _first_output(model, micro_loss, ranks):
            (_, what, owner), rank = found
            told = f"the first that is not finite is {what} (rank {rank}, micro-batch {micro + 1})"
            named = model.get_submodule(owner).named_parameters(owner)
            if wrong := _earliest(_first_nonfinite(model, ((name, p.detach()) for name, p in named)), ranks):
                (_, name), rank = wrong
                told += f", and so is the weight {name} (rank {rank})"
            return told
    if not math.isfinite(loss):
        return "computed again the loss is finite, so that what was wrong has passed"
    if wrong := _earliest(_first_nonfinite(model, gradients), ranks):
        (_, name), rank = wrong
        first = f"the first gradient back from the loss that is not is that of {name} (rank {rank})"
        return f"the forward is finite, {first}"
    return f"every number of the gradient is finite, and {largest_share(gradients, ranks)}"


def largest_share(gradients: Named, ranks: Ranks) -> str:
    """The parameter with most of the gradient's squared norm; a collective."""
    squares = ranks.summed(*(square_of_part(x) for _, x in gradients))
    most, (name, _) = max(zip(squares, gradients, strict=True), key=lambda pair: pair[0])
    return f"{most / (math.fsum(squares) or 1.0):.0%} of its square are the gradient of {name}"


def square_of_part(x: Tensor) -> float:
    """What this rank adds to the sum of x^2 over all."""
    own = local(x)
    return square_and_largest(own)[0] / copies(x) if own.numel() else 0.0


def gradients_backward(model: LanguageModel) -> Named:
    """Each gradient, a DTensor on several ranks, in the order in which a backward comes to them."""
    # The norms of queries and keys are registered after o_proj, and computed before it.
    places = [
        (i + 2.5 * (".o_proj." in name), name, p) for i, (name, p) in enumerate(model.named_parameters())
    ]
    backward = sorted(places, key=lambda place: place[0], reverse=True)
    return [(name, p.grad) for _, name, p in backward if p.grad is not None]


def _first_output(
    model: LanguageModel, micro_loss: Callable[[], Tensor], ranks: Ranks
) -> tuple[tuple[int, str, str], int] | None:
    """The first place of a forward that is not finite: number, words, module; and the rank; a collective."""
    with _watched(model) as bad:
        loss = micro_loss()
    if ranks.size > 1:
        # FSDP: the root's weights stay whole until a backward, which does not come.
        model.reshard()  # type: ignore[operator]
    if not bad and not loss.isfinite():
        bad.append((AFTER_ALL, "the loss", ""))
    return _earliest(bad[0] if bad else None, ranks)


@contextlib.contextmanager
def _watched(model: LanguageModel) -> Iterator[list[tuple[int, str, str]]]:
    """A list that gets the first place whose output is not finite."""
    bad: list[tuple[int, str, str]] = []

    def watch(number: int, what: str, owner: str) -> Callable[[nn.Module, object, Tensor], None]:
        def see(module: nn.Module, _: object, output: Tensor) -> None:
            logits = module.last_logits if isinstance(module, MoE) else None
            if not bad and logits is not None and not _is_finite(logits):
                bad.append((2 * number, f"the router's logits in layer {owner.rpartition('.')[2]}", owner))
            if not bad and not _is_finite(output):
                bad.append((2 * number + 1, what, owner))

        return see

    with contextlib.ExitStack() as stack:
        for number, (name, what, owner) in enumerate(places(model)):
            hook = watch(number, what, owner)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield bad


def places(model: LanguageModel) -> Iterator[tuple[str, str, str]]:
    """Modules in the order of a forward: name, what their output is, and the module whose weights have made it."""
    yield "embed_tokens", "the embedding", "embed_tokens"
    for i, block in enumerate(model.layers):
        owner, layer = f"layers.{i}", f"layer {i}"
        mlp = "the experts' output" if isinstance(block.mlp, MoE) else "the MLP's output"
        yield f"{owner}.self_attn", f"attention's output in {layer}", owner
        yield f"{owner}.mlp", f"{mlp} in {layer}", owner
        yield owner, f"the residual stream after {layer}", owner
    yield "norm", "the last norm's output", "norm"
    yield "lm_head", "the logits", "lm_head"


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _first_nonfinite(model: LanguageModel, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, str] | None:
    """Place and name of the first of which this rank's part is not finite; of an expert its number among all."""
    for place, (name, x) in enumerate(tensors):
        is_bad = ~local(x).isfinite()
        if is_bad.any():
            if ".experts." in name:
                of_expert = is_bad.flatten(1).any(1).tolist()
                bad = min(e for e, wrong in zip(experts_held(model, name), of_expert, strict=True) if wrong)
                name = f"expert {bad} of {name}"
            return place, name
    return None


def _earliest(mine: T | None, ranks: Ranks) -> tuple[T, int] | None:
    """Of what the ranks have, the least, and whose it is; a collective."""
    found = [(each, rank) for rank, each in enumerate(ranks.gathered(mine)) if each is not None]
    return min(found, default=None)
