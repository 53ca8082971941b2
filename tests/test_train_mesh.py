"""Meshes by configuration: groups of ranks that share experts, and groups that share the rest, are one run."""

import re

import forked
import pytest
import rank_faults as faults
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint
from test_train_checkpoint import codes, resumed_at, rows, run, whole  # noqa: F401 - a fixture
from test_train_ranks import assert_same_layers

CHECKED = "guard.check_every=1"  # copies that came apart by a bit would end the run


def test_all_meshes_are_the_same_run(cache, tmp_path, whole):  # noqa: F811
    """Defends: gradients of experts not added up over replicas, or averaged over too few, or counted once for each in
    the statistics of layers; a norm of one replica; parts of a checkpoint that a mesh alone can read, or that are
    missing as each replica left them to another; experts of a replica that are placed otherwise, or are read by
    another mesh, or in one process, as those of other numbers.
    """
    out = tmp_path / "run"
    placed = ["train.place_every=1", "train.save_every=1", CHECKED]
    a_step = ["train.time_budget_s=1e-9", *placed]
    meshes = [(4, "2", "2"), (2, "1", "none"), (2, "none", "1")]
    for step, (ranks, experts, shards) in enumerate(meshes):
        settings = [f"train.expert_ranks={experts}", f"train.shard_ranks={shards}"]
        results = run(ranks, out, cache, *settings, *(a_step if step < 2 else placed))
        assert codes(results) == [0] * ranks, results
        assert step == 0 or resumed_at(results) == step
    moved = rows(out, "experts_moved")
    assert moved.keys() == {1, 3, 4, 5}, "in the second step one rank has all"
    assert moved[1] > 0
    for name, bound in (("loss", 1e-5), ("grad_norm", 1e-3), ("val_bits_per_byte", 1e-5)):
        got, want = rows(out, name), rows(whole, name)
        assert got.keys() == want.keys()
        if name != "val_bits_per_byte":  # of more batches
            assert all(abs(got[step] - want[step]) <= bound * want[step] for step in want), name
    assert rows(out, "load") == rows(whole, "load")
    assert_same_layers(out, whole)
    got, want = (load_checkpoint(latest_checkpoint(run / "checkpoints")) for run in (out, whole))
    assert got.optim_state.keys() == want.optim_state.keys()
    for name, x in got.model_state.items():
        assert (x - want.model_state[name]).norm() <= 1e-3 * want.model_state[name].norm(), name


@pytest.mark.parametrize(
    "settings, fault, told",
    [
        (
            ["train.expert_ranks=2"],
            faults.another_expert_of_rank_3,
            "ranks 1 and 3 hold different layers.0.mlp.experts.down_proj of expert 7",
        ),
        (
            ["train.shard_ranks=1"],
            faults.another_embedding_of_rank_2,
            "rank 2 holds another embed_tokens.weight, part 0 of 1 than the other ranks",
        ),
    ],
    ids=["experts", "rest"],
)
def test_a_copy_that_came_apart_is_named(cache, tmp_path, settings, fault, told):
    """Defends: replicas that learn on from different weights."""
    results = run(4, tmp_path / "run", cache, *settings, CHECKED, fault=fault)
    assert codes(results) == [1] * 4
    assert results[0].stderr == f"error: step 3: {told}\n"


@pytest.mark.parametrize("what", ["eval_every", "sample_every"])
def test_a_copy_that_came_apart_is_named_after_a_forward_alone(cache, tmp_path, what):
    """Defends: weights that stay gathered after it, where a check does not see what the ranks hold."""
    settings = ["train.shard_ranks=1", "guard.check_every=1000", "train.save_every=3", f"train.{what}=3"]
    results = run(2, tmp_path / "run", cache, *settings, fault=faults.another_embedding_of_rank_1)
    assert codes(results) == [1] * 2
    told = "the ranks hold different embed_tokens.weight, part 0 of 1"
    assert results[0].stderr == f"error: step 3: {told}\n"


def test_an_expert_is_named_by_its_number_whatever_the_mesh_and_its_place(cache, tmp_path):
    """Defends: numbers that count ranks which hold copies, or places."""
    settings = ["train.expert_ranks=2", "train.place_every=1", "train.save_every=1"]
    results = run(4, tmp_path / "run", cache, *settings, fault=faults.infinite_expert_7_in_a_copy)
    assert codes(results) == [1] * 4
    told = r"and so is the weight expert 7 of layers\.1\.mlp\.experts\.gate_up_proj \(rank [23]\)"
    assert re.search(told, results[0].stderr), results[0].stderr


WRONG = [
    (1, "train.expert_ranks=2", "train.expert_ranks must divide the 1 rank of this run, found 2"),
    (1, "train.shard_ranks=3", "train.shard_ranks must divide the 1 rank of this run, found 3"),
    (2, "train.expert_ranks=3", "train.expert_ranks must divide the 2 ranks of this run, found 3"),
    (
        1,
        "train.expert_ranks=0",
        "train.expert_ranks must be an integer from 1 to 1000000000, or none, found 0",
    ),
]


@pytest.mark.parametrize("ranks, setting, message", WRONG, ids=str)
def test_a_mesh_that_cannot_be_is_refused(cache, tmp_path, ranks, setting, message):
    results = run(ranks, tmp_path / "run", cache, setting)
    assert codes(results) == [2] * ranks
    assert results[0].stderr == f"error: {message}\n"


def test_experts_that_such_groups_cannot_share_are_refused(cache, tmp_path):
    settings = ["train.expert_ranks=2", "model.num_experts=7"]
    results = run(2, tmp_path / "run", cache, *settings)
    message = "model.num_experts must be a multiple of train.expert_ranks = 2, found 7"
    assert (codes(results), results[0].stderr) == ([2] * 2, f"error: {message}\n")
    results = run(2, tmp_path / "run", cache, "model.num_experts=7", "train.expert_ranks=none")
    message = "model.num_experts must be a multiple of the 2 ranks of this run, found 7"
    assert (codes(results), results[0].stderr) == ([2] * 2, f"error: {message}\n")


def test_a_rank_refuses_before_it_meets_the_others(cache, tmp_path):
    """Defends: exit code 3 of a rank that was still joining, for settings that all of them refuse."""
    args = ["train", "--preset", "smoke", "--out", str(tmp_path / "run"), "--set", "model.num_experts=6"]
    with forked.Running(args, forked.environments(4, cache)[0]) as alone:
        result = alone.result(60)
    message = "model.num_experts must be a multiple of the 4 ranks of this run, found 6"
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")
