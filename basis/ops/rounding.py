"""Eight bits a number, rounded without bias: what a lean layer keeps instead of float32.

A tensor is cut along its last dimension into blocks of 64 numbers (or one block, if 64 does not
divide it). A block keeps its largest magnitude a and, for each number x, the integer

    q = floor(127 x / a + u),   u uniform in (0, 1),        x^ = q a / 127

so that E[x^] = x, up to 2^-17 of a step: an error once is not an error every step. |x^ - x| < a /
127 and the variance is at most (a / 254)^2.

The noise is a Dither of ops/noise.py: for B + N draws instead of B N, the rows of a column are
independent, and the columns of a row as good as uncorrelated. Tensors that are rounded with the
same key, as queries, keys, values and output, are columns of one such matrix.

Kept: 1 byte a number and 4 bytes a block: 0.2656 of float32. Cost: on the CPU about eight passes
over numbers that lie in the cache, since rows are taken a few at a time; on CUDA one kernel of
Triton (triton/rounding.py), which reads x once, wherever its numbers lie, and writes what is kept,
and one that reads that and writes x^. A compiler makes one kernel of the former too, and joins the
latter with what x^ is wanted for, so compiled graphs have no kernels of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from basis.ops import kernels
from basis.ops.matrix import in_eager_mode, row_blocks
from basis.ops.noise import Dither

BLOCK = 64
LEVELS = 127


class Rounded(NamedTuple):
    """codes: int8, the tensor's shape. scales: float32, a / 127, shape (..., blocks)."""

    codes: Tensor
    scales: Tensor


def block_length(width: int) -> int:
    """Numbers that share a scale in rows of `width`."""
    return BLOCK if width % BLOCK == 0 else width


def round_to_int8(x: Tensor, key: Tensor, place: int = 0) -> Rounded:
    """`x` (..., N) in 8 bits a number, unbiased. `key`: 0-dimensional int64 (ops/noise.py). place:
    which one it is of tensors of the same N that have the same key, each with noise of its own.
    """
    if torch.compiler.is_compiling():
        return _round(x, _noise(x, key, place))
    return kernels.attempt(_round_by_kernel, _round_plainly, x, key, place)


def _round_by_kernel(x: Tensor, key: Tensor, place: int) -> Rounded:
    from basis.ops.triton import rounding

    if block_length(x.shape[-1]) > rounding.WIDEST:
        return _round_plainly(x, key, place)
    return Rounded(*rounding.encode(x, key, place))


def _round_plainly(x: Tensor, key: Tensor, place: int) -> Rounded:
    noise = _noise(x, key, place)
    if not (x.device.type == "cpu" and in_eager_mode(x)):
        return _round(x, noise)
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    rows, block = flat.shape[0], block_length(width)
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, width // block, dtype=torch.float32, device=x.device)
    for part in row_blocks(flat, width):
        values = flat[part].float().view(-1, width // block, block)
        scale = values.abs().amax(-1) * (1.0 / LEVELS)
        q = values * (1.0 / scale.clamp_min(torch.finfo(torch.float32).tiny))[..., None]
        q = q.view(-1, width).add_(Dither.middle()).add_(noise[part], alpha=Dither.unit())
        codes[part] = q.floor_().clamp_(-LEVELS, LEVELS).to(torch.int8)
        scales[part] = scale
    return Rounded(codes.view(x.shape), scales.view(*x.shape[:-1], -1))


def _noise(x: Tensor, key: Tensor, place: int = 0, count: int = 1) -> Dither:
    """Noise for `count` tensors like `x` from number `place` on, side by side."""
    width = x.shape[-1]
    return Dither(key, x.shape[:-1].numel(), count * width, skipped=place * width)


def _round(x: Tensor, noise: Dither, place: int = 0) -> Rounded:
    """In one expression, for a compiler. place: which one `x` is of the tensors in `noise`."""
    width = x.shape[-1]
    block = block_length(width)
    values = x.reshape(-1, width // block, block).float()
    scale = values.abs().amax(-1) * (1.0 / LEVELS)
    inverse = 1.0 / scale.clamp_min(torch.finfo(torch.float32).tiny)
    w = noise[:][:, place * width : (place + 1) * width].unflatten(1, (-1, block))
    q = ((values * inverse[..., None] + Dither.middle()) + w * Dither.unit()).floor()
    codes = q.clamp(-LEVELS, LEVELS).to(torch.int8)
    return Rounded(codes.view(x.shape), scale.view(*x.shape[:-1], -1))


def restore(rounded: Rounded, dtype: torch.dtype) -> Tensor:
    """The numbers again, in `dtype`."""
    if torch.compiler.is_compiling():
        return _restore(rounded.codes, rounded.scales, dtype)
    return kernels.attempt(_restore_by_kernel, _restore, rounded.codes, rounded.scales, dtype)


def _restore_by_kernel(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from basis.ops.triton import rounding

    if codes.shape[-1] // scales.shape[-1] > rounding.WIDEST:
        return _restore(codes, scales, dtype)
    return rounding.decode(codes, scales, dtype)


def _restore(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplied in float32, rounded to `dtype` once."""
    if dtype != torch.float32 and codes.device.type == "cpu" and in_eager_mode(codes):
        width = codes.shape[-1]
        parts = row_blocks(codes.reshape(-1, width), 2 * width)
        if len(parts) > 1:
            return _restore_in_cache(codes, scales, dtype, parts)
    blocks = codes.unflatten(-1, (scales.shape[-1], -1)).to(torch.float32)
    return blocks.mul_(scales[..., None]).view(codes.shape).to(dtype)


def _restore_in_cache(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, parts: list[slice]
) -> Tensor:
    """The same, some rows at a time, all in one piece of float32 that stays in the cache."""
    factors = scales.reshape(-1, scales.shape[-1], 1)
    blocks = codes.reshape(*factors.shape[:2], -1)  # (rows, blocks, numbers)
    restored = scales.new_empty(blocks.shape, dtype=dtype)
    wide = scales.new_empty(parts[0].stop, *blocks.shape[1:])
    for part in parts:
        values = wide[: part.stop - part.start].copy_(blocks[part])
        restored[part] = values.mul_(factors[part])
    return restored.view(codes.shape)


def round_all(tensors: Sequence[Tensor], key: Tensor) -> tuple[Tensor, ...]:
    """Codes and scales of each of `tensors` (..., N), in turn; each has noise of its own."""
    first = tensors[0]
    if torch.compiler.is_compiling() and all(x.shape == first.shape for x in tensors):
        noise = _noise(first, key, count=len(tensors))  # made once
        rounded = [_round(x, noise, place) for place, x in enumerate(tensors)]
    else:
        rounded = [round_to_int8(x, key, place) for place, x in enumerate(tensors)]
    return tuple(part for pair in rounded for part in pair)


def restore_all(parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors that `round_all` gave `parts` of, each in its own dtype again."""
    pairs = zip(parts[::2], parts[1::2], dtypes, strict=True)
    return [restore(Rounded(codes, scales), dtype) for codes, scales, dtype in pairs]
