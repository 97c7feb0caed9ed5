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

Least and largest number in groups of 128, and not the largest magnitude in groups of 64, which
costs as much: GELU's outputs reach far on one side only. Its error's variance is 0.35 of the
other's for GELU of standard normal numbers (0.51 if their deviation is 0.3, 0.32 if it is 2), and
0.99 for standard normal numbers, which are what LayerNorm puts out.

What is exact: Y, dX, the bias gradient; a number that is all its group has, up to 16 bits. What is
estimated: dW, without bias, through X alone: dY is used whole. Kept: `bits` / 8 bytes a number (B
rounded up to a multiple of 8 / gcd(bits, 8); rows of one more bit are a multiple of 8), 4 bytes a
group and the 8-byte key; in groups of 128 that is 4.25 bits a number at 4 bits. FLOPs: the exact
product, 2 B N M, and about 40 operations a number in forward and in backward. There X comes back,
on the CPU some rows at a time. On CUDA two kernels of Triton do it: forward reads X once and writes
what is kept, backward reads that and writes X^, once in memory, for the product. State between
steps: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops import group_code


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

    def bytes_of(self, rows: int, width: int, dtype: torch.dtype) -> int:
        *_, last = group_code.parts(rows, self.constant("bits"))
        groups = -(-width // self.group)
        return last.bytes.stop * width + 4 * rows * groups + 8  # codes, ranges, the key

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        codes, ranges = group_code.encode(x, key, self.constant("bits"), self.group)
        return codes, ranges, key, x.new_empty(0)  # no number, only the dtype

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        if not group_code.in_cache(grad_y):
            return grad_y.t() @ self._restored(kept).to(grad_y.dtype)  # (M, B) (B, N)
        wide = torch.promote_types(grad_y.dtype, torch.float32)
        total = torch.zeros(grad_y.shape[1], kept[0].shape[1], dtype=wide, device=grad_y.device)
        for rows, x in group_code.decoded_blocks(*self._code(kept)):
            total += grad_y[rows].t() @ x.to(grad_y.dtype)
        return total

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        return Factors(self._restored(kept))

    def _restored(self, kept: tuple[Tensor, ...]) -> Tensor:
        """x^ (B, N) in the dtype of X."""
        return group_code.decode(*self._code(kept))

    def _code(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, group_code.Form]:
        """What `decode` wants to know."""
        codes, ranges, key, like = kept
        dithered = self.dither == "subtractive"
        form = group_code.Form(self.constant("bits"), self.group, dithered, like.dtype)
        return codes, ranges, key, form
