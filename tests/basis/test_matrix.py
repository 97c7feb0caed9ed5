"""Reductions of tall matrices piece by piece, against the plain ones; 5,003 rows leave three over
from four pieces.
"""

import pytest
import torch

from basis.ops.matrix import _pieces, reduce_columns, tall_product


@pytest.mark.parametrize("rows", [7, 2048, 5003])
def test_columns_of_a_tall_matrix(rows: int) -> None:
    x = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[-1, 0], x[0, 1] = (
        9.0,
        9.0,
    )  # the largest of a column in the first piece, and among the rows left over
    assert torch.equal(reduce_columns(torch.amax, x), x.amax(0))
    torch.testing.assert_close(reduce_columns(torch.sum, x), x.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [7, 2048, 5003])
def test_product_of_tall_matrices(rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    b = torch.randn(rows, 10, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(tall_product(a, b), a.t() @ b, rtol=1e-12, atol=1e-11)
    low, other = a.bfloat16(), b.bfloat16()
    assert torch.equal(tall_product(low, other), low.t() @ other), (
        "low precision is rounded once, by one product"
    )


def test_the_sums_of_pieces_are_at_most_an_eighth_of_the_matrix() -> None:
    for width in (8, 64, 768, 4096):
        a = torch.empty(50257, 64, device="meta")
        pieces = _pieces(torch.empty(50257, 64), 8 * width)
        assert pieces == 1 or pieces * 64 * width <= a.numel() / 8
    assert _pieces(torch.empty(50257, 64)) == 49, "this vocabulary is reduced in pieces at all"
