"""SUS backward in O(T c d): a fixed number of entries of each row is drawn, and only these are
followed.

`sample` goes over all probabilities once: the product Q K^T, a softmax, a cumulative sum and a
search, a block of rows at a time (blocks.py). That is the quadratic part, one product of the five
in flash attention's backward. `entry_gradients` does the rest of the formulas in dense.py on the
entries alone:

    x = V_j . G_i      rows of V gathered, a few rows of G at a time
    dQ                 weighted sums of rows of K by query: PyTorch's embedding_bag
    dK, dV             the entries sorted by column, then sums of rows of Q and G by key alike

Of the ways to form the sums on a CPU (T 4,096, 27 entries a row, d 64, one core, milliseconds)
embedding_bag took 1 for dQ, where gathered rows and a batched product took 6 and a sparse CSR
product 1.4; for dK sort and embedding_bag took 3, index_add 15 and a product with the transposed
CSR matrix 17. Additions have the same order every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.sus.blocks import Heads, causal_probabilities
from basis.sus.dense import Gradients
from basis.sus.masks import Entries, Noise, systematic_entries, width

_ROWS = 256  # of G at a time, so that the gathered rows of V lie in the cache


def sample(heads: Heads, groups: slice, row_slices: list[slice], noise: Noise, c: float) -> Entries:
    """The kept entries of all rows of some groups: column and weight (n, g, T, width)."""
    per_group, length = heads.q.shape[1:3]
    most = width(c, length)
    k = heads.k[groups].float()
    shape = (len(k), per_group, length, most)
    column = torch.zeros(shape, dtype=torch.int32, device=k.device)
    weight = torch.zeros(shape, dtype=torch.float32, device=k.device)
    for rows in row_slices:
        q = heads.rows_of(heads.q, groups, rows) * heads.scale
        weights = causal_probabilities(q, k[:, : rows.stop], rows.start, per_group)
        entries = systematic_entries(weights, c, noise.part(groups, rows), most)
        column[:, :, rows], weight[:, :, rows] = (x.unflatten(1, (per_group, -1)) for x in entries)
    return Entries(column, weight)


def entry_gradients(
    heads: Heads, groups: slice, output: Tensor, grad_output: Tensor, entries: Entries
) -> Gradients:
    """dQ (n, g, T, d), dK (n, T, d), dV (n, T, d_v) of some groups in float32, from their kept
    entries.
    """
    q, k, v, o, g = (
        x[groups].flatten(0, -2).float() for x in (heads.q, heads.k, heads.v, output, grad_output)
    )
    count, per_group, length, most = entries.column.shape
    offset = (
        torch.arange(count, dtype=torch.int32, device=q.device) * length
    )  # of a group's keys among all of them
    column = (entries.column + offset[:, None, None, None]).view(-1, most)  # (R, width), R = n g T
    weight = entries.weight.view(-1, most)
    m = (dots(v, column, g) - (o * g).sum(-1, keepdim=True)) * weight

    def sums(table: Tensor, row: Tensor, begins: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(row, table, begins, mode="sum", per_sample_weights=weights)

    begins = torch.arange(0, column.numel(), most, dtype=torch.int32, device=q.device)
    grad_q = sums(k, column.view(-1), begins, m.view(-1)) * heads.scale
    by_column, order = column.view(-1).sort(stable=True)
    row = (order // most).int()
    begins = torch.searchsorted(
        by_column, torch.arange(len(k), dtype=torch.int32, device=q.device), out_int32=True
    )
    grad_k = sums(q, row, begins, m.view(-1)[order]) * heads.scale
    grad_v = sums(g, row, begins, weight.view(-1)[order])
    return (
        grad_q.view(count, per_group, length, -1),
        grad_k.view(count, length, -1),
        grad_v.view(count, length, -1),
    )


def dots(v: Tensor, column: Tensor, g: Tensor) -> Tensor:
    """v[column[i, s]] . g[i], shape (R, width), for v (keys, d), column (R, width), g (R, d)."""
    result = torch.empty(column.shape, dtype=v.dtype, device=v.device)
    step = _ROWS if type(v) is Tensor and v.device.type == "cpu" else len(g)
    for start in range(0, len(g), step):
        part = slice(start, start + step)
        gathered = v.index_select(0, column[part].flatten()).view(-1, column.shape[1], v.shape[1])
        result[part] = gathered.mul_(g[part, None]).sum(-1)
    return result


def sparse_gradients(
    heads: Heads, output: Tensor, grad_output: Tensor, key: Tensor, c: float
) -> Gradients:
    """dQ (N, g, T, d), dK (N, T, d), dV (N, T, d_v) in float32; output and grad_output (N, g, T,
    d_v).
    """
    noise = Noise.of(key, heads)
    grads = tuple(
        torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for x in (heads.q, heads.k, heads.v)
    )
    for groups, row_slices in heads.chunks():
        entries = sample(heads, groups, row_slices, noise, c)
        for whole, part in zip(
            grads, entry_gradients(heads, groups, output, grad_output, entries), strict=True
        ):
            whole[groups] = part
    return grads[0], grads[1], grads[2]
