"""How many entries SUS keeps, counted next to training: nothing is changed, no gradient is formed.

A forward without gradients is run, and at each SusAttention the probabilities are formed again from
the q and k that come by. Two numbers a row are taken: sum_j q_ij, the mean of the number kept, and
the number kept under the module's present key. Where q and k are rounded between forward and
backward (basis/lean/), training draws from the rounded ones, which moves it a little. Cost: one
forward, and a pass over all probabilities (blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from basis.exchange import plain_name
from basis.ops.matrix import cast_for_autocast
from basis.sus.attention import SusAttention
from basis.sus.blocks import Heads, causal_probabilities
from basis.sus.masks import Noise, independent_mask, keep_probabilities, systematic_entries, width


@dataclass(frozen=True)
class Kept:
    """Of one attention, over its rows (all sequences and heads): entries a row. length: T."""

    expected: float  # sum of keep probabilities, mean over rows
    drawn: float  # entries kept under the present key, mean over rows
    largest: float  # the row of the largest sum of keep probabilities: at most c, up to rounding
    length: int

    @property
    def share(self) -> float:
        """Kept part of the causal triangle, expected."""
        return 2.0 * self.expected / (self.length + 1)

    def metrics(self) -> dict[str, float]:
        """By name: kept_entries and kept_entries_largest, expected entries of a row, and
        kept_share, a part of 1.
        """
        return {
            "kept_entries": self.expected,
            "kept_entries_largest": self.largest,
            "kept_share": self.share,
        }

    @classmethod
    def together(cls, found: Collection[Kept]) -> Kept:
        """Of several attentions that have as many rows each."""
        (length,) = {kept.length for kept in found}
        expected, drawn = (
            sum(values) / len(found)
            for values in zip(*((k.expected, k.drawn) for k in found), strict=True)
        )
        return cls(expected, drawn, max(kept.largest for kept in found), length)


def kept_per_row(
    q: Tensor, k: Tensor, key: Tensor, *, c: float, mode: str
) -> tuple[Tensor, Tensor]:
    """Expected and drawn number of kept entries, (b, h, T) each, float32. Shapes as in
    `sus_attention`.
    """
    heads = Heads.of(q, k, k)
    noise = Noise.of(key, heads)
    per_group, length = heads.q.shape[1:3]
    expected, drawn = (torch.empty(heads.q.shape[:3], device=q.device) for _ in range(2))
    for groups, row_slices in heads.chunks():
        for rows in row_slices:
            scaled = heads.rows_of(heads.q, groups, rows) * heads.scale
            weights = causal_probabilities(
                scaled, heads.k[groups, : rows.stop].float(), rows.start, per_group
            )
            part = noise.part(groups, rows)
            if mode == "sparse":
                kept = systematic_entries(weights, c, part, width(c, length)).weight
            else:
                kept = independent_mask(weights, c, part)
            expected[groups, :, rows] = (
                keep_probabilities(weights, c).sum(-1).unflatten(1, (per_group, -1))
            )
            drawn[groups, :, rows] = (kept > 0).sum(-1).float().unflatten(1, (per_group, -1))
    return expected.view(q.shape[:3]), drawn.view(q.shape[:3])


@torch.no_grad()
def kept_statistics(model: nn.Module, forward: Callable[[], object]) -> dict[str, Kept]:
    """What each SusAttention of `model` keeps in `forward()`, by name. `forward` runs the model;
    random state is left alone.
    """
    found: dict[str, Kept] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, SusAttention)
        q, k = (cast_for_autocast(x) for x in inputs[:2])
        key = torch.zeros((), dtype=torch.int64) if module.noise_key is None else module.noise_key
        with torch.autocast(
            q.device.type, enabled=False
        ):  # as in backward: the probabilities are float32 ones
            expected, drawn = kept_per_row(q, k, key.to(q.device), c=module.c, mode=module.mode)
        found[names[module]] = Kept(
            float(expected.mean()), float(drawn.mean()), float(expected.max()), q.shape[2]
        )

    names = {
        module: plain_name(model, name)
        for name, module in model.named_modules()
        if isinstance(module, SusAttention)
    }
    handles = [module.register_forward_pre_hook(count) for module in names]
    try:
        with torch.random.fork_rng():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found
