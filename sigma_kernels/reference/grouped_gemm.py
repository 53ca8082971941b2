"""One matrix product per expert, defined."""

from torch import Tensor


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor, *, transpose_weight: bool = True) -> Tensor:
    """y[r] = x[r] @ weight[e].T (or @ weight[e]) for the rows r of each expert e."""
    matrices = weight.transpose(1, 2) if transpose_weight else weight
    y = x.new_zeros(x.shape[0], matrices.shape[2])
    ends = offsets.tolist()
    for e in range(weight.shape[0]):
        rows = slice(ends[e], ends[e + 1])
        y[rows] = x[rows] @ matrices[e]
    return y


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = a[rows of e].T @ b[rows of e]: [E, A, B] from a [R, A] and b [R, B]; zero for an idle expert."""
    ends = offsets.tolist()
    out = a.new_zeros(len(ends) - 1, a.shape[1], b.shape[1])
    for e in range(len(ends) - 1):
        rows = slice(ends[e], ends[e + 1])
        out[e] = a[rows].T @ b[rows]
    return out
