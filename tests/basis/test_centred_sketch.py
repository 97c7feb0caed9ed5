"""BASIS with `center`, against its formulas."""

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
)

from basis import BalancedSketch
from basis.ops.hashing import draw_hashing

COUNT = 1800


@pytest.mark.parametrize("hashing", ["balanced", pytest.param("uniform", marks=pytest.mark.slow)])
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
