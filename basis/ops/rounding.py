"""Eight bits a number, rounded without bias: what a lean layer keeps instead of float32.

A tensor is cut along its last dimension into blocks of 64 numbers (or one block, if 64 does not
divide it). A block keeps its largest magnitude a and, for each number x, the integer

    q = floor(127 x / a + u),   u uniform in (0, 1),        x^ = q a / 127

so that E[x^] = x, up to 2^-17 of a step: an error once is not an error every step. |x^ - x| < a /
127 and the variance is at most (a / 254)^2.

The noise is a Dither of ops/noise.py: for B + N draws instead of B N, the rows of a column are
independent, and the columns of a row as good as uncorrelated.

Kept: 1 byte a number and 4 bytes a block: 0.2656 of float32. Cost: about eight passes over numbers
that lie in the cache, since rows are taken a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from basis.ops.matrix import row_blocks
from basis.ops.noise import Dither

BLOCK = 64
_LEVELS = 127


class Rounded(NamedTuple):
    """codes: int8, the tensor's shape. scales: float32, a / 127, shape (..., blocks)."""

    codes: Tensor
    scales: Tensor


def block_length(width: int) -> int:
    """Numbers that share a scale in rows of `width`."""
    return BLOCK if width % BLOCK == 0 else width


def round_to_int8(x: Tensor, key: Tensor) -> Rounded:
    """`x` (..., N) in 8 bits a number, unbiased. `key`: 0-dimensional int64 (ops/noise.py)."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    rows, block = flat.shape[0], block_length(width)
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, width // block, dtype=torch.float32, device=x.device)
    noise = Dither(key, rows, width)
    for part in row_blocks(flat, width):
        values = flat[part].float().view(-1, width // block, block)
        scale = values.abs().amax(-1) * (1.0 / _LEVELS)
        q = values * (1.0 / scale.clamp_min(torch.finfo(torch.float32).tiny))[..., None]
        q = q.view(-1, width).add_(Dither.middle()).add_(noise[part], alpha=Dither.unit()).floor_()
        codes[part] = q.clamp_(-_LEVELS, _LEVELS).to(torch.int8)
        scales[part] = scale
    return Rounded(codes.view(x.shape), scales)


def restore(rounded: Rounded, dtype: torch.dtype) -> Tensor:
    """The numbers again, in `dtype`."""
    codes, scales = rounded
    width = codes.shape[-1]
    blocks = codes.reshape(-1, scales.shape[-1], width // scales.shape[-1]).to(dtype)
    return blocks.mul_(scales.to(dtype)[..., None]).view(codes.shape)


def round_all(tensors: Sequence[Tensor], key: Tensor) -> tuple[Tensor, ...]:
    """Codes and scales of each of `tensors`, in turn; each has noise of its own."""
    rounded = (round_to_int8(x, key ^ place) for place, x in enumerate(tensors, start=1))
    return tuple(part for pair in rounded for part in pair)


def restore_all(parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors that `round_all` gave `parts` of, each in its own dtype again."""
    pairs = zip(parts[::2], parts[1::2], dtypes, strict=True)
    return [restore(Rounded(codes, scales), dtype) for codes, scales, dtype in pairs]
