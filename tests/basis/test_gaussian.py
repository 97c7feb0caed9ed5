"""RMM, X times a Gaussian or Rademacher matrix, against its formulas."""

import oracle as reference
import pytest
import torch
from estimator_checks import (
    assert_unbiased,
    assert_variance,
    data,
    draws,
    estimate,
    key,
)

from basis import Gaussian
from basis.ops.noise import normal_rows, sign_rows

COUNT = 1800


@pytest.mark.parametrize("rank", [6, pytest.param(1, marks=pytest.mark.slow)])
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
