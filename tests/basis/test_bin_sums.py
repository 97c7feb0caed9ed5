"""The kernel of bin sums, in Triton's interpreter where there is no GPU, against float64."""

import estimator_checks as checks
import oracle
import pytest
import torch
from torch import Tensor

import basis
from basis.estimator import Estimator
from basis.ops import kernels
from basis.ops.hashing import own_hashing

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = [  # B, N, R
    (1, 1, 1),
    (37, 24, 5),  # bins of two sizes
    (64, 1, 8),
    (40, 600, 1),  # two blocks of columns, several programs for one bin
    (24, 7, 24),  # a row in each bin
    (530, 33, 3),
]


def far_from(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected.cpu()).norm() / expected.norm())


@pytest.mark.parametrize("layout", ["contiguous", "rows of a wider one", "column by column"])
@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
def test_sums_and_norms_are_those_of_the_formula(
    rows: int, width: int, rank: int, layout: str
) -> None:
    from basis.ops.triton.bin_sums import bin_sums

    x = torch.randn(rows, 2 * width + 1, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    x = x[:, 1 : width + 1] if layout == "rows of a wider one" else x[:, :width].contiguous()
    if layout == "column by column":
        x = x.t().contiguous().t()
    hashing = own_hashing(checks.key(rank).to(DEVICE), rows, x, rank, "balanced")
    order = hashing.places if not hashing.by_row else hashing.places.argsort().to(torch.int32)
    sums, norm, norm_of_sums = bin_sums(x, order, hashing.signs_of_places(x.dtype), rank)
    bins, signs = hashing.by_rows()
    expected = oracle.sketch_matrix(bins.cpu(), signs.cpu(), rank) @ x.double().cpu()
    assert far_from(sums, expected) < 1e-5
    assert far_from(norm, x.double().norm()) < 1e-5
    assert far_from(norm_of_sums, expected.norm()) < 1e-5


@pytest.mark.parametrize(
    "estimator",
    [basis.BalancedSketch(5), basis.BalancedSketch(3, shrinkage=0.1, center=True)],
    ids=str,
)
def test_an_estimate_by_the_kernel_is_that_of_plain_operators(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from basis.ops.triton import bin_sums as module

    calls = []
    monkeypatch.setattr(module, "_op", lambda *args: calls.append(args) or module._bin_sums(*args))
    x, dy = (t.float().to(DEVICE) for t in checks.data())
    key = checks.key(1).to(DEVICE)
    with kernels.forced(False):
        expected = checks.estimate(estimator, x, dy, key)
    with kernels.forced():
        found = checks.estimate(estimator, x, dy, key)
    assert len(calls) == 2  # forward and backward
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_given_hashing_goes_to_plain_operators() -> None:
    """Its bins may be of any size."""
    x, dy = (t.float().to(DEVICE) for t in checks.data())
    codes = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)  # all rows in the first bin
    with kernels.forced():
        found = checks.estimate(basis.BalancedSketch(3), x, dy, codes)
    expected = oracle.weight_grad(
        x.cpu(),
        dy.cpu(),
        codes.cpu(),
        torch.ones(len(x)),
        3,
        invariant_scalars=True,
        shrinkage=0.0,
    )
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=1e-4)
