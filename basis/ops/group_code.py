"""Numbers in a few bits, rounded at random within the range of their group.

Each row is cut into groups along the features. A group keeps its least number and a step,

    lo, step = (max - min) / (2^bits - 1)   16 bits each; lo rounded down, step up: no clipping

and each number x, with t = (x - lo) / step, the integer q = floor(t + u), u uniform in (0, 1): the
Dither of ops/noise.py, one of 2^16 values, which leaves a bias of 2^-17 of a step. What is decoded
is lo + q step, or, with u drawn again, lo + (q - u + 1/2) step.

`bits` need not be whole: at 3.75 the first three quarters of the rows have 4 bits a number and the
others 3, so that any number of bytes is spent, and as well as can be: error falls convexly with
bytes.

There are three ways to the same codes. On the CPU, in eager mode, rows are taken so many at a time
that they lie in the cache. On CUDA a kernel of Triton (triton/group_code.py) reads x once and
writes codes and ranges. Else, and in a compiled graph for the CPU, the code is reductions for the
ranges and one pointwise expression, which a compiler makes two kernels of: the rows whose codes
share a byte are views of x with a stride, `x[0::2]` and `x[1::2]` at 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.ops import kernels
from basis.ops.bits import join, pack, to_bytes, unit, unpack
from basis.ops.matrix import in_eager_mode, row_blocks, stored
from basis.ops.noise import Dither


@dataclass(frozen=True)
class Part:
    """Some rows of X with the same number of bits."""

    rows: slice
    bits: int
    bytes: slice  # of the packed codes


class Form(NamedTuple):
    """How to decode. dithered: whether the noise that was added is taken off again. dtype: that of
    x^.
    """

    bits: float
    group: int
    dithered: bool
    dtype: torch.dtype


def parts(rows: int, bits: float) -> list[Part]:
    """First the rows with ceil(bits) bits a number, a multiple of 8, then those with floor."""
    least = math.floor(bits)
    finer = min(round((bits - least) * rows / 8) * 8, rows) if bits > least else 0
    found, offset = [], 0
    for first, last, whole in ((0, finer, least + 1), (finer, rows, least)):
        codes, size = unit(whole)
        end = offset + -(-(last - first) // codes) * size
        if last > first:
            found.append(Part(slice(first, last), whole, slice(offset, end)))
        offset = end
    return found


def in_cache(x: Tensor) -> bool:
    """Whether rows are taken a few at a time."""
    return x.device.type == "cpu" and in_eager_mode(x)


def encode(x: Tensor, key: Tensor, bits: float, group: int) -> tuple[Tensor, Tensor]:
    """Packed codes (bytes, N) uint8 and ranges (B, groups) int32 of `x` (B, N).

    A range is two numbers of bfloat16: lo in the lower half of the 32 bits, step in the upper.
    """
    return kernels.attempt(_encode_by_kernel, _encode, x, key, bits, group)


def _encode_by_kernel(x: Tensor, key: Tensor, bits: float, group: int) -> tuple[Tensor, Tensor]:
    from basis.ops.triton import group_code

    if not group_code.fits(x.dtype, x.shape[1], group):
        return _encode(x, key, bits, group)
    return group_code.encode(x, key, bits, group)


def _encode(x: Tensor, key: Tensor, bits: float, group: int) -> tuple[Tensor, Tensor]:
    noise = Dither(key, len(x), x.shape[1], more=8)
    round_rows = _round_in_cache if in_cache(x) else _round
    found = [
        round_rows(x[part.rows], noise, part.rows.start, part.bits, group)
        for part in _in_blocks(parts(len(x), bits), x, x.shape[1])
    ]
    codes, ranges = zip(*found, strict=True)
    return _joined(list(codes), 0), _joined(list(ranges), 0)


def _in_blocks(whole: list[Part], x: Tensor, width: int) -> Iterator[Part]:
    """The same parts of the rows of `x`, cut into blocks of which `width` numbers a row lie in the
    cache, if that helps.
    """
    for part in whole:
        if not in_cache(x):
            yield part
            continue
        codes, size = unit(part.bits)
        for block in row_blocks(x[part.rows], width):  # these begin at whole units
            start, stop = block.start // codes * size, -(-block.stop // codes) * size
            yield Part(
                slice(part.rows.start + block.start, part.rows.start + block.stop),
                part.bits,
                slice(part.bytes.start + start, part.bytes.start + stop),
            )


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """`x` rounded up to a number that bfloat16 has, in float32.

    By the bits, not by a cast there and back: a fused kernel leaves such a pair of casts out, and
    would round X by other ranges than it keeps.
    """
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + ((~bits >> 31) & 0xFFFF)) & ~0xFFFF).view(
        torch.float32
    )  # 0xFFFF: if it is not negative


def _ranges(least: Tensor, most: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """lo and step of groups, as kept but in float32, and 1 / step in the precision of `least`."""
    low = -_up_to_bfloat16(-least)
    step = _up_to_bfloat16((most - low) / ((1 << bits) - 1))
    return low, step, 1.0 / step.to(least.dtype).clamp_min(torch.finfo(torch.float32).tiny)


def _as_kept(low: Tensor, step: Tensor) -> Tensor:
    """Both in 32 bits: float32 numbers that bfloat16 has end in 16 zeros."""
    return ((low.view(torch.int32) >> 16) & 0xFFFF) | step.view(torch.int32)


def unpack_ranges(ranges: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """lo and step in `dtype`, each of the shape of `ranges`."""
    low, step = ranges << 16, ranges & ~0xFFFF
    return low.view(torch.float32).to(dtype), step.view(torch.float32).to(dtype)


def _columns(width: int, group: int) -> list[slice]:
    """The columns that are whole groups, and the last ones, which are less than one.

    Inductor (2.13) makes wrong code for the CPU of one expression for both: it leaves the last out.
    """
    whole = width // group * group
    return [slice(a, b) for a, b in ((0, whole), (whole, width)) if a < b]


def _spread(of_groups: Tensor, width: int) -> Tensor:
    """A number of each group (n, groups) for each number in it, (n, width)."""
    return of_groups[:, :, None].expand(-1, -1, width // of_groups.shape[1]).flatten(1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _round(x: Tensor, noise: Dither, first: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Packed codes and ranges of rows `first` and on, in as few kernels as a compiler can."""
    rows = len(x)
    per_unit, _ = unit(bits)
    if missing := -rows % per_unit:
        x = F.pad(x, (0, 0, 0, missing))  # with rows of zeros: their codes are zero
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    codes, ranges = [], []
    for columns in _columns(x.shape[1], group):
        part = x[:, columns]
        width = part.shape[1]
        grouped = part.unflatten(1, (-1, min(group, width)))
        low, step, inverse = _ranges(grouped.amin(-1), grouped.amax(-1), bits)
        low, inverse = stored(low), stored(inverse)  # else anew for each number of a group
        made = []
        for place in range(per_unit):
            these = slice(place, None, per_unit)
            above = part[these] - _spread(low[these].to(x.dtype), width)
            w = noise[first + place : first + rows + missing : per_unit][:, columns]
            t = above * _spread(inverse[these], width)
            q = ((t + Dither.middle()) + w * Dither.unit()).floor().clamp(0, (1 << bits) - 1)
            made.append(q.to(torch.int32))
        codes.append(join(made, bits).flatten(0, 1))
        ranges.append(_as_kept(low[:rows], step[:rows]))
    return _joined(codes, 1), _joined(ranges, 1)


