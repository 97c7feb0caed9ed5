"""X in a few bits a number, rounded at random so that the error has mean zero (as ActNN,
2104.14129, and GACT, 2206.11357).

Each row is cut into groups along the features. A group keeps its least number and a step,

    lo, step = (max - min) / (2^bits - 1)   16 bits each; lo rounded down, step up: no clipping

and each number x, with t = (x - lo) / step, the integer q = floor(t + u), u uniform in (0, 1) and
drawn again in backward:

    dither="none"           x^ = lo + q step                  error variance step^2 f (1 - f)
    dither="subtractive"    x^ = lo + (q - u + 1/2) step      error variance step^2 / 12

where f is the fraction of t, and E[x^] = x in both.

(Proof: t + u - q is uniform in [0, 1) for any t, so the second error, -(t + u - q - 1/2) step, is
uniform over one step. The first is a coin with probability f. Averaged over f it is step^2 / 6.
Dither: Roberts 1962.) Subtracting the noise that was added costs no byte; the variance is 0.50 of
the other for normal numbers at 2 bits and more (0.39 at 1), for GELU of normal numbers, most of
which lie just above the least, 0.56 at 4 bits, 0.71 at 2 and 0.92 at 1. So it is the default. In
both, errors of different rows are independent, and

    E |dW^ - T|^2 = sum_b |dy_b|^2 sum_n (error variance of x_bn)

`bits` need not be whole: at 3.75 the first three quarters of the rows have 4 bits a number and the
others 3, so that any number of bytes is spent, and as well as can be: error falls convexly with
bytes.

u is one of 2^16 values, which leaves a bias of 2^-17 of a step. It is a Dither of
ops/noise.py, which costs a tenth of hashed noise.

Least and largest number in groups of 128, and not the largest magnitude in groups of 64, which
costs as much: GELU's outputs reach far on one side only. Its error's variance is 0.35 of the
other's for GELU of standard normal numbers (0.51 if their deviation is 0.3, 0.32 if it is 2), and
0.99 for standard normal numbers, which are what LayerNorm puts out.

What is exact: Y, dX, the bias gradient; a number that is all its group has, up to 16 bits. What is
estimated: dW, without bias, through X alone: dY is used whole. Kept: `bits` / 8 bytes a number (B
rounded up to a multiple of 8 / gcd(bits, 8); rows of one more bit are a multiple of 8), 4 bytes a
group and the 8-byte key; in groups of 128 that is 4.25 bits a number at 4 bits. FLOPs: the exact
product, 2 B N M, and about 40 operations a number in forward and in backward, where X comes back
some rows at a time. State between steps: none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops.bits import pack, to_bytes, unit, unpack
from basis.ops.matrix import row_blocks
from basis.ops.noise import Dither


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """`x` rounded up to a number that bfloat16 has, in float32.

    By the bits, not by a cast there and back: a fused kernel leaves such a pair of casts out, and
    would round X by other ranges than it keeps.
    """
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + ((~bits >> 31) & 0xFFFF)) & ~0xFFFF).view(
        torch.float32
    )  # 0xFFFF: if it is not negative


@dataclass(frozen=True)
class _Part:
    """Some rows of X that are worked on together."""

    rows: slice
    bits: int
    bytes: slice  # of the packed codes


@dataclass(frozen=True)
class Quantized(Estimator):
    """X in `bits` bits a number.

    bits: 1 to 8, on average over the rows. group: numbers of a row that share their range; at least
    1. dither: "subtractive" or "none", see above. Raises ValueError that begins with the name of
    the wrong option.
    """

    knob: ClassVar[str] = "bits"

    bits: float = 4
    group: int = 128
    dither: str = "subtractive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: must be 1 to 8")
        if self.group < 1:
            raise ValueError(f"group={self.group}: must be at least 1")
        if self.dither not in ("subtractive", "none"):
            raise ValueError(f"dither={self.dither!r}: must be subtractive or none")

    def knob_values(self, rows: int, width: int) -> Sequence[float]:
        return [sixteenths / 16 for sixteenths in range(16, 129)]

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        noise = Dither(key, *x.shape)
        parts = [
            self._round(x[part.rows], noise[part.rows], part.bits)
            for part in self._parts(x, x.shape[1])
        ]
        codes, ranges = zip(*parts, strict=True)
        return torch.cat(codes), torch.cat(ranges), key, x.new_empty(0)  # no number, only the dtype

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        wide = torch.promote_types(grad_y.dtype, torch.float32)
        total = torch.zeros(grad_y.shape[1], kept[0].shape[1], dtype=wide, device=grad_y.device)
        for rows, x in self._restored(kept):
            total += grad_y[rows].t() @ x.to(grad_y.dtype)
        return total

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        return Factors(torch.cat([x for _, x in self._restored(kept)]))

    def _parts(self, like: Tensor, width: int) -> list[_Part]:
        """The rows of X (., width) in blocks that are worked on together. First come the rows with
        ceil(bits) bits a number, then those with floor(bits).

        like: a tensor with as many rows as X, whose device and kind decide the size of a block.
        """
        rows, least = like.shape[0], math.floor(self.bits)
        finer = min(round((self.bits - least) * rows / 8) * 8, rows)
        parts, offset = [], 0
        for first, last, bits in ((0, finer, least + 1), (finer, rows, least)):
            codes, size = unit(bits)
            blocks = row_blocks(like[first:last], width) if last > first else []
            for block in blocks:  # which begin at whole units
                start, stop = (
                    offset + block.start // codes * size,
                    offset + -(-block.stop // codes) * size,
                )
                parts.append(
                    _Part(slice(first + block.start, first + block.stop), bits, slice(start, stop))
                )
            offset += -(-(last - first) // codes) * size
        return parts

    def _round(self, x: Tensor, u: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Packed codes and ranges (n, groups, 2) of `x` (n, N)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        largest = (1 << bits) - 1
        grouped = self._grouped(wide)
        least, most = grouped.amin(-1), grouped.amax(-1)  # faster than aminmax
        low = -_up_to_bfloat16(-least)
        step = _up_to_bfloat16((most - low) / largest)
        inverse = 1.0 / step.to(wide.dtype).clamp_min(torch.finfo(torch.float32).tiny)
        t = (
            (grouped - low.to(wide.dtype)[..., None])
            .mul_(inverse[..., None])
            .flatten(1)[:, : x.shape[1]]
        )
        codes = t.add_(u).floor_().clamp_(0, largest)
        return pack(to_bytes(codes), bits), torch.stack((low, step), -1).to(torch.bfloat16)

    def _restored(self, kept: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
        """x^ in the dtype of X, block of rows by block of rows."""
        codes, ranges, key, like = kept
        width = codes.shape[1]
        wide = torch.promote_types(like.dtype, torch.float32)
        noise = Dither(key, len(ranges), width) if self.dither == "subtractive" else None
        for part in self._parts(ranges, width):
            q = unpack(codes[part.bytes], part.bits, part.rows.stop - part.rows.start).to(wide)
            if noise is not None:
                q = q.add_(0.5).sub_(noise[part.rows])
            low, step = ranges[part.rows].to(wide)[:, :, None].unbind(-1)
            x = self._grouped(q).mul_(step).add_(low).flatten(1)[:, :width]
            yield part.rows, x.to(like.dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """`x` (n, N) group by group, (n, groups, group)."""
        group = min(self.group, x.shape[1])
        if (
            missing := -x.shape[1] % group
        ):  # the last one is shorter: any of its numbers may stand in for those it lacks
            x = torch.cat((x, x[:, -1:].expand(-1, missing)), 1)
        return x.unflatten(1, (-1, group))
