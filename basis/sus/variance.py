"""How noisy SUS's gradients of one attention are: the variance over masks, from the formula,
without drawing any.

Given the forward, G = dL/dO, w_ij = W_ij (1/c - W_ij) where W_ij < 1/c, else 0, and x_ij = V_j .
G_i - D_i, the variances summed over all elements are

    Var dV = sum w_ij |G_i|^2
    Var dQ = scale^2 sum w_ij x_ij^2 |K_j|^2
    Var dK = scale^2 sum w_ij x_ij^2 |Q_i|^2

This is of the independent mask (mode "dense"). The systematic one has the same marginals, and
entries of one row that exclude each other: as a rule, a smaller variance. A mean over rows of w
sums to at most 1/c: a sample of c from the row's distribution. Cost: a pass over all probabilities
(blocks.py), two products and no random number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from basis.sus.blocks import Heads, causal_probabilities


class Variance(NamedTuple):
    """Of dQ, dK and dV of one attention, each summed over all its elements."""

    q: float
    k: float
    v: float


@torch.no_grad()
def mask_variance(q: Tensor, k: Tensor, v: Tensor, grad_output: Tensor, *, c: float) -> Variance:
    """The formula for `sus_attention(q, k, v, ..., c=c)` whose output's gradient is `grad_output`
    (b, h, T, d_v).
    """
    heads = Heads.of(q, k, v)
    grads = heads.like_q(grad_output)
    per_group = heads.q.shape[1]
    of_q, of_k, of_v = (torch.zeros((), dtype=torch.float64, device=q.device) for _ in range(3))
    for groups, row_slices in heads.chunks():
        keys, values = heads.k[groups].float(), heads.v[groups].float()
        for rows in row_slices:
            columns = slice(0, rows.stop)
            queries, g = (
                heads.rows_of(heads.q, groups, rows),
                heads.rows_of(grads, groups, rows),
            )  # (n, g r, d)
            weights = causal_probabilities(
                queries * heads.scale, keys[:, columns], rows.start, per_group
            )
            spread = (weights * (1.0 / c - weights)).clamp_(min=0.0)  # (n, g r, columns)
            x = torch.bmm(g, values[:, columns].transpose(1, 2))
            x = x - (weights * x).sum(-1, keepdim=True)
            noise = spread * x.square()
            of_v += (spread.sum(-1) * g.square().sum(-1)).sum(dtype=torch.float64)
            of_q += (noise.sum(1) * keys[:, columns].square().sum(-1)).sum(dtype=torch.float64)
            of_k += (noise.sum(-1) * queries.square().sum(-1)).sum(dtype=torch.float64)
    scale2 = heads.scale**2
    return Variance(scale2 * float(of_q), scale2 * float(of_k), float(of_v))
