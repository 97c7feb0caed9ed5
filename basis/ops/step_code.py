"""Which of 2^bits intervals a number lies in, 1, 2 or 4 bits a number, and a product with what a
step function has there: all that a few-bit activation keeps.

There are three ways. On the CPU, in eager mode, bytes are looked up in a table of the levels that
are in a byte. On CUDA there are two kernels of Triton (triton/step_code.py). A compiler gets
comparisons, so that it forms the codes while it has the numbers in its hands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.ops import kernels
from basis.ops.bits import pack, pack_words, unpack, unpack_words
from basis.ops.tables import table

Levels = tuple[float, ...]


def encode(x: Tensor, bits: int, boundaries: Levels) -> Tensor:
    """Packed codes of `x`, of any shape: how many of the `boundaries` a number exceeds."""
    if torch.compiler.is_compiling():
        return pack_words(_codes(x, boundaries, torch.int32).reshape(-1), bits)
    return kernels.attempt(_encode_by_kernel, _encode, x, bits, boundaries)


def _codes(x: Tensor, boundaries: Levels, dtype: torch.dtype) -> Tensor:
    codes = (x > boundaries[0]).to(dtype)
    for boundary in boundaries[1:]:
        codes += x > boundary
    return codes


def _encode(x: Tensor, bits: int, boundaries: Levels) -> Tensor:
    return pack(_codes(x, boundaries, torch.uint8).reshape(-1), bits)


def _encode_by_kernel(x: Tensor, bits: int, boundaries: Levels) -> Tensor:
    from basis.ops.triton import step_code

    return step_code.encode(x, table(boundaries, x, x.dtype), bits)


def times_levels(y: Tensor, packed: Tensor, bits: int, levels: Levels) -> Tensor:
    """`y` times the levels of the numbers that `packed` was made of, in the shape of `y`."""
    if torch.compiler.is_compiling():
        codes = unpack_words(packed, bits, y.numel()).view(y.shape)
        level = torch.full_like(y, levels[0])
        for code in range(1, len(levels)):
            level = torch.where(codes == code, levels[code], level)
        return y * level
    return kernels.attempt(_times_levels_by_kernel, _times_levels, y, packed, bits, levels)


def _times_levels(y: Tensor, packed: Tensor, bits: int, levels: Levels) -> Tensor:
    per_byte = 8 // bits
    every_byte = torch.arange(256, device=packed.device).to(torch.uint8)
    codes = unpack(every_byte, bits, 256 * per_byte).int()
    by_byte = table(levels, y, y.dtype)[codes].view(256, per_byte)  # the levels in a byte
    level = F.embedding(packed.int(), by_byte).view(-1)[: y.numel()].view(y.shape)
    return level.mul_(y)


def _times_levels_by_kernel(y: Tensor, packed: Tensor, bits: int, levels: Levels) -> Tensor:
    from basis.ops.triton import step_code

    return step_code.times_levels(y, packed, table(levels, y, y.dtype), bits)
