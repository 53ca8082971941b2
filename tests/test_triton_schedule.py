"""Which launch and which tile an expert's rows fall to: every row is computed whatever its expert's count."""

import pytest
import torch
from support import assert_close, tolerance

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.triton import tiles

EDGES = [0, 1, 15, 16, 17, 32, 33, 64, 65, 128, 129, 0]  # rows of the tiles, and one to either side


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("E", [4, 12, 24, 96])
def test_counts_at_the_edges_of_every_tile(backend, monkeypatch, architecture, E):
    """Defends: an expert that falls between two launches, or a last tile of one row, with the block sizes of a GPU."""
    monkeypatch.setitem(tiles.TABLE, ("interpreter", 4), tiles.TABLE[architecture, 4])
    counts = torch.zeros(E, dtype=torch.int32)
    counts[torch.randperm(E)[: len(EDGES)]] = torch.tensor(EDGES, dtype=torch.int32)[:E]
    if E == 4:
        counts = torch.tensor([129, 0, 257, 130], dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    x, weight = torch.randn(int(counts.sum()), 20), torch.randn(E, 24, 20)
    got, want = (
        sk.grouped_gemm(x, weight, offsets),
        reference.grouped_gemm(x.double(), weight.double(), offsets),
    )
    assert_close(got, want, tolerance(torch.float32, 20))


@pytest.mark.parametrize("R", [0, 1, 16, 17, 96 * 8, 96 * 8 + 1, 96 * 32, 96 * 128, 96 * 129, 10**6])
def test_every_count_has_one_launch(R):
    launches = tiles.row_tiles(1024, 1024, R, 96, torch.bfloat16, torch.device("cpu"))
    for count in {min(R, c) for c in (1, 16, 17, 32, 33, 64, 65, 128, 129, 10**6)} - {0}:
        assert sum(tile.least < count <= tile.most for tile in launches) == 1
    assert len(launches) <= 2


def test_there_are_programs_for_every_tile_or_for_every_processor():
    """Defends: a grid that is empty where rows are, or full where no tile can be."""
    device = torch.device("cpu")
    light, heavy = tiles.row_tiles(64, 64, 40, 8, torch.float32, device)
    assert (light.rows, heavy.rows) == (16, 64)
    assert light.programs(40, 8, 64, device) == 4, "two for each processor, though ten tiles can be"
    assert heavy.programs(40, 8, 64, device) == 2, "two experts can have more than 16 of 40 rows"
    assert heavy.programs(16, 8, 64, device) == 0
