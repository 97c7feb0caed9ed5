"""Methods that multiply X by a random matrix from the left, against their formulas: count sketch,
RMM, BASIS with `center`.
"""

from collections.abc import Callable

import oracle as reference
import pytest
import torch
from estimator_checks import (
    IN,
    OUT,
    ROWS,
    assert_unbiased,
    assert_variance,
    bias_in_deviations,
    data,
    draws,
    estimate,
    key,
    relative,
)

from basis import BalancedSketch, CountSketch, Gaussian
from basis.estimator import Estimator
from basis.ops.noise import draw_hashing, encode_hashing, normal_rows, sign_rows

COUNT = 3000


@pytest.mark.parametrize("rank", [1, 6])
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
    assert torch.equal(
        estimate(CountSketch(rank), x, dy, codes), estimate(CountSketch(rank), x, dy, key(5))
    )


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


@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_rmm(distribution: str, rank: int) -> None:
    x, dy = data()
    estimates = draws(Gaussian(rank, distribution), x, dy, COUNT)
    assert_unbiased(estimates, dy.t() @ x)
    assert_variance(
        estimates, dy.t() @ x, reference.projection_variance(x, dy, rank, distribution), 0.06
    )


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_rmm_in_blocks_of_rows_is_one_product(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy = data(43)
    matrix = (normal_rows if distribution == "gaussian" else sign_rows)(
        key(2), slice(0, 43), 5
    ).double()
    expected = (matrix.t() @ dy).t() @ (matrix.t() @ x) / 5
    for cached in (1, 5 * 16, 1 << 16):  # blocks of 8, 16 and 43 rows
        monkeypatch.setattr("basis.ops.matrix._CACHED", cached)
        torch.testing.assert_close(estimate(Gaussian(5, distribution), x, dy, key(2)), expected)


@pytest.mark.parametrize("hashing", ["balanced", "uniform"])
def test_centred_basis_without_scalars_is_unbiased_and_has_the_variance_of_what_is_left(
    hashing: str,
) -> None:
    x, dy = data()
    x = x + 3
    estimates = draws(
        BalancedSketch(6, hashing=hashing, invariant_scalars=False, center=True), x, dy, COUNT
    )
    assert_unbiased(estimates, dy.t() @ x)
    expected = reference.variance(x - x.mean(0), dy, 6, hashing)
    assert_variance(estimates, dy.t() @ x, expected)
    assert expected < 0.2 * reference.variance(x, dy, 6, hashing)


def test_centred_basis_by_the_reference() -> None:
    x, dy = data()
    bins, signs = draw_hashing(key(1), ROWS, 6, "balanced")
    mean = x.mean(0)
    left = reference.weight_grad(
        x - mean, dy, bins, signs, 6, invariant_scalars=True, shrinkage=0.25
    )
    got = estimate(BalancedSketch(6, shrinkage=0.25, center=True), x, dy, key(1))
    torch.testing.assert_close(got, left + torch.outer(dy.sum(0), mean), rtol=1e-10, atol=1e-10)


def test_centring_makes_equal_rows_exact() -> None:
    _, dy = data()
    x = torch.arange(1.0, IN + 1).double().expand(ROWS, IN).contiguous()
    got = estimate(BalancedSketch(1, shrinkage=0.5, center=True), x, dy, key(1))
    torch.testing.assert_close(got, dy.t() @ x, rtol=1e-12, atol=1e-12)
    assert got.shape == (OUT, IN)


def test_the_bias_test_sees_a_bias_of_a_tenth() -> None:
    x, dy = data()
    estimates = draws(BalancedSketch(6, invariant_scalars=False, shrinkage=0.05), x, dy, COUNT)
    largest, typical = bias_in_deviations(estimates, dy.t() @ x)
    assert largest > 4.5
    assert typical > 2.2
