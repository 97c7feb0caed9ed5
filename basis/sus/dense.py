"""SUS backward, the reference: every entry of a row is looked at, and most are multiplied by zero.

With G = dL/dO and W~ the masked probabilities (masks.py), in place of the exact gradients' W (arXiv
2505.15080):

    D_i  = O_i . G_i                           from the exact output
    M_ij = W~_ij (V_j . G_i - D_i)             dL/dscores before the scale
    dQ = scale M K        dK = scale M^T Q        dV = W~^T G

Each is linear in W~, so its mean is the exact gradient. D must not be formed from W~ (sum_j W~_ij
V_j . G_i): the product of two masked factors has another mean. Their variance is in variance.py.

Cost: five products as in flash attention's backward, O(T^2 d), and a hash for each entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from basis.sus.blocks import Heads, causal_probabilities
from basis.sus.masks import Noise, independent_mask

Gradients = tuple[Tensor, Tensor, Tensor]


def dense_gradients(
    heads: Heads, output: Tensor, grad_output: Tensor, key: Tensor, c: float
) -> Gradients:
    """dQ (N, g, T, d), dK (N, T, d), dV (N, T, d_v) in float32; output and grad_output (N, g, T,
    d_v).
    """
    per_group = heads.q.shape[1]
    noise = Noise.of(key, heads)
    grad_q = torch.empty(heads.q.shape, dtype=torch.float32, device=heads.q.device)
    grad_k, grad_v = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (heads.k, heads.v)
    )
    for groups, row_slices in heads.chunks():
        k, v = heads.k[groups].float(), heads.v[groups].float()
        for rows in row_slices:
            columns = slice(0, rows.stop)
            q = heads.rows_of(heads.q, groups, rows) * heads.scale
            g = heads.rows_of(grad_output, groups, rows)
            delta = (heads.rows_of(output, groups, rows) * g).sum(-1, keepdim=True)  # (n, g r, 1)
            weights = causal_probabilities(
                q, k[:, columns], rows.start, per_group
            )  # (n, g r, columns)
            masked = independent_mask(weights, c, noise.part(groups, rows))
            m = torch.bmm(g, v[:, columns].transpose(1, 2)).sub_(delta).mul_(masked)
            grad_q[groups, :, rows] = (torch.bmm(m, k[:, columns]) * heads.scale).unflatten(
                1, (per_group, -1)
            )
            grad_k[groups, columns].baddbmm_(m.transpose(1, 2), q)
            grad_v[groups, columns].baddbmm_(masked.transpose(1, 2), g)
    return grad_q, grad_k, grad_v
