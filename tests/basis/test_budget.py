"""Budgets: bytes counted, knobs turned as far as they go, refusals in the words of the options."""

import pytest
import torch
from torch import nn

import basis
from basis.diagnostics.budget import (
    fit_budget,
    kept_bytes,
    parse_share,
    split_by_error,
    with_knob,
    within_budget,
)
from basis.estimator import Estimator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_a_layer_keeps(dtype: torch.dtype) -> None:
    assert kept_bytes(basis.BalancedSketch(5), 32, 16, dtype) == 5 * 16 * dtype.itemsize + 8
    assert kept_bytes(basis.Exact(), 32, 16, dtype) == 32 * 16 * dtype.itemsize


@pytest.mark.parametrize("share", [1 / 4, 1 / 8, 1 / 24])
def test_the_knob_is_the_largest_that_fits(share: float) -> None:
    rows, width = 768, 128
    rank = fit_budget(basis.BalancedSketch(1), share, rows, width).rank
    assert 4 * rank * width + 8 <= share * 4 * rows * width < 4 * (rank + 1) * width + 8


def test_options_other_than_the_knob_stay() -> None:
    fitted = fit_budget(basis.BalancedSketch(1, hashing="uniform", shrinkage=0.5), 1 / 8, 64, 32)
    assert (fitted.hashing, fitted.shrinkage) == ("uniform", 0.5)


def test_convert_gives_each_width_its_own() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    basis.convert(model, within_budget(basis.BalancedSketch(1), share=1 / 8, rows=256))
    for made in model:
        rank = made.estimator.rank
        assert (
            4 * rank * made.in_features + 8
            <= 256 * made.in_features * 4 / 8
            < 4 * (rank + 1) * made.in_features + 8
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_budget(basis.Exact(), 0.5, 8, 8), r"budget=0\.5: Exact has no option"),
        (
            lambda: fit_budget(basis.BalancedSketch(1), 1.5, 8, 8),
            r"budget=1\.5: must be in \(0, 1\]",
        ),
        (
            lambda: fit_budget(basis.BalancedSketch(1), 0.01, 8, 8),
            r"budget=0\.01: BalancedSketch keeps at least 1/6\.4 of an input of 8 x 8 \(rank=1\)",
        ),
        (lambda: parse_share("1/0"), r"budget=1/0: must be a share"),
        (lambda: parse_share("much"), r"budget=much: must be a share"),
        (lambda: parse_share("0"), r"budget=0: must be in \(0, 1\]"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_shares_are_fractions_or_numbers() -> None:
    assert parse_share("1/24") == pytest.approx(1 / 24)
    assert parse_share("0.125") == 0.125


ERRORS = {"a": (64, 9.0), "b": (64, 1.0), "c": (256, 4.0), "d": (16, 0.25)}


def kept(
    knobs: dict[str, int],
    estimator: Estimator,
    errors: dict[str, tuple[int, float]],
    rows: int,
) -> dict[str, int]:
    return {
        name: kept_bytes(with_knob(estimator, knobs[name]), rows, errors[name][0])
        for name in errors
    }


def test_a_split_budget_is_spent_and_no_other_split_has_less_error() -> None:
    """Of a method whose squared error is one over its bytes, `ERRORS` being those at `share`."""
    rows, share, sketch = 512, 1 / 8, basis.BalancedSketch(1)
    even = {
        name: kept_bytes(fit_budget(sketch, share, rows, width), rows, width)
        for name, (width, _) in ERRORS.items()
    }

    def summed_error(sizes: dict[str, float]) -> float:
        return sum(error * even[name] / sizes[name] for name, (_, error) in ERRORS.items())

    sizes = kept(split_by_error(sketch, ERRORS, share=share, rows=rows), sketch, ERRORS, rows)
    budget = share * rows * 4 * sum(width for width, _ in ERRORS.values())
    assert budget - 16 * 4 < sum(sizes.values()) <= budget  # to the smallest step that is left
    best = summed_error(sizes)
    assert best < 0.8 * summed_error(
        {name: share * rows * 4 * width for name, (width, _) in ERRORS.items()}
    )
    # Layers of equal width share as the roots of their errors.
    assert sizes["a"] / sizes["b"] == pytest.approx(3.0, rel=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = torch.rand(4, generator=generator, dtype=torch.float64) + 0.02
        other *= budget / other.sum()
        assert summed_error(dict(zip(ERRORS, other.tolist(), strict=True))) > 0.999 * best


@pytest.mark.parametrize(
    ("estimator", "share"),
    [
        pytest.param(
            estimator, share, marks=() if quick else pytest.mark.slow, id=f"{name}-{share}"
        )
        for estimator, name, quick in (
            (basis.Subspace(4), "Subspace", True),
            (basis.RowSampling(4), "RowSampling", True),
            (basis.Quantized(4), "Quantized", False),
            (basis.Transform(1.0), "Transform", False),
        )
        for share in (1 / 4, 1 / 8)
    ],
)
def test_a_split_budget_is_spent_by_every_kind_of_knob(estimator: Estimator, share: float) -> None:
    rows, errors = 768, {"a": (128, 0.9), "b": (128, 1.2), "c": (128, 0.9), "d": (512, 0.4)}
    sizes = kept(split_by_error(estimator, errors, share=share, rows=rows), estimator, errors, rows)
    uniform = {
        name: fit_budget(estimator, share, rows, width) for name, (width, _) in errors.items()
    }
    even = sum(kept_bytes(uniform[name], rows, width) for name, (width, _) in errors.items())
    budget = share * rows * 4 * sum(width for width, _ in errors.values())
    assert min(even, 0.9 * budget) <= sum(sizes.values()) <= budget


def test_a_layer_that_reads_more_rows_costs_as_many_times_more() -> None:
    """Experts of a mixture with two of them for each token: their bytes count twice."""
    rows, sketch = 512, basis.BalancedSketch(1)
    errors, times = {"dense": (64, 1.0), "experts": (64, 1.0)}, {"experts": 2.0}
    knobs = split_by_error(sketch, errors, share=1 / 8, rows=rows, times=times)
    budget = rows * 64 * 4 * (1 + 2) / 8
    sizes = kept(knobs, sketch, errors, rows)
    spent = sizes["dense"] + 2 * sizes["experts"]
    assert budget - 2 * 64 * 4 < spent <= budget
    # Sum of e b / b' is least for b' in proportion to sqrt(e b), b' and b with all their rows.
    assert 2 * sizes["experts"] / sizes["dense"] == pytest.approx(2**0.5, rel=0.05)


def test_no_layer_gets_less_than_its_smallest_setting_or_more_than_its_largest() -> None:
    rows, sketch = 32, basis.BalancedSketch(1)
    knobs = split_by_error(
        sketch,
        {"greedy": (16, 1e6), "modest": (16, 1e-9), "middle": (64, 1.0)},
        share=1 / 2,
        rows=rows,
    )
    assert knobs["greedy"] == rows
    assert 1 <= knobs["modest"] <= 4  # what is left over when nothing else fits
    assert knobs["middle"] == (96 * 32 * 4 // 2 - (32 + 1) * 16 * 4 - 3 * 8) // (64 * 4)
    even = split_by_error(sketch, {"a": (16, 0.0), "b": (16, 0.0)}, share=1 / 4, rows=rows)
    assert abs(even["a"] - even["b"]) <= 1  # nothing to go by
    for rows in (7, 100, 768):  # the least that a layer can keep is never refused
        split_by_error(
            basis.BalancedSketch(1), {"a": (192, 1.0), "b": (192, 1e-12)}, share=1 / 4, rows=rows
        )
