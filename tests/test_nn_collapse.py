"""Routers of one expert of 96, trained on nothing but balance: what Sigma-MoE-Tiny (arXiv 2512.16248) reports of its
lowest layer, where a token is little more than its place in the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from sigma_train.load_limits import cv_floor
from torch import Tensor

from sigma_kernels import nn
from sigma_kernels.routing import RouterSums, Routing

E, H, VOCABULARY, STEP = 96, 64, 2000, 2048
TEMPERATURE = 0.1  # of the Top-1 loss
LARGEST_SHARE = 0.05  # of a token, as of the commonest word
Balance = Callable[[Routing, Tensor, RouterSums], Tensor]


class Load(NamedTuple):
    """Of fresh tokens; loads are deviations from the mean, relative to it."""

    most: float
    least: float
    over_floor: float  # the standard deviation of load over that of a fair draw
    of_commonest: float  # what an expert that takes the commonest token, and no other, would have
    plain_loss: float
    sureness: float  # mean over tokens of the largest q, the probability that the Top-1 loss reads
    dead: list[int]  # experts without a token in each step
    apart: list[float]  # the largest bias less the least after each step, where there are biases


def plain(routing: Routing, logits: Tensor, sums: RouterSums) -> Tensor:
    return nn.load_balancing_loss(sums, routing.counts)


def top1(routing: Routing, logits: Tensor, sums: RouterSums) -> Tensor:
    return nn.top1_balancing_loss(logits, TEMPERATURE)


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
    tokens: int = 16384,
    bias_rate: float = 1e-3,
    sgd: float | None = None,
) -> Load:
    """A task pulls the chosen weights up, `balance` against it; `context` is what a token's input owes to others.

    By Adam, or by plain gradient steps of the rate `sgd`.
    """
    torch.manual_seed(0)
    embedding = torch.randn(VOCABULARY, H)
    shares = torch.arange(1, VOCABULARY + 1) ** -1.0 if zipf else torch.ones(VOCABULARY)
    shares = (shares / shares.sum()).clamp(max=LARGEST_SHARE)
    router = nn.TopKRouter(H, E, k, use_bias=balance is loss_free)
    parameters = router.parameters()
    optimizer = torch.optim.Adam(parameters, 3e-3) if sgd is None else torch.optim.SGD(parameters, sgd)

    def inputs(words: Tensor) -> Tensor:
        return embedding[words] + context * torch.randn(len(words), H)

    dead, apart = [], []
    for _ in range(steps):
        routing, logits, sums = router.forward_with_sums(inputs(shares.multinomial(STEP, replacement=True)))
        loss = balance(routing, logits, sums) - pull * routing.weights.log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if balance is loss_free:
            nn.update_expert_bias(router, routing.counts, bias_rate)
            apart.append((router.expert_bias.max() - router.expert_bias.min()).item())
        dead.append((routing.counts == 0).sum().item())
    words = shares.multinomial(tokens, replacement=True)
    with torch.no_grad():
        routing, logits, sums = router.forward_with_sums(inputs(words))
    load = routing.counts * (E / (tokens * k)) - 1
    return Load(
        load.max().item(),
        load.min().item(),
        load.std(correction=0).item() / cv_floor(E, tokens, k),
        words.bincount().max().item() * E / tokens - 1,
        plain(routing, logits, sums).item(),
        (logits / TEMPERATURE).softmax(-1).amax(-1).mean().item(),
        dead,
        apart,
    )


def test_equal_tokens_go_to_equal_experts():
    """One expert cannot balance them, eight can; the plain loss says 1 of all.

    Within 40 % eight come with a little context, which one expert has no use for.  With none, 2,000 words have eight
    experts each, and what moves a load is a whole word: +51 and -61 % here, +39 and -54 % after four times the steps.
    """
    one, eight = trained(1), trained(8)
    assert one.most >= one.of_commonest > 3
    assert one.least < -0.9
    assert max(eight.most, -eight.least) < 0.7
    assert one.most > 6 * eight.most
    one_blurred, eight_blurred = (trained(k, context=0.02) for k in (1, 8))
    assert max(eight_blurred.most, -eight_blurred.least) < 0.4 < 1.5 < one_blurred.most
    uniform = trained(1, zipf=False)
    assert uniform.over_floor < 2
    every = (one, eight, one_blurred, eight_blurred, uniform)
    assert all(abs(load.plain_loss - 1) < 0.03 for load in every)


def test_the_top1_loss_balances_tokens_that_have_context():
    """And those that have none no better than they allow.  Experts may be dead in the first third, and not after it."""
    load = trained(1, top1, context=1.0, tokens=STEP)
    assert load.over_floor < 1.3
    assert load.sureness > 0.5
    assert not any(load.dead[len(load.dead) // 3 :])
    without = trained(1, top1)
    assert without.of_commonest <= without.most < 1.25 * without.of_commonest


def test_a_bias_without_a_loss_collapses():
    """Where the plain loss, with as much context, balances.

    The rich get richer by their larger gradients.  Adam evens them out: with it the busiest is at +400 to +800 %.
    """
    bias = trained(1, loss_free, context=0.3, pull=1.0, sgd=1.0)
    assert bias.least == -1
    assert bias.most > 10
    loss = trained(1, plain, context=0.3, pull=0.005, steps=200)
    assert loss.least > -0.8
    assert loss.most < 1


@pytest.mark.parametrize("rate, steps", [(4e-3, 150), (1e-2, 80)])
def test_biases_part_by_twice_the_rate_at_most(rate, steps):
    """So they decide alone, being 1 apart, after 1 / (2 rate) steps at the earliest.

    Looked for is 0.9: as probabilities are in (0, 1), a bias that is 1 above all is balanced there and goes no further.
    """
    apart = trained(1, loss_free, context=0.3, steps=steps, bias_rate=rate).apart
    reached = next(step for step, width in enumerate(apart, 1) if width >= 0.9)
    assert reached >= 0.9 / (2 * rate)
    assert max(apart) < 1.1
