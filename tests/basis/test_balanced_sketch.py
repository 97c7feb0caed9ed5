"""The estimator against its formulas: expectation, variance, norms, and the edges R >= B, B = 1,
zeros, low precision.
"""

import itertools
import math

import oracle as reference
import pytest
import torch
from reference_trace import relative_error

from basis import BalancedSketch
from basis.ops.hashing import draw_hashing, own_hashing
from basis.ops.matrix import frobenius_norm
from basis.ops.noise import encode_hashing, fold

ROWS, IN, OUT = 24, 5, 4


def data(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, IN, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randn(rows, OUT, generator=generator, dtype=torch.float64) * torch.linspace(
        0.2, 2, rows
    )[:, None]


def draws(estimator: BalancedSketch, count: int, rows: int = ROWS) -> torch.Tensor:
    x, dy = data(rows)
    return torch.stack(
        [
            estimator.weight_grad(estimator.compress(x, k, {}), dy)
            for k in (torch.tensor(fold("draw", i)) for i in range(count))
        ]
    )


@pytest.mark.parametrize(
    ("hashing", "rank"),
    [
        ("balanced", 5),
        ("uniform", 12),
        *(
            pytest.param(hashing, rank, marks=pytest.mark.slow)
            for hashing, rank in itertools.product(("balanced", "uniform"), (1, 5, 12))
            if (hashing, rank) not in {("balanced", 5), ("uniform", 12)}
        ),
    ],
)
def test_unbiased_and_variance_as_derived(hashing: str, rank: int) -> None:
    count = 1800
    x, dy = data()
    estimates = draws(BalancedSketch(rank, hashing=hashing, invariant_scalars=False), count)
    exact = dy.t() @ x
    z = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(count))
    assert z.abs().max() < 4.5  # 20 entries
    assert z.square().mean().sqrt() < 1.6
    errors = (estimates - exact).square().sum((1, 2))
    expected = reference.variance(x, dy, rank, hashing)
    standard_error = errors.std().item() / math.sqrt(count)
    assert abs(errors.mean().item() - expected) < 4.5 * standard_error
    assert standard_error < 0.05 * expected  # the comparison above is a sharp one


def test_balanced_variance_is_below_uniform_by_the_stated_factor() -> None:
    x, dy = data()
    for rank in (1, 2, 3, 4, 6, 8, 12, 24):  # divisors of 24: the closed form (B - R) / (B - 1)
        ratio = reference.variance(x, dy, rank, "balanced") / reference.variance(
            x, dy, rank, "uniform"
        )
        assert ratio == pytest.approx((ROWS - rank) / (ROWS - 1))
        assert reference.collision_probability(ROWS, rank, "balanced") == pytest.approx(
            (ROWS / rank - 1) / (ROWS - 1)
        )


def test_the_unbiasedness_test_sees_a_bias_of_a_tenth() -> None:
    count = 1800
    x, dy = data()
    estimates = draws(BalancedSketch(5, invariant_scalars=False, shrinkage=0.05), count)
    z = (estimates.mean(0) - dy.t() @ x) / (estimates.std(0) / math.sqrt(count))
    assert z.abs().max() > 4.5
    assert z.square().mean().sqrt() > 1.6


def test_invariant_scalars_are_biased() -> None:
    # Two equal rows of x in one bin, dy zero in the second: x~ is 2x or 0, restored to sqrt(2) x or
    # 0; dy^ is dy either way.
    x, dy = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [0.0]])
    estimator = BalancedSketch(1)
    estimates = [
        estimator.weight_grad(
            estimator.compress(x, encode_hashing(torch.zeros(2), torch.tensor([1, sign])), {}), dy
        ).item()
        for sign in (1, -1)
    ]
    assert estimates == pytest.approx([math.sqrt(2), 0.0])  # mean 0.707, while dW = 1


@pytest.mark.parametrize("hashing", ["balanced", "uniform"])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_invariant_scalars_restore_thefrobenius_norm(rank: int, hashing: str) -> None:
    x, _ = data()
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        sketch = BalancedSketch(rank, hashing=hashing).sketch(x.to(dtype), torch.tensor(fold(1)))
        assert sketch.dtype == dtype
        assert sketch.double().norm().item() == pytest.approx(
            x.to(dtype).double().norm().item(), rel=tolerance
        )


