"""One step: loss and gradients of its micro-batches over all ranks, and what is learned from them."""

from contextlib import nullcontext

from torch import Tensor
from torch.optim import Optimizer

import sigma_kernels as sk
from sigma_kernels import nn as sk_nn
from sigma_train import step_noise
from sigma_train.config import Config
from sigma_train.dataset import PreparedData
from sigma_train.expert_counts import ExpertCounts
from sigma_train.layer_statistics import LayerStatistics
from sigma_train.mesh import Mesh
from sigma_train.model import LanguageModel, precision
from sigma_train.objective import Objective
from sigma_train.optim import clip
from sigma_train.origin import origin
from sigma_train.ranks import Ranks


class Step:
    """Steps are told apart by their number, from 0, which decides their tokens.

    noise: is told of every phase; its owner may put another in its place.  figures: of the step done last, by the names
    that the metrics have, beside its loss.
    """

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        data: PreparedData,
        mesh: Mesh | None,
        ranks: Ranks,
        layers: LayerStatistics,
        noise: step_noise.NoRecord,
        objective: Objective,
    ) -> None:
        self.config, self.model, self.data, self.mesh, self.ranks = config, model, data, mesh, ranks
        self.layers, self.noise, self.objective = layers, noise, objective
        self.experts = ExpertCounts(config)
        self.figures: dict[str, float] = {}

    def gradients(self, number: int) -> tuple[float, float, list[Tensor]]:
        """Loss, norm of the gradient, which is cut, and each layer's counts, all over the ranks.

        The model is left with as many experts a token as the step has where they are not drawn.
        """
        t, loss_sum, counts = self.config.train, 0.0, []
        self.objective.begin()
        for micro in range(t.grad_accum):
            # A mesh reduces gradients as autograd makes them.
            with nullcontext() if self.mesh else sk.accumulate_grad():
                loss = self._cross_entropy(number, micro)
            counts.append([moe.last_routing.counts for moe in self.model.moe_layers()])
            loss_of_all = (loss + self.balance_loss()) / t.grad_accum
            self.noise.turn(step_noise.BACKWARD)
            loss_of_all.backward()
            loss_sum += loss.item()
        self.turn_to(number)
        self.noise.turn(step_noise.GRADIENTS)
        if self.mesh is not None:
            from sigma_train.parallel import average_expert_gradients  # a second of FSDP and DTensor

            average_expert_gradients(self.model, self.mesh)
        self.layers.see_gradients()
        norm = clip(self.model, self.config.optim.grad_clip)
        figures = self.objective.figures()
        sums = self.ranks.summed(loss_sum, *figures.values())
        loss, *means = (each / self.ranks.size / t.grad_accum for each in sums)
        self.figures = dict(zip(figures, means, strict=True))
        layers = [sk_nn.global_counts(sum(layer)) for layer in zip(*counts, strict=True)]
        return loss, norm, layers

    def turn_to(self, number: int) -> None:
        """Have the model at the experts a token of this step."""
        self._set_top_k(self.experts.of_step(number))

    def learn(self, optimizer: Optimizer, counts: list[Tensor]) -> None:
        """Move the weights by the gradients, which are then gone, and the routers' biases by the counts."""
        self.noise.turn(step_noise.OPTIMIZER)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.config.router.balance == "bias":
            for moe, layer in zip(self.model.moe_layers(), counts, strict=True):
                sk_nn.update_expert_bias(moe.router, layer, self.config.router.bias_rate)

    def origin(self, number: int, loss: float, norm: float) -> str:
        """Where a step went wrong, which is computed again for it."""
        again = [
            lambda micro=micro: self._cross_entropy(number, micro) + self.balance_loss()
            for micro in range(self.config.train.grad_accum)
        ]
        try:
            return origin(self.model, again, loss, norm, self.ranks)
        finally:
            self.turn_to(number)

    def balance_loss(self) -> Tensor | float:
        """What the routers add, of the model's last call."""
        r = self.config.router
        total: Tensor | float = 0.0
        for moe in self.model.moe_layers():
            sums, counts = moe.last_sums, moe.last_routing.counts
            if r.balance in ("loss", "global") and r.balance_coef:
                counts = sk_nn.global_counts(counts) if r.balance == "global" else counts
                total = total + r.balance_coef * sk_nn.load_balancing_loss(sums, counts)
            if r.balance == "top1" and r.balance_coef:
                loss = sk_nn.top1_balancing_loss(moe.last_logits, r.top1_temperature, is_global=True)
                total = total + r.balance_coef * loss
            if r.z_coef:
                total = total + r.z_coef * sk_nn.router_z_loss(sums)
        return total

    def _set_top_k(self, top_k: tuple[int, ...]) -> None:
        if self.model.moe_layers():
            self.model.set_top_k(top_k)

    def _cross_entropy(self, number: int, micro: int) -> Tensor:
        """Of one micro-batch of this rank, over the tokens that count, and what [objective] adds."""
        t = self.config.train
        self.noise.turn(step_noise.DATA)
        batch = number * t.grad_accum + micro
        inputs, targets = self.data.train.batch(
            batch, t.batch_size, t.seq_len, t.seed, self.ranks.rank, self.ranks.size
        )
        self._set_top_k(self.experts.of_batch(number, micro))
        self.noise.turn(step_noise.FORWARD)
        with precision(self.config):
            logits = self.model(inputs)
        return self.objective.loss(logits, targets, batch)
