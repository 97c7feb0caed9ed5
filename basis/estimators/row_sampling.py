"""Some rows of X instead of all: at random, by their norm, or the largest for certain and the
others at random.

dW = sum_b dy_b x_b^T is a sum over rows (tokens). Forward keeps k rows of X with their numbers i
and weights w, and backward takes the same rows of dY,

    dW^ = sum_j w_j dy_i(j) x_i(j)^T     w_j = 1 / (expected times that row i(j) is drawn): unbiased

    uniform    k different rows, all sets alike, w = B / k
    crs        k draws with replacement, row b with probability p_b, w = 1 / (k p_b)
    wta_crs    the |C| rows of largest p, whose sum is P, with w = 1; k - |C| draws from the others,
               w = (1 - P) / ((k - |C|) p_b)

(crs: Drineas, Kannan, Mahoney 2006. wta_crs: Liu et al., 2305.15265, whose |C| in 0 to k - 1
minimises (1 - P) / (k - |C|); their code leaves the weights out until gradient norms are known, and
is biased there.) The best p is proportional to |x_b| |dy_b|. In forward dY is unknown, and
language-model training never meets the same sample again, so p has the norm of x_b alone, with a
small share for all:

    p_b = (1 - SHARE) |x_b| / sum |x| + SHARE / B,  SHARE = 0.01

Any p that is positive where x is not zero is unbiased, since it is divided by. The share sees to
that where a norm underflows or all of X is zero, bounds the weights by B / (SHARE k), and costs at
most 1% of variance.

Variance for fixed X and dY, d_b = |x_b|^2 |dy_b|^2, T = dY^T X, Frobenius norms, independent draws,
k < B:

    uniform    (B sum d_b - |T|^2) / k  *  (B - k) / (B - 1)
    crs        (sum d_b / p_b - |T|^2) / k
    wta_crs    ((1 - P) sum' d_b / p_b - |T'|^2) / (k - |C|), over the rows that are not in C

(Proof: one draw has the value dy x^T / p of mean T and second moment sum d_b / p_b; k independent
ones average. Without replacement it is the variance of a sample mean with the finite-population
factor.) Systematic draws, one random number for all, have the same mean and usually less variance,
for which there is no formula.

What is exact: Y, dX, the bias gradient; dW too if k >= B, when all rows are kept. Kept: k N
elements in the precision of X and 8 bytes a row (number and weight). FLOPs: 2 B N for norms, a sort
of B numbers, 2 k N M for the product. State between steps: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops.matrix import row_norms
from basis.ops.noise import random_bits, uniform

PARTS = 100
"""1 / SHARE."""


def probabilities(x: Tensor) -> Tensor:
    """p (B,) in float64 for the rows of `x`: sums over many rows keep their digits, and it is B
    numbers only.
    """
    norms = row_norms(x).to(torch.float64)
    share = 1.0 / PARTS
    p = (1.0 - share) * norms / norms.sum().clamp_min(
        torch.finfo(torch.float64).tiny
    ) + share / len(norms)
    return p / p.sum()


@dataclass(frozen=True)
class RowSampling(Estimator):
    """k rows of X, weighted.

    rows: k, at least 1; B or more keep all. scheme: "uniform", "crs" or "wta_crs". draws:
    "independent", or "systematic" (one random number decides all draws); the uniform scheme has no
    use for it. Raises ValueError that begins with the name of the wrong option.
    """

    knob: ClassVar[str] = "rows"

    rows: int
    scheme: str = "wta_crs"
    draws: str = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise ValueError(f"rows={self.rows}: must be at least 1")
        if self.scheme not in ("uniform", "crs", "wta_crs"):
            raise ValueError(f"scheme={self.scheme!r}: must be uniform, crs or wta_crs")
        if self.draws not in ("independent", "systematic"):
            raise ValueError(f"draws={self.draws!r}: must be independent or systematic")

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        index, weight = self.sample(x, key)
        return x[index], index.to(torch.int32), weight.to(torch.float32)

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        rows_of_x, index, weight = kept
        return (grad_y[index] * weight[:, None]).to(rows_of_x.dtype).t() @ rows_of_x

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        rows_of_x, index, weight = kept
        left = torch.zeros(rows, len(index), dtype=rows_of_x.dtype, device=rows_of_x.device)
        return Factors(
            left.scatter_(0, index[None].to(torch.int64), weight[None].to(left.dtype)), rows_of_x
        )

    def sample(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (k,) of the kept rows, int64, and their weights (k,)."""
        rows, kept = x.shape[0], self.rows
        if kept >= rows:
            return torch.arange(rows, device=x.device), torch.ones(rows, device=x.device)
        if self.scheme == "uniform":
            order = torch.argsort(random_bits(key, rows))
            return order[:kept], torch.full((kept,), rows / kept, device=x.device)
        p = probabilities(x)
        slots = torch.arange(kept, device=x.device)
        if self.scheme == "crs":
            sampled = self._search(
                p.cumsum(0), slots, torch.zeros_like(slots[:1]), torch.zeros_like(p[:1]), key
            )
            return sampled, 1.0 / (kept * p[sampled])
        p, order = p.sort(descending=True, stable=True)
        sums = p.cumsum(0)
        before = torch.cat((torch.zeros_like(p[:1]), sums[: kept - 1]))  # P for |C| = 0 to k - 1
        size = torch.argmin(
            (1.0 - before) / (kept - slots), keepdim=True
        )  # |C|, never looked at as a number
        covered = before.gather(0, size)
        certain = slots < size
        place = torch.where(certain, slots, self._search(sums, slots, size, covered, key))
        weight = (1.0 - covered) / ((kept - size) * p[place])
        return order[place], torch.where(certain, 1.0, weight)

    def _search(
        self, sums: Tensor, slots: Tensor, first: Tensor, covered: Tensor, key: Tensor
    ) -> Tensor:
        """For each slot from `first` on a row at random, by `sums` of p beyond `covered`, which is
        what comes before `first`.
        """
        kept = len(slots)
        if self.draws == "systematic":
            u = (slots - first + uniform(key, 1, torch.float64)) / (kept - first)
        else:
            u = uniform(key, kept, torch.float64)
        at = covered + u * (sums[-1:] - covered)
        return torch.searchsorted(sums, at, right=True).clamp_max(len(sums) - 1).maximum(first)
