"""Reductions of tall matrices piece by piece, against the plain ones; 5,003 rows leave three over
from four pieces.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from basis.ops.matrix import reduce_columns, tall_product


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


class Made(TorchDispatchMode):
    """Counts the numbers of each tensor that an operator makes; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in given:
            self.sizes.append(made.numel())
        return made


@pytest.mark.parametrize("width", [8, 64, 768])
def test_the_sums_of_pieces_are_at_most_an_eighth_of_the_matrix(width: int) -> None:
    a, b = torch.ones(50257, 32), torch.ones(50257, width)
    with Made() as counted:
        tall_product(a, b)
    assert 32 * width < max(counted.sizes) <= a.numel() / 8  # it is done in pieces at all
    with Made() as counted:
        reduce_columns(torch.sum, a)
    assert 32 * 8 < max(counted.sizes) <= a.numel() / 24
