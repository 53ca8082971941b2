"""One model at several numbers of experts a token (Matryoshka MoE, arXiv 2509.26520): what each costs and loses.

A plan is the k of each layer.  Of a plan: bits per byte on the validation split, how even the experts' load is, and
what a token costs.  Nothing is trained, and no weight changes.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sigma_train.config import Config
from sigma_train.dataset import TokenDataset
from sigma_train.errors import WrongInput
from sigma_train.evaluate import batch_nats
from sigma_train.expert_counts import ExpertCounts
from sigma_train.model import LanguageModel, flops_per_token
from sigma_train.routing_statistics import of_loads
from sigma_train.trained import load_trained

Plan = tuple[int, ...]
Batch = tuple[Tensor, Tensor]
Standing = Literal["trained", "between", "beyond"]


@dataclass(frozen=True)
class Elastic:
    """A model with the text that it is judged on; `seen` is the k that each layer was trained at."""

    checkpoint: Path
    step: int
    config: Config
    model: LanguageModel
    validation: TokenDataset
    seen: tuple[frozenset[int], ...]

    @property
    def num_layers(self) -> int:
        return len(self.seen)

    @property
    def most(self) -> int:
        """The largest k that a layer was trained at."""
        return max(max(layer) for layer in self.seen)

    def batches(self, limit: int | None = None) -> list[Batch]:
        """The first of the validation split, as many as the run's own validation has where no limit is given."""
        t = self.config.train
        return [*self.validation.eval_batches(t.batch_size, t.seq_len, limit or t.eval_batches)]

    def uniform(self, k: int) -> Plan:
        return (k,) * self.num_layers

    def standing(self, plan: Plan) -> Standing:
        """Whether the run computed at each layer's k, or a k is above all of that layer's, extrapolated; or neither."""
        pairs = [*zip(plan, self.seen, strict=True)]
        if all(k in layer for k, layer in pairs):
            return "trained"
        return "beyond" if any(k > max(layer) for k, layer in pairs) else "between"


@dataclass(frozen=True)
class Measured:
    """A plan on some batches; counts [layers, E] are the tokens of each expert, flops those of one token's forward."""

    plan: Plan
    nats: tuple[float, ...]  # of each batch
    num_bytes: int
    counts: Tensor
    active_parameters: int
    flops: int

    @property
    def bits_per_byte(self) -> float:
        return math.fsum(self.nats) / math.log(2) / self.num_bytes

    def over(self, other: "Measured") -> tuple[float, float]:
        """Bits per byte more than another plan on the same batches, and the standard error of this difference.

        Batches are taken for independent.  Of one batch no error is known: it is infinite.
        """
        differences = [a - b for a, b in zip(self.nats, other.nats, strict=True)]
        n = len(differences)
        error = math.sqrt(n) * statistics.stdev(differences) if n > 1 else math.inf
        per_byte = 1 / math.log(2) / self.num_bytes
        return math.fsum(differences) * per_byte, error * per_byte

    def load(self) -> dict[str, list[float]]:
        """Of each layer, by the experts' shares over an even one, less one: the most, the least, the mean without sign.

        And the entropy of the load over log E, 1 where it is even, and how many experts had no token.
        """
        share = self.counts.double() / self.counts.double().mean(1, keepdim=True)
        values = of_loads(self.counts)
        return {
            "most": values["load_most"].tolist(),
            "least": values["load_least"].tolist(),
            "mean_deviation": (share - 1).abs().mean(1).tolist(),
            "entropy": values["load_entropy"].tolist(),
            "dead": values["experts_dead"].tolist(),
        }

    def figures(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "top_k": list(self.plan),
            "mean_k": statistics.mean(self.plan),
            "bits_per_byte": self.bits_per_byte,
            "active_parameters": self.active_parameters,
            "flops_per_token": self.flops,
            "load": self.load(),
        }


def load(place: Path) -> Elastic:
    """The newest model of a run, or one checkpoint of it, and its validation split.

    Raises: WrongInput if it is dense or its text is not there as it was; CheckpointError if there is no model.
    """
    found = load_trained(place)
    if not found.model.moe_layers():
        raise WrongInput(f"elastic wants a model with experts, {place} holds a dense one")
    seen = ExpertCounts(found.config).seen(found.step)
    return Elastic(found.checkpoint, found.step, found.config, found.model, found.text().val, seen)


def measure(elastic: Elastic, plan: Plan, batches: Sequence[Batch]) -> Measured:
    """The model is left at the plan.

    Raises: WrongInput if it has no finite loss there.
    """
    model, config = elastic.model, elastic.config
    model.set_top_k(plan)
    nats, num_bytes = [], 0
    counts = torch.zeros(elastic.num_layers, config.model.num_experts, dtype=torch.int64)
    for inputs, targets in batches:
        nats.append(batch_nats(model, inputs, targets, config))
        num_bytes += elastic.validation.count_bytes(targets)
        counts += torch.stack([moe.last_routing.counts for moe in model.moe_layers()])
    if not math.isfinite(math.fsum(nats)):
        raise WrongInput(
            f"{elastic.checkpoint} has no finite loss at k = {in_words(plan)}, found {math.fsum(nats)}"
        )
    forward = flops_per_token(model, config) // 3  # a training step is one forward and twice as much again
    return Measured(plan, tuple(nats), num_bytes, counts, model.active_parameters(), forward)


def check(elastic: Elastic, plan: Plan, option: str) -> None:
    """Raises: WrongInput if the model can't have it."""
    E = elastic.config.model.num_experts
    if len(plan) != elastic.num_layers:
        raise WrongInput(
            f"{option} must have one entry for each of {elastic.num_layers} layers, found {len(plan)}"
        )
    for k in plan:
        if not 1 <= k <= E:
            raise WrongInput(f"{option} must lie in 1..{E}, the experts of the model, found {k}")


def in_words(plan: Plan) -> str:
    return ",".join(map(str, plan))
