"""The probabilities of causal attention once more, a block of rows at a time: no tensor of T x T
numbers ever exists.

Shapes: N groups, a group being one key head of one sequence; g query heads in a group (1, or more
in grouped-query attention); T tokens; d the width of a head. A block is some groups and some rows,
`g r` rows of scores in a group, up to the last column that any of them may look at: the upper
triangle costs nothing, but for the corners of blocks.

A block is as large as fits into a core's cache on the CPU, which makes the passes over it cheap,
and far larger elsewhere. What is exact: everything, up to rounding; scores are formed in float32
whatever the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from basis.ops.matrix import in_eager_mode

_IN_CACHE = 1 << 18  # numbers of a block: a megabyte of float32
_ON_DEVICE = 1 << 25


@dataclass(frozen=True)
class Heads:
    """q (N, g, T, d), k (N, T, d), v (N, T, d_v) of one attention, and g of them."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        """From q (b, h, T, d), k (b, h_kv, T, d), v (b, h_kv, T, d_v): the query heads of a group
        stand side by side.
        """
        return cls(
            q.reshape(-1, q.shape[1] // k.shape[1], *q.shape[2:]), k.flatten(0, 1), v.flatten(0, 1)
        )

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.q.shape[-1])

    def like_q(self, x: Tensor) -> Tensor:
        """`x` (b, h, T, d_v), an output or its gradient, as (N, g, T, d_v)."""
        return x.reshape(*self.q.shape[:3], x.shape[-1])

    def chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Slices of groups, and for each of them the slices of its rows, in order."""
        groups, per_group, length, _ = self.q.shape
        in_cache = self.q.device.type == "cpu" and in_eager_mode(self.q)
        budget = _IN_CACHE if in_cache else _ON_DEVICE
        at_once = min(max(budget // (per_group * length * length), 1), groups)
        rows = min(max(budget // (at_once * per_group * length), 1), length)
        row_slices = [slice(start, min(start + rows, length)) for start in range(0, length, rows)]
        for start in range(0, groups, at_once):
            yield slice(start, min(start + at_once, groups)), row_slices

    def rows_of(self, x: Tensor, groups: slice, rows: slice) -> Tensor:
        """Rows of `x` (N, g, T, d) in float32: (n, g r, d)."""
        return x[groups, :, rows].flatten(1, 2).float()


def causal_probabilities(q: Tensor, k: Tensor, start: int, per_group: int) -> Tensor:
    """W of the rows start to start + r: from q (n, g r, d), already scaled, and k (n, start + r,
    d), both float32.

    Returns (n, g r, start + r); what lies behind a row's own column is 0.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    rows = scores.shape[-1] - start
    corner = scores.view(len(scores), per_group, rows, -1)[..., start:]  # (n, g, r, r)
    behind = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
    corner.masked_fill_(behind, -math.inf)
    return torch.softmax(scores, -1)
