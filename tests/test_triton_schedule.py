"""Which tile an expert's rows fall to: every row is computed whatever its expert's count."""

import pytest
import torch
from support import assert_close, tolerance

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.triton import tiles

EDGES = [0, 1, 15, 16, 17, 32, 33, 64, 65, 128, 129, 0]  # rows of the tiles, and one to either side


@pytest.fixture(autouse=True)
def tables_read_anew():
    tiles._row_tile.cache_clear()
    yield
    tiles._row_tile.cache_clear()


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("E", [4, 12, 24, 96])
def test_counts_at_the_edges_of_every_tile(backend, monkeypatch, architecture, E):
    """Defends: an expert without a tile, or a last tile of one row, with the block sizes of a GPU."""
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


@pytest.mark.parametrize(
    "R, rows", [(0, 16), (96 * 8, 16), (96 * 8 + 1, 32), (96 * 48, 32), (96 * 48 + 1, 128), (10**6, 128)]
)
def test_the_mean_decides_the_height_of_a_tile(R, rows):
    assert tiles.row_tile(1024, 1024, R, 96, torch.bfloat16, torch.device("cpu")).rows == rows


def test_there_are_programs_for_every_tile_or_for_every_processor():
    """Defends: a grid that is empty where rows are, or full where no tile can be."""
    device = torch.device("cpu")
    tile = tiles.row_tile(64, 64, 40, 8, torch.float32, device)
    assert tile.rows == 16
    assert tile.programs(40, 8, 64, device) == 6, "three for each processor, though ten tiles can be"
    assert tile.programs(2, 8, 64, device) == 2, "two rows are of two experts at most"
    assert tile.programs(0, 8, 64, device) == 0
