"""The formulas in float64, as plainly as they can be written: the oracle of the tests. Not used by anything else.

Everything goes through the dense R x B matrix S, as in the paper, so this shares no code with the estimator.
Source: arXiv 2604.16324, Algorithm 1; the variance is derived in estimators/balanced_sketch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sketch_matrix(bins: Tensor, signs: Tensor, rank: int) -> Tensor:
    """S (R, B) in float64: S[r, b] = signs[b] if bins[b] = r, else 0."""
    matrix = torch.zeros(rank, len(bins), dtype=torch.float64)
    for row, (bin_, sign) in enumerate(zip(bins.tolist(), signs.tolist(), strict=True)):
        matrix[bin_, row] = sign
    return matrix


def sketch(x: Tensor, matrix: Tensor, *, invariant_scalars: bool, shrinkage: float, eps: float = 1e-8) -> Tensor:
    """X^ (R, N) of `x` (B, N): Algorithm 1, lines 5 and 6 of forward, line 4 of backward."""
    result = matrix @ x.double()
    if invariant_scalars:
        result = result * x.double().norm() / (result.norm() + eps)
    return (1.0 - shrinkage) * result


def weight_grad(
    x: Tensor, grad_y: Tensor, bins: Tensor, signs: Tensor, rank: int, *, invariant_scalars: bool, shrinkage: float
) -> Tensor:
    """dW^ (M, N) from x (B, N) and grad_y (B, M); R_safe = min(rank, B)."""
    matrix = sketch_matrix(bins, signs, min(rank, len(bins)))
    sketched_y = sketch(grad_y, matrix, invariant_scalars=invariant_scalars, shrinkage=shrinkage)
    return sketched_y.t() @ sketch(x, matrix, invariant_scalars=invariant_scalars, shrinkage=shrinkage)


def collision_probability(rows: int, rank: int, hashing: str) -> float:
    """The probability that two given rows share a bin."""
    rank = min(rank, rows)
    if hashing == "uniform":
        return 1.0 / rank
    size, larger = divmod(rows, rank)  # `larger` bins hold size + 1 rows
    pairs = larger * (size + 1) * size + (rank - larger) * size * (size - 1)
    return pairs / (rows * (rows - 1))


def variance(x: Tensor, grad_y: Tensor, rank: int, hashing: str) -> float:
    """E |dW^ - dW|_F^2 without Invariant Scalars and shrinkage, over the draws of bins and signs."""
    x, grad_y = x.double(), grad_y.double()
    row_products = x.square().sum(1) * grad_y.square().sum(1)
    total = x.square().sum() * grad_y.square().sum() + (grad_y.t() @ x).square().sum() - 2 * row_products.sum()
    return collision_probability(x.shape[0], rank, hashing) * total.item()