def _grouped(x: Tensor, group: int) -> Tensor:
    """`x` (n, N) group by group, (n, groups, group)."""
    if (
        missing := -x.shape[1] % group
    ):  # any number of the last group may stand in for a lacking one
        x = torch.cat((x, x[:, -1:].expand(-1, missing)), 1)
    return x.unflatten(1, (-1, group))


def _round_in_cache(
    x: Tensor, noise: Dither, first: int, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """The same for rows that lie in the cache: operations write into what is there."""
    rows, width = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = _grouped(wide, min(group, width))
    # These two are faster than aminmax.
    low, step, inverse = _ranges(grouped.amin(-1), grouped.amax(-1), bits)
    t = (grouped - low.to(wide.dtype)[..., None]).mul_(inverse[..., None]).flatten(1)[:, :width]
    t = t.add_(Dither.middle()).add_(noise[first : first + rows], alpha=Dither.unit())
    codes = t.floor_().clamp_(0, (1 << bits) - 1)
    return pack(to_bytes(codes), bits), _as_kept(low, step)


def decode(codes: Tensor, ranges: Tensor, key: Tensor, form: Form) -> Tensor:
    """x^ (B, N) in `form.dtype`."""
    return kernels.attempt(_decode_by_kernel, _decode, codes, ranges, key, form)


def _decode_by_kernel(codes: Tensor, ranges: Tensor, key: Tensor, form: Form) -> Tensor:
    from basis.ops.triton import group_code

    if not group_code.fits(form.dtype, codes.shape[1], form.group):
        return _decode(codes, ranges, key, form)
    return group_code.decode(codes, ranges, key, *form)


def _decode(codes: Tensor, ranges: Tensor, key: Tensor, form: Form) -> Tensor:
    found = [x for _, x in decoded_blocks(codes, ranges, key, form)]
    return _joined(found, 0)


def decoded_blocks(
    codes: Tensor, ranges: Tensor, key: Tensor, form: Form
) -> Iterator[tuple[slice, Tensor]]:
    """x^ in blocks of rows that lie in the cache, if that helps, else in the one or two parts that
    differ in bits.
    """
    width = codes.shape[1]
    group = min(form.group, width)
    wide = torch.promote_types(form.dtype, torch.float32)
    noise = Dither(key, len(ranges), width) if form.dithered else None
    low, step = unpack_ranges(ranges, wide)
    if noise is not None:
        low = low - step * (Dither.middle() - 0.5)  # q - u + 1/2 = q - unit w - (middle - 1/2)
    restore = _restore_in_cache if in_cache(codes) else _restore
    for part in _in_blocks(parts(len(ranges), form.bits), ranges, width):
        q = unpack(codes[part.bytes], part.bits, part.rows.stop - part.rows.start).to(wide)
        w = None if noise is None else noise[part.rows]
        yield part.rows, restore(q, w, low[part.rows], step[part.rows], group).to(form.dtype)


def _restore(q: Tensor, w: Tensor | None, low: Tensor, step: Tensor, group: int) -> Tensor:
    if w is not None:
        q = q - w * Dither.unit()
    made = []
    for columns in _columns(q.shape[1], group):
        part = q[:, columns]
        groups = slice(columns.start // group, -(-columns.stop // group))
        width = part.shape[1]
        made.append(part * _spread(step[:, groups], width) + _spread(low[:, groups], width))
    return _joined(made, 1)


def _restore_in_cache(q: Tensor, w: Tensor | None, low: Tensor, step: Tensor, group: int) -> Tensor:
    width = q.shape[1]
    if w is not None:
        q = q.add_(w, alpha=-Dither.unit())
    return _grouped(q, group).mul_(step[..., None]).add_(low[..., None]).flatten(1)[:, :width]
