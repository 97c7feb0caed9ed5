"""Keyed noise: pure, distinct, uniform, balanced, the same under compile as in eager mode."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from basis.ops.hashing import draw_hashing
from basis.ops.noise import (
    Dither,
    derive,
    encode_hashing,
    fold,
    normal_rows,
    random_bits,
    sign_rows,
    uniform,
)


def key(*parts: int) -> torch.Tensor:
    return torch.tensor(fold(*parts))


def test_fold_separates_what_concatenation_would_confuse() -> None:
    keys = [
        fold(1, 23, "a"),
        fold(12, 3, "a"),
        fold(1, 2, 3, "a"),
        fold("1", 23, "a"),
        fold(1, 23, "b"),
        fold(23, 1, "a"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**62 for k in keys)
    assert fold(0, 1, 2, 3, "blocks.0.mlp.fc") == fold(0, 1, 2, 3, "blocks.0.mlp.fc")


def mix_in_python(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_bits_are_the_documented_hash() -> None:
    k = fold("any")
    expected = [mix_in_python(mix_in_python(row ^ (k % 2**32)) ^ (k >> 32)) for row in range(100)]
    assert random_bits(torch.tensor(k), 100).tolist() == expected


def test_bits_are_distinct_and_uniform() -> None:
    bits = random_bits(key(1), 1 << 18).numpy()
    assert len(np.unique(bits)) == len(bits)
    for shift in (0, 8, 16, 24):  # each byte of the integers, chi-square against uniform
        counts = np.bincount((bits >> shift) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 300), rank=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_balanced_bins_differ_by_one_at_most(rows: int, rank: int, seed: int) -> None:
    rank = min(rank, rows)
    bins, signs = draw_hashing(key(seed), rows, rank, "balanced")
    sizes = torch.bincount(bins, minlength=rank)
    assert sizes.sum() == rows
    assert sizes.max() - sizes.min() <= 1
    assert set(signs.tolist()) <= {-1, 1}


@pytest.mark.parametrize("hashing", ["balanced", "uniform"])
def test_rows_share_bins_as_often_as_the_formula_says(hashing: str) -> None:
    from oracle import collision_probability

    rows, rank, draws = 11, 4, 4000  # 11 = 2 * 4 + 3: bins of two sizes
    together = torch.zeros(rows, rows)
    signs_product = torch.zeros(rows, rows)
    for i in range(draws):
        bins, signs = draw_hashing(key(i), rows, rank, hashing)
        together += bins[:, None] == bins[None]
        signs_product += signs[:, None] * signs[None]
    p = collision_probability(rows, rank, hashing)
    off_diagonal = ~torch.eye(rows, dtype=torch.bool)
    z = (together / draws - p)[off_diagonal] / (p * (1 - p) / draws) ** 0.5
    assert z.abs().max() < 4.5  # 55 pairs
    assert (signs_product / draws)[off_diagonal].abs().max() < 4.5 / draws**0.5


def test_hashing_of_neighbouring_keys_is_independent() -> None:
    a = torch.stack([draw_hashing(key(step), 64, 8, "balanced")[1] for step in range(500)]).double()
    correlation = torch.corrcoef(a) - torch.eye(500)
    assert correlation.abs().max() < 0.7
    assert correlation.square().mean().sqrt() == pytest.approx(1 / 64**0.5, rel=0.05)


def test_explicit_hashing_passes_through() -> None:
    bins, signs = torch.tensor([3, 0, 1]), torch.tensor([-1.0, 1.0, -1.0])
    got_bins, got_signs = draw_hashing(encode_hashing(bins, signs), 3, 4, "balanced")
    assert torch.equal(got_bins, bins)
    assert torch.equal(got_signs, signs.long())


def uniform_rows(key: torch.Tensor, rows: slice, width: int) -> torch.Tensor:
    return Dither.middle() + Dither.unit() * Dither(key, 2000, width)[rows]


@pytest.mark.parametrize("make", [normal_rows, sign_rows, uniform_rows])
@pytest.mark.parametrize("width", [1, 6, 33])
def test_rows_of_a_matrix_are_those_of_the_whole(make, width: int) -> None:
    whole = make(key(1), slice(0, 50), width)
    assert whole.shape == (50, width)
    assert whole.dtype == torch.float32
    assert torch.equal(make(key(1), slice(13, 29), width), whole[13:29])
    assert not torch.equal(make(key(2), slice(0, 50), width), whole)


def test_matrices_have_their_distributions() -> None:
    rows = slice(0, 2000)
    normal = normal_rows(key(1), rows, 51).double()
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    uniform_ = uniform_rows(key(1), rows, 51).double()
    assert stats.kstest(uniform_.flatten().numpy(), "uniform").pvalue > 1e-3
    assert 0 < uniform_.min() < uniform_.max() < 1
    assert set(sign_rows(key(1), rows, 51).unique().tolist()) == {-1, 1}
    for matrix in (normal, sign_rows(key(1), rows, 51).double()):
        for other in (
            matrix,
            matrix.square() - matrix.square().mean(),
        ):  # columns, and their squares, are uncorrelated
            if other.std() > 0:
                correlation = torch.corrcoef(other.t()) - torch.eye(51)
                assert correlation.abs().max() < 5 / 2000**0.5
        assert abs(float(matrix.mean())) < 4.5 / matrix.numel() ** 0.5


def test_noise_to_round_with_is_independent_down_a_column_and_has_full_rank() -> None:
    """Each residue as often in every column; no direction of the matrix holds more than independent
    numbers would put there.
    """
    rows, width = 4096, 96
    u = Dither.middle() + Dither.unit() * Dither(key(3), rows, width)[0:rows].double()
    assert 0 < u.min() < u.max() < 1
    for column in u.t():
        counts = np.bincount((column.numpy() * 64).astype(int), minlength=64)
        assert stats.chisquare(counts).pvalue > 1e-4
        lagged = torch.corrcoef(torch.stack((column[1:], column[:-1])))[0, 1]
        assert abs(lagged) < 4.5 / rows**0.5
    whole = Dither(key(3), 1, width)
    whole._rows = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)[:, None]
    assert all(len(column.unique()) == 1 << 16 for column in whole[0 : 1 << 16].t()), (
        "every residue once"
    )
    pairs = torch.corrcoef(u.t())[torch.triu(torch.ones(width, width, dtype=torch.bool), 1)]
    assert (pairs.abs() > 5 / rows**0.5).double().mean() < 0.005  # 28 of 2^15 ratios
    sums = (u - 0.5).sum(0) / (rows / 12) ** 0.5  # of 96 columns: as scattered as 96 normal numbers
    assert stats.kstest(sums.numpy(), "norm").pvalue > 1e-3
    for wave in (
        1,
        2,
        3,
    ):  # an error is a periodic function of t + u: its waves, then, for t nearly constant
        largest = torch.linalg.svdvals(torch.exp(2j * math.pi * wave * u))[0] / (
            rows**0.5 + width**0.5
        )
        assert largest < 1.05  # a sum of a row's and a column's number, modulo 1, would make it 8


def test_uniform_in_double_has_fifty_two_bits() -> None:
    u = uniform(key(1), 100_000, torch.float64)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    different = 2**20 * (1 - math.exp(-100_000 / 2**20))  # of 100,000 numbers of 20 bits
    assert len((u * 2**32).frac().unique()) == pytest.approx(different, rel=0.003)


def test_derived_keys_share_nothing_with_each_other_or_their_origin() -> None:
    origin = key(1)
    keys = [
        origin,
        *(derive(origin, i) for i in range(4)),
        derive(key(2), 0),
        derive(derive(origin, 0), 0),
    ]
    assert all(0 <= int(k) < 2**62 for k in keys)
    found = torch.cat([random_bits(k, 1000) for k in keys])
    assert len(found.unique()) > len(found) - 5
