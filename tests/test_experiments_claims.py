"""The page of `sigma experiment balance` claims this: trained again, its size, one seed; minutes, by .ci/nightly."""

import os

import pytest
from rich.console import Console
from sigma_experiments import balance, sparse
from sigma_experiments.lab import Lab, Run

pytestmark = pytest.mark.acceptance
SEED = int(os.environ.get("SIGMA_FRESH_SEED", "0"))
TOP = sparse.LAYERS - 1


@pytest.fixture(scope="module")
def final(tmp_path_factory, cache):
    """final(arm, statistic): of each layer, over the last two looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMA_CACHE", cache["SIGMA_CACHE"])
        lab = Lab(tmp_path_factory.mktemp("balance"), 1, False, 2, Console(quiet=True))
        runs = [Run(arm, SEED, {**sparse.BASE, **balance.ARMS[arm]}) for arm in ("plain", "stay")]
        trained = sparse.by_arm(lab.train(runs))
    return lambda arm, name: sparse.final(trained[arm], name)[0]


def test_the_plain_loss_is_blind_in_the_lowest_layer(final):
    """It is at its least, as p is even, while the load is uneven, and more so than in the highest layer."""
    assert 0.95 < final("plain", "balance_loss")[0] < 1.03
    assert final("plain", "router_entropy_of_mean")[0] > 0.995
    assert final("plain", "load_entropy")[0] < 0.96
    assert final("plain", "load_cv")[0] > 1.7 * final("plain", "load_cv_floor")[0]
    assert final("plain", "load_most")[0] >= 2 * final("plain", "load_most")[TOP]


def test_eight_experts_a_token_even_it_out(final):
    assert final("plain", "load_most")[0] >= 3 * final("stay", "load_most")[0]