@pytest.mark.parametrize("invariant_scalars", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 8, 9, 24, 100])
@pytest.mark.parametrize("rows", [1, 24, 25])
def test_matches_the_float64_reference(rows: int, rank: int, invariant_scalars: bool) -> None:
    x, dy = data(rows)
    estimator = BalancedSketch(rank, invariant_scalars=invariant_scalars, shrinkage=0.25)
    key = torch.tensor(fold(rows, rank))
    bins, signs = draw_hashing(key, rows, min(rank, rows), "balanced")
    expected = reference.weight_grad(
        x, dy, bins, signs, rank, invariant_scalars=invariant_scalars, shrinkage=0.25
    )
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        x_, dy_ = x.to(dtype), dy.to(dtype)
        assert (
            relative_error(estimator.weight_grad(estimator.compress(x_, key, {}), dy_), expected)
            < tolerance
        )


@pytest.mark.parametrize("rank", [24, 100])
def test_rank_of_all_rows_is_exact_up_to_shrinkage(rank: int) -> None:
    x, dy = data()
    estimator = BalancedSketch(rank, shrinkage=0.01)
    estimate = estimator.weight_grad(estimator.compress(x, torch.tensor(5), {}), dy)
    torch.testing.assert_close(estimate, 0.99**2 * dy.t() @ x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("zero", ["x", "dy", "both"])
def test_zeros_give_zero_not_nan(zero: str) -> None:
    x, dy = data()
    x = x * 0 if zero in ("x", "both") else x
    dy = dy * 0 if zero in ("dy", "both") else dy
    estimator = BalancedSketch(3)
    assert torch.equal(
        estimator.weight_grad(estimator.compress(x, torch.tensor(1), {}), dy),
        torch.zeros(OUT, IN).double(),
    )


@pytest.mark.parametrize("rank", [1, 8, 9, 40])
def test_both_routes_to_the_sums_agree(rank: int) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    bins, signs = draw_hashing(torch.tensor(9), 40, rank, "uniform")
    hashing = own_hashing(torch.tensor(9), 40, x, rank, "uniform")
    expected = reference.sketch_matrix(bins, signs, rank) @ x.double()
    column_by_column = x.t().contiguous().t()
    for one in (x, column_by_column):
        torch.testing.assert_close(hashing.sums(one).double(), expected, rtol=1e-6, atol=1e-6)
    low = hashing.sums(x.bfloat16())
    assert (
        relative_error(low, reference.sketch_matrix(bins, signs, rank) @ x.bfloat16().double())
        < 3e-3
    )


def test_norms_of_low_precision_are_taken_in_float32() -> None:
    x = torch.full(
        (4096, 64), 1.0, dtype=torch.bfloat16
    )  # a bfloat16 sum of 262,144 ones stops at 256
    assert frobenius_norm(x).dtype == torch.float32
    assert frobenius_norm(x).item() == pytest.approx(512.0, rel=1e-6)


def test_norm_of_millions_of_elements_keeps_its_digits() -> None:
    x = torch.randn(
        256, 50257, generator=torch.Generator().manual_seed(0)
    )  # one float32 sum over them is off by a thousandth
    sketch = BalancedSketch(4).sketch(x, torch.tensor(1))
    assert sketch.double().norm().item() == pytest.approx(x.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 1, "hashing": "other"}, "hashing='other'"),
        ({"rank": 1, "shrinkage": 1.0}, "shrinkage=1.0"),
        ({"rank": 1, "shrinkage": -0.1}, "shrinkage=-0.1"),
        ({"rank": 1, "shrinkage": math.nan}, "shrinkage=nan"),
        ({"rank": 1, "eps": 0.0}, "eps=0.0"),
    ],
)
def test_wrong_options_are_named(options: dict, start: str) -> None:
    with pytest.raises(ValueError, match="^" + start.replace(".", r"\.")):
        BalancedSketch(**options)
