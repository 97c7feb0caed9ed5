"""Which entries of W the gradient follows, and with what weight: the rule of SUS, drawn from a key
in two ways.

An entry is kept with probability q = min(c W, 1) (arXiv 2505.15080; c is its "attention retention
parameter") and its weight is

    W~ = W / q = max(W, 1/c)  if kept,  0  if not
    E[W~] = W,  Var[W~] = W (1/c - W) where W < 1/c, else 0

Nothing is divided by a small probability: what is kept by chance weighs 1/c. Masked entries have W
= 0 and are never kept.

*Independent*: a number u in [0, 1) for each entry, kept if u < q. A row keeps sum q <= c entries on
average, with a variance of sum q (1 - q); u is a function of key, head, row and column.

*Systematic*: one u for each row. With C the cumulative sum of q along the row, the entries are kept
in whose interval (C_before, C] one of the points u, u + 1, u + 2, ... lies. Same probabilities, so
still no bias; the number kept is sum q rounded up or down, at most ceil(c) + 1 with the rounding of
C, hence a fixed width. Entries of one row are no longer independent: the number kept hardly varies
and neighbours exclude each other, which as a rule lowers the variance of sums along the row a
little.

In float32 the points must be exact, else entries that are always kept would be lost or counted
twice; so u has 23 bits less those of the width, 18 for c = 25, and the probability of an entry is
off by up to 4e-6 there, in either direction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from basis.ops.noise import crossed_bits, random_bits
from basis.sus.blocks import Heads


class Noise(NamedTuple):
    """Random 32-bit integers (int64) for rows (N, g, T) and columns (T,) of one attention."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, key: Tensor, heads: Heads) -> Noise:
        """From a 0-dimensional int64 key (ops/noise.py)."""
        shape = heads.q.shape[:3]
        bits = random_bits(key, shape.numel() + shape[-1])
        return cls(bits[: shape.numel()].view(shape), bits[shape.numel() :])

    def part(self, groups: slice, rows: slice) -> Noise:
        """That of a block's rows, (n, g r), with the columns up to its last row."""
        return Noise(self.rows[groups, :, rows].flatten(1), self.columns[: rows.stop])


class Entries(NamedTuple):
    """Kept entries of each row, `width` of them: column (..., width) int32, weight W~ (..., width)
    float32, 0 if unused.
    """

    column: Tensor
    weight: Tensor


def keep_probabilities(weights: Tensor, c: float) -> Tensor:
    """q = min(c W, 1)."""
    return (weights * c).clamp_(max=1.0)


def kept_weight(weights: Tensor, c: float) -> Tensor:
    """max(W, 1/c): what an entry weighs if it is kept."""
    return weights.clamp(min=1.0 / c)


def width(c: float, length: int) -> int:
    """Most entries that a row of `length` keeps by systematic sampling."""
    return min(math.ceil(c) + 1, length)


def independent_mask(weights: Tensor, c: float, noise: Noise) -> Tensor:
    """W~ (n, R, T), dense, from W (n, R, T): each entry by itself."""
    threshold = keep_probabilities(weights, c).double() * 2.0**32
    kept = crossed_bits(noise.rows, noise.columns) < threshold
    return torch.where(kept, kept_weight(weights, c), 0.0)


def systematic_entries(weights: Tensor, c: float, noise: Noise, most: int) -> Entries:
    """`most` entries (n, R, most), of which the last ones may be unused, from W (n, R, T): one draw
    for each row.
    """
    sums = keep_probabilities(weights, c).cumsum_(-1)
    bits = max(23 - most.bit_length(), 1)
    first = ((noise.rows >> (32 - bits)).float() + 0.5) * 2.0**-bits  # in (0, 1)
    points = first[..., None] + torch.arange(most, dtype=torch.float32, device=weights.device)
    column = torch.searchsorted(sums, points, out_int32=True).clamp_(max=weights.shape[-1] - 1)
    weight = kept_weight(weights.gather(-1, column.long()), c)
    return Entries(column, weight.masked_fill_(points > sums[..., -1:], 0.0))
