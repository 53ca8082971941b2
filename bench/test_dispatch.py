"""Tokens to the ranks of their experts and back, without the experts."""

import oracle
import pytest
import shapes
import torch
from peer_dispatch import calls_of, rows_of_visits
from ranks import several
from shapes import A

SHAPES = [
    shapes.replace(A, name="dispatch", T=T, k=k) for k in (1, 8) for T in (64, 512, 2048)
]  # T of each rank


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dispatch(race, device, shape, ranks, direction):
    if device.type != "cpu":
        pytest.skip("over gloo, between processes of a CPU")
    shape = shapes.replace(shape, E=-(-shape.E // ranks) * ranks)
    index = shapes.choices(shape, "balanced")
    moved = (
        (4 if direction != "forward" else 2)
        * sum(rows_of_visits(index, shape.E // ranks, ranks))
        * shape.H
        * 4
    )
    backward = direction != "forward"
    with several(ranks, calls_of, shape, backward) as calls, torch.no_grad():
        want = [t.detach() for t in calls["want"]()]

        def check(who, got):
            got = got if isinstance(got, list) else [got]
            oracle.assert_agrees(who, got, want[: len(got)], shape.H)

        with torch.enable_grad():
            race(
                f"dispatch and combine/{direction}/f32",
                calls["ours"],
                shape=shape,
                load=f"{ranks} ranks",
                check=check,
                index=index,
                moved=moved,
                note="GB/s: of the rows that a rank sends, each token once, those to itself among them; a thread "
                "a rank, and where these are more than the cores they take turns",
                bound_exchange=calls["exchange"],
                torch_index_select_all_to_all_index_add=calls["torch"],
            )
