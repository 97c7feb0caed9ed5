"""Row sampling against its formulas, and WTA-CRS's choice against a search by hand."""

import oracle as reference
import pytest
import torch
from estimator_checks import ROWS, assert_unbiased, assert_variance, data, draws, estimate, key

from basis import RowSampling
from basis.estimators.row_sampling import PARTS, probabilities

COUNT = 2400


def heavy() -> tuple[torch.Tensor, torch.Tensor]:
    """Data with two rows of large norm."""
    x, dy = data()
    x = x.clone()
    x[[4, 17]] *= 12
    return x, dy


@pytest.mark.parametrize("kept", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ["uniform", "crs", "wta_crs"])
def test_unbiased_and_variance_as_derived(scheme: str, kept: int) -> None:
    x, dy = heavy()
    estimates = draws(RowSampling(kept, scheme), x, dy, COUNT)
    assert_unbiased(estimates, dy.t() @ x)
    p = reference.row_probabilities(x, 1 / PARTS)
    assert_variance(
        estimates, dy.t() @ x, reference.sampling_variance(x, dy, kept, scheme, p), 0.07
    )


def test_schemes_differ_as_they_should_on_rows_of_unequal_norm() -> None:
    x, dy = heavy()
    p = reference.row_probabilities(x, 1 / PARTS)
    uniform, crs, wta = (
        reference.sampling_variance(x, dy, 7, scheme, p) for scheme in ("uniform", "crs", "wta_crs")
    )
    assert wta < 0.8 * crs < 0.5 * uniform


@pytest.mark.parametrize("scheme", ["crs", "wta_crs"])
def test_systematic_draws_are_unbiased(scheme: str) -> None:
    x, dy = heavy()
    estimates = draws(RowSampling(6, scheme, "systematic"), x, dy, COUNT)
    assert_unbiased(estimates, dy.t() @ x)


def test_probabilities_are_the_references_and_never_zero() -> None:
    x, _ = heavy()
    torch.testing.assert_close(probabilities(x), reference.row_probabilities(x, 1 / PARTS))
    torch.testing.assert_close(probabilities(0 * x), torch.full((ROWS,), 1 / ROWS).double())
    assert probabilities(x.bfloat16()).sum() == pytest.approx(1)


def test_wta_keeps_the_largest_for_certain_with_weight_one() -> None:
    x, _ = heavy()
    for i in range(50):
        index, weight = RowSampling(5, "wta_crs").sample(x, key(i))
        assert {4, 17} <= set(index[:2].tolist())
        assert weight[:2].tolist() == [1, 1]
        assert not {4, 17} & set(index[2:].tolist())
        assert (weight[2:] > 1).all()


def test_uniform_rows_are_different_ones() -> None:
    x, _ = heavy()
    assert all(
        len(set(RowSampling(20, "uniform").sample(x, key(i))[0].tolist())) == 20 for i in range(20)
    )


@pytest.mark.parametrize("scheme", ["uniform", "crs", "wta_crs"])
@pytest.mark.parametrize("kept", [ROWS, 3 * ROWS])
def test_all_rows_are_exact(scheme: str, kept: int) -> None:
    x, dy = heavy()
    torch.testing.assert_close(estimate(RowSampling(kept, scheme), x, dy, key(1)), dy.t() @ x)
