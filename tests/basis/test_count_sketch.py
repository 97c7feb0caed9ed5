"""Count sketch against its formula and BASIS' ablation; RMM and it with as many rows as X has."""

from collections.abc import Callable

import oracle as reference
import pytest
import torch
from estimator_checks import (
    ROWS,
    assert_unbiased,
    assert_variance,
    data,
    draws,
    estimate,
    key,
    relative,
)

from basis import BalancedSketch, CountSketch, Gaussian
from basis.estimator import Estimator
from basis.ops.hashing import draw_hashing
from basis.ops.noise import encode_hashing

COUNT = 1800


@pytest.mark.parametrize("rank", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_count_sketch(rank: int) -> None:
    x, dy = data()
    estimates = draws(CountSketch(rank), x, dy, COUNT)
    assert_unbiased(estimates, dy.t() @ x)
    assert_variance(estimates, dy.t() @ x, reference.variance(x, dy, rank, "uniform"))


@pytest.mark.parametrize("rank", [1, 7, ROWS - 1])
def test_count_sketch_is_basis_without_its_additions(rank: int) -> None:
    x, dy = data()
    plain = BalancedSketch(rank, hashing="uniform", invariant_scalars=False)
    assert torch.equal(estimate(CountSketch(rank), x, dy, key(1)), estimate(plain, x, dy, key(1)))
    codes = encode_hashing(*draw_hashing(key(5), ROWS, rank, "uniform"))
    given, drawn = (estimate(CountSketch(rank), x, dy, k) for k in (codes, key(5)))
    torch.testing.assert_close(given, drawn, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [ROWS, 100])
def test_as_many_bins_as_rows_hash_only_if_a_key_says_how(rank: int) -> None:
    """Given bins in which rows meet are obeyed, in forward, in backward and in the factors: BASIS'
    ablation with the same key.
    """
    x, dy = data()
    codes = encode_hashing(*draw_hashing(key(5), ROWS, ROWS, "uniform"))
    given = estimate(BalancedSketch(rank, hashing="uniform", invariant_scalars=False), x, dy, codes)
    assert torch.equal(estimate(CountSketch(rank), x, dy, codes), given)
    factors = CountSketch(rank).factors(CountSketch(rank).compress(x, codes, {}), ROWS)
    torch.testing.assert_close((factors.left.t() @ dy).t() @ factors.right, given)
    assert float((given - dy.t() @ x).norm() / (dy.t() @ x).norm()) > 0.1


@pytest.mark.parametrize("rank", [ROWS, 100])
@pytest.mark.parametrize("kind", [CountSketch, Gaussian, lambda rank: Gaussian(rank, "rademacher")])
def test_as_many_rows_as_x_has_are_exact(kind: Callable[[int], Estimator], rank: int) -> None:
    """Whatever the key, in each precision: the product of the very same numbers, to its rounding.
    One row fewer is noisy.
    """
    x, dy = data()
    for dtype, tolerance in (
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-8),
    ):
        low_x, low_dy = x.to(dtype), dy.to(dtype)
        exact = low_dy.double().t() @ low_x.double()
        for seed in range(3):
            estimator = kind(rank)
            got = estimate(estimator, low_x, low_dy, key(seed))
            assert got.dtype == dtype
            assert relative(got, exact) < tolerance
            factors = estimator.factors(estimator.compress(low_x, key(seed), {}), ROWS)
            assert relative(factors.left.t() @ low_dy, exact.t()) < tolerance
            assert factors.right is None
    assert relative(estimate(kind(ROWS - 1), x, dy, key(0)), dy.t() @ x) > 0.1
