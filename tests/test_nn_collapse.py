"""Routers of one expert of 96, trained on nothing but balance: what Sigma-MoE-Tiny (arXiv 2512.16248) reports of its
lowest layer, where a token is little more than its place in the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_kernels import nn
from sigma_kernels.routing import RouterSums, Routing

E, H, VOCABULARY, T = 96, 64, 2000, 16384
FLOOR = (E / T) ** 0.5  # the relative standard deviation of load that is left where routing is a fair draw
LARGEST_SHARE = 0.05  # of a token, as of the commonest word
Balance = Callable[[Routing, Tensor, RouterSums], Tensor]


class Load(NamedTuple):
    """Of 16,384 fresh tokens; loads are deviations from the mean, relative to it."""

    most: float
    least: float
    spread: float
    of_commonest: float  # what an expert that takes the commonest token, and no other, would have
    plain_loss: float


def plain(routing: Routing, logits: Tensor, sums: RouterSums) -> Tensor:
    return nn.load_balancing_loss(sums, routing.counts)


def top1(routing: Routing, logits: Tensor, sums: RouterSums) -> Tensor:
    return nn.top1_balancing_loss(logits)


def loss_free(routing: Routing, logits: Tensor, sums: RouterSums) -> Tensor:
    return logits.sum() * 0


def trained(
    k: int,
    balance: Balance = plain,
    *,
    zipf: bool = True,
    context: float = 0.0,
    pull: float = 0.01,
    steps: int = 100,
) -> Load:
    """A task pulls the chosen weights up, `balance` against it; `context` is what a token's input owes to others."""
    torch.manual_seed(0)
    embedding = torch.randn(VOCABULARY, H)
    shares = torch.arange(1, VOCABULARY + 1) ** -1.0 if zipf else torch.ones(VOCABULARY)
    shares = (shares / shares.sum()).clamp(max=LARGEST_SHARE)
    router = nn.TopKRouter(H, E, k, use_bias=balance is loss_free)
    optimizer = torch.optim.Adam(router.parameters(), 3e-3)

    def inputs(tokens: Tensor) -> Tensor:
        return embedding[tokens] + context * torch.randn(len(tokens), H)

    for _ in range(steps):
        routing, logits, sums = router.forward_with_sums(inputs(shares.multinomial(4096, replacement=True)))
        loss = balance(routing, logits, sums) - pull * routing.weights.log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if balance is loss_free:
            nn.update_expert_bias(router, routing.counts)
    tokens = shares.multinomial(T, replacement=True)
    with torch.no_grad():
        routing, logits, sums = router.forward_with_sums(inputs(tokens))
    load = routing.counts * (E / (T * k)) - 1
    return Load(
        load.max().item(),
        load.min().item(),
        load.std().item(),
        tokens.bincount().max().item() * E / T - 1,
        plain(routing, logits, sums).item(),
    )


def test_equal_tokens_go_to_equal_experts():
    """One expert cannot balance them, eight can; the plain loss says 1 of all."""
    one, eight = trained(1), trained(8)
    assert one.most >= one.of_commonest > 3
    assert one.least < -0.9
    assert max(eight.most, -eight.least) < 0.8
    assert one.most > 3 * eight.most
    uniform = trained(1, zipf=False)
    assert uniform.spread < 2 * FLOOR
    assert all(abs(load.plain_loss - 1) < 0.03 for load in (one, eight, uniform))


def test_the_top1_loss_balances_tokens_that_have_context():
    """And those that have none no better than they allow."""
    assert trained(1, top1, context=1.0).spread < 2 * FLOOR
    without = trained(1, top1)
    assert without.of_commonest <= without.most < 1.25 * without.of_commonest


def test_a_bias_without_a_loss_collapses():
    """Where the plain loss, with as much context, does not."""
    bias, loss = (trained(1, how, context=0.3, pull=0.005, steps=600) for how in (loss_free, plain))
    assert bias.least == -1
    assert bias.most > 4
    assert loss.least > -0.8
    assert loss.most < 1
