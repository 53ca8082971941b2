"""`sigma plan` beside steps of the trainer on ranks, and what it expects of routing beside enumeration."""

import itertools
import json
import math
from collections import Counter
from fractions import Fraction

import forked
import plan_ranks
import pytest
import torch
from sigma_train.config import Config, load_config
from sigma_train.plan_memory import activations, copies, held, memory
from sigma_train.plan_routing import Routed, expected, share_of_rows, share_of_visits
from sigma_train.plan_shapes import Layout, layout, shapes
from sigma_train.plan_wire import EXCHANGE, collectives
from support import sigma

ODD = ["model.hidden_size=36", "model.head_dim=18", "model.vocab_size=515", "model.intermediate_size=20"]
REAL = [  # ranks, settings; layers of one choice and of several, on a rank fewer experts than choices
    (2, ["router.balance=global", "train.batch_size=3", "model.top_k=[3,1]"]),
    (
        4,
        [
            *ODD,
            "train.dtype=bf16",
            "train.grad_accum=2",
            "model.tie_embeddings=false",
            "model.top_k=[3,1]",
            "router.score=sigmoid",
        ],
    ),
    (8, ["train.batch_size=1", "model.top_k=[3,1]"]),  # one expert on each, one sequence
]


@pytest.fixture(scope="module")
def told(cache, tmp_path_factory) -> list[list[dict]]:
    """Of each case one step of the trainer on so many gloo ranks, and what every rank told."""
    sigma("plan", "--ranks", "2", env=cache)  # starts the server of processes
    folder = tmp_path_factory.mktemp("real")
    cases = [(ranks, ["data.max_bytes=200000", *more]) for ranks, more in REAL]
    processes = [
        forked.CONTEXT.Process(target=plan_ranks.steps, args=(rank, folder, cases, cache["SIGMA_CACHE"]))
        for rank in range(max(ranks for ranks, _ in REAL))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    for process in processes:
        process.kill()
    return [
        [json.loads((folder / str(case) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
        for case, (ranks, _) in enumerate(REAL)
    ]


@pytest.fixture(params=range(len(REAL)), ids=[f"{ranks} ranks" for ranks, _ in REAL])
def real(request, told) -> tuple[Config, Layout, list[dict]]:
    ranks, more = REAL[request.param]
    config = load_config("smoke", None, more)
    return config, layout(config, ranks, None, 8), told[request.param]


def routed_of(told: list[dict], rank: int, config: Config) -> list[list[Routed]]:
    """A rank's layers in each micro-step, from what all ranks' routers chose."""
    layers = [
        Routed(
            own["top_k"],
            sum(own["visits"]),
            sum(one["visits"][rank] for one in of_all),
            sum(one["choices"][rank] for one in of_all),
        )
        for own, *of_all in zip(told[rank]["routed"], *(found["routed"] for found in told), strict=True)
    ]
    L = config.model.num_layers
    micros = [layers[i : i + L] for i in range(0, len(layers), L)]
    assert len(micros) == config.train.grad_accum
    return micros


def test_every_byte_that_a_step_hands_over_is_foreseen(real):
    """Defends: a collective that the plan does not know, a padded shard, a factor of accumulation, a dtype."""
    config, where, told = real
    for rank, found in enumerate(told):
        want_calls, want_bytes = Counter(), Counter()
        routed = list(itertools.chain(*routed_of(told, rank, config)))
        for c in collectives(config, shapes(config), where, routed):
            want_calls[c.kind, c.dtype] += c.calls
            want_bytes[c.kind, c.dtype] += c.handed
        calls, handed = Counter(), Counter()
        for c in found["calls"]:
            calls[c["kind"], c["dtype"]] += 1
            handed[c["kind"], c["dtype"]] += c["bytes"]
        assert calls == want_calls
        assert handed == want_bytes


def test_no_rank_gets_more_than_the_worst(real):
    """And each kind of message has the sizes that are planned for it, not only their sum."""
    config, where, told = real
    for rank in range(where.ranks):
        layers = list(itertools.chain(*routed_of(told, rank, config)))
        of_kind = {
            c.what: c for c in collectives(config, shapes(config), where, layers) if c.part == EXCHANGE
        }
        row = config.model.hidden_size * (2 if config.train.dtype == "bf16" else 4)
        own = [call["visits"][rank] for call in told[rank]["routed"]]  # stay on the rank
        sent, received = sum(x.sent for x in layers), sum(x.received for x in layers)
        assert of_kind["dispatch"].handed == of_kind["combine, backward"].handed == sent * row
        assert of_kind["combine"].handed == of_kind["dispatch, backward"].handed == received * row
        assert (
            0 < (received - sum(own)) * row <= of_kind["dispatch"].most == of_kind["combine, backward"].most
        )
        assert 0 < (sent - sum(own)) * row <= of_kind["combine"].most == of_kind["dispatch, backward"].most
        choices = of_kind["choices beside rows"]
        assert choices.handed == 4 * sum(x.sent * x.top_k for x in layers if x.top_k > 1)
        assert choices.most * row == 4 * 3 * of_kind["dispatch"].most // 2, "one of two layers, three choices"


def test_the_worst_is_what_a_rank_can_get():
    """All tokens of all others come to one rank; one rank's tokens go to as many as they have choices."""
    config = load_config("smoke", None, ["model.top_k=[3,1]", "train.grad_accum=2"])
    sizes = shapes(config)
    T, row = 8 * 64, 64 * 4
    worst = {c.what: c.most for c in collectives(config, sizes, Layout(4, 4, 8))}
    assert worst["dispatch"] == 2 * 2 * 3 * T * row
    assert worst["combine"] == 2 * (3 + 1) * T * row
    assert worst["weights beside rows"] == 2 * 3 * T * 3 * 4
    assert worst["weights, backward"] == 2 * 3 * T * 3 * 4
    assert worst["counts before dispatch"] is None
    two = {c.what: c.most for c in collectives(config, sizes, Layout(2, 2, 8))}
    assert two["combine"] == 2 * (1 + 1) * T * row, "there is but one other rank"


@pytest.mark.parametrize("E, here, k", [(8, 2, 3), (6, 3, 3), (8, 1, 4), (6, 2, 1), (6, 2, 5), (4, 4, 2)])
def test_expected_visits_by_enumeration(E, here, k):
    """Of all choices of k among E without repetition, those that touch a rank; then with a busy expert on it."""
    chosen = list(itertools.combinations(range(E), k))
    visiting = [min(c) < here for c in chosen]
    assert share_of_visits(E, here, k) == Fraction(sum(visiting), len(chosen))
    assert share_of_rows(E, here, k) == Fraction(here, E)
    load = Fraction(E, k) * 3 / 4  # three tokens of four choose expert 0, the others do not
    with_busy = [c for c in chosen if c[0] == 0]
    without = [c for c in chosen if c[0] != 0]
    touch, rows = (
        [Fraction(sum(f(c) for c in part), len(part)) for part in (with_busy, without)]
        for f in (lambda c: c[0] < here, lambda c: sum(e < here for e in c))
    )
    assert share_of_visits(E, here, k, load) == touch[0] * Fraction(3, 4) + touch[1] / 4
    assert share_of_rows(E, here, k, load) * k == rows[0] * Fraction(3, 4) + rows[1] / 4


def test_balanced_routing_sends_what_is_expected():
    """Against torch's own draws without repetition: the mean of tokens, within five of its standard errors."""
    E, Q, k, T = 64, 16, 4, 20_000
    drawn = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).topk(k).indices // (E // Q)
    visits = torch.zeros(T, Q).scatter_(1, drawn, 1.0).sum(1)
    config = load_config("smoke", None, [f"model.num_experts={E}", f"model.top_k={k}"])
    sizes = shapes(config)
    (layer, _) = expected(config, sizes, Layout(Q, Q, 8), T)
    assert layer.sent == layer.received
    assert layer.rows == T * k
    assert abs(layer.sent / T - visits.mean()) < 5 * visits.std() / math.sqrt(T)
    dispatch = next(c for c in collectives(config, sizes, Layout(Q, Q, 8)) if c.what == "dispatch")
    assert dispatch.handed == 2 * round(512 * layer.sent / T) * 64 * 4


def test_every_rank_holds_what_is_foreseen(real):
    config, where, told = real
    sizes = shapes(config)
    for rank, found in enumerate(told):
        own = held(sizes, where, rank)
        assert (found["weights"], found["gradients"]) == (4 * own, 4 * own)
        copied = copies(config, sizes, where)
        micros = routed_of(told, rank, config)
        assert found["kept"] == sum(activations(config, sizes, where, m, 4) + copied for m in micros)
    first, foreseen = told[0], memory(config, sizes, where)
    assert (first["weights"], first["gradients"]) == (foreseen.weights, foreseen.gradients)
    assert first["moments"] == foreseen.moments
    assert max(found["weights"] for found in told) == foreseen.weights
