"""The formulas in float64, as plainly as they can be written: the oracle of the tests. Not used by
anything else.

Everything goes through the dense R x B matrix S, as in the paper, so this shares no code with the
estimator. Source: arXiv 2604.16324, Algorithm 1. Each variance is derived in the docstring of its
estimator.
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


def sketch(
    x: Tensor, matrix: Tensor, *, invariant_scalars: bool, shrinkage: float, eps: float = 1e-8
) -> Tensor:
    """X^ (R, N) of `x` (B, N): Algorithm 1, lines 5 and 6 of forward, line 4 of backward."""
    result = matrix @ x.double()
    if invariant_scalars:
        result = result * x.double().norm() / (result.norm() + eps)
    return (1.0 - shrinkage) * result


def weight_grad(
    x: Tensor,
    grad_y: Tensor,
    bins: Tensor,
    signs: Tensor,
    rank: int,
    *,
    invariant_scalars: bool,
    shrinkage: float,
) -> Tensor:
    """dW^ (M, N) from x (B, N) and grad_y (B, M); R_safe = min(rank, B)."""
    matrix = sketch_matrix(bins, signs, min(rank, len(bins)))
    sketched_y = sketch(grad_y, matrix, invariant_scalars=invariant_scalars, shrinkage=shrinkage)
    return sketched_y.t() @ sketch(
        x, matrix, invariant_scalars=invariant_scalars, shrinkage=shrinkage
    )


def collision_probability(rows: int, rank: int, hashing: str) -> float:
    """The probability that two given rows share a bin."""
    rank = min(rank, rows)
    if hashing == "uniform":
        return 1.0 / rank
    size, larger = divmod(rows, rank)  # `larger` bins hold size + 1 rows
    pairs = larger * (size + 1) * size + (rank - larger) * size * (size - 1)
    return pairs / (rows * (rows - 1))


def _sums(x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|X|^2 |dY|^2, |T|^2 and sum_b |x_b|^2 |dy_b|^2."""
    x, grad_y = x.double(), grad_y.double()
    row_products = x.square().sum(1) * grad_y.square().sum(1)
    return (
        x.square().sum() * grad_y.square().sum(),
        (grad_y.t() @ x).square().sum(),
        row_products.sum(),
    )


def variance(x: Tensor, grad_y: Tensor, rank: int, hashing: str) -> float:
    """E |dW^ - dW|_F^2 of BASIS without Invariant Scalars and shrinkage, over the draws of bins and
    signs.
    """
    norms, product, row_products = _sums(x, grad_y)
    return (
        collision_probability(x.shape[0], rank, hashing)
        * (norms + product - 2 * row_products).item()
    )


def projection_variance(x: Tensor, grad_y: Tensor, rank: int, distribution: str) -> float:
    """E |dW^ - dW|_F^2 of RMM with `rank` columns of "gaussian" or "rademacher" entries."""
    norms, product, row_products = _sums(x, grad_y)
    fourth_moment = 3 if distribution == "gaussian" else 1
    return (norms + product + (fourth_moment - 3) * row_products).item() / rank


def row_probabilities(x: Tensor, share: float) -> Tensor:
    """p (B,) of row sampling: by norm, and a share for all."""
    norms = x.double().square().sum(1).sqrt()
    return (1 - share) * norms / norms.sum() + share / len(x)


def sampling_variance(x: Tensor, grad_y: Tensor, kept: int, scheme: str, p: Tensor) -> float:
    """E |dW^ - dW|_F^2 of `kept` < B rows; `p` (B,) is not looked at for the "uniform" scheme."""
    rows = len(x)
    x, grad_y = x.double(), grad_y.double()
    d = x.square().sum(1) * grad_y.square().sum(1)
    if scheme == "uniform":
        return (
            float(rows * d.sum() - (grad_y.t() @ x).square().sum())
            / kept
            * (rows - kept)
            / (rows - 1)
        )
    certain: list[int] = []
    if scheme == "wta_crs":
        largest = p.argsort(descending=True).tolist()
        sizes = range(kept)
        certain = largest[
            : min(sizes, key=lambda size: float(1 - p[largest[:size]].sum()) / (kept - size))
        ]
    others = torch.tensor([row for row in range(rows) if row not in certain])
    left = (1 - p[certain].sum()) * (d[others] / p[others]).sum() - (
        grad_y[others].t() @ x[others]
    ).square().sum()
    return left.item() / (kept - len(certain))


def rounding_variance(x: Tensor, low: Tensor, step: Tensor, dither: str) -> Tensor:
    """Variance of each rounded number (B, N), for ranges `low` and `step` of its group, also (B,
    N).
    """
    x, low, step = x.double(), low.double(), step.double()
    if dither == "subtractive":
        return step.square() / 12
    fraction = ((x - low) / step).frac()
    return step.square() * fraction * (1 - fraction)
