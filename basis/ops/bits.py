"""Codes of 1 to 8 bits packed into bytes.

Codes are packed along the first dimension, so that the codes of some rows can be had without those
of the others, and rows of any width lie side by side. The least number of codes that fills whole
bytes is a unit: 8 of 1 bit, 4 of 2, 2 of 4, 8 of 3 (in 3 bytes), 4 of 6 (in 3), 8 of 5 or 7. In a
unit the bits of the codes follow each other, the first code's first: byte p holds bits 8 p to 8 p +
7, and a code may lie in two bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.ops.matrix import in_eager_mode


def unit(bits: int) -> tuple[int, int]:
    """Codes of a unit, and the bytes that they fill."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def to_bytes(codes: Tensor) -> Tensor:
    """Whole floating-point numbers from 0 to 255 as uint8. By way of int16: PyTorch's CPU kernel is
    then four times as fast.
    """
    return codes.to(torch.int16).to(torch.uint8)


def join(codes: Sequence[Tensor], bits: int) -> Tensor:
    """The bytes (n, bytes, ...) uint8 of `codes`: the first code of each of n units, the second,
    and so on, each (n, ...) uint8 or int32.
    """
    made = []
    for byte in range(unit(bits)[1]):
        whole: Tensor | None = None
        for place, code in enumerate(codes):
            left = bits * place - 8 * byte  # where in the byte the code begins
            if -bits < left < 8:
                piece = code << left if left > 0 else code >> -left if left < 0 else code
                whole = piece if whole is None else whole | piece
        assert whole is not None
        made.append(whole.to(torch.uint8))
    return made[0][:, None] if len(made) == 1 else torch.stack(made, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (n, ...) below 2^bits as bytes (ceil(n / codes) * bytes, ...), codes and bytes
    being those of a unit.
    """
    per_unit, _ = unit(bits)
    if missing := -len(codes) % per_unit:
        codes = torch.cat((codes, codes.new_zeros(missing, *codes.shape[1:])))
    return join(codes.unflatten(0, (-1, per_unit)).unbind(1), bits).flatten(0, 1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes again, (count, ...): uint8 in eager mode, else int32."""
    per_unit, size = unit(bits)
    packed = packed.unflatten(0, (-1, size))
    mask = (1 << bits) - 1
    shape = (-1, *(1,) * (packed.ndim - 2))
    if not in_eager_mode(packed):
        packed = packed.to(torch.int32)
    if size == 1:
        places = torch.arange(0, 8, bits, dtype=packed.dtype, device=packed.device)
        codes = (packed >> places.view(shape)) & mask
    elif in_eager_mode(packed):
        codes = packed.new_empty(len(packed), per_unit, *packed.shape[2:])
        for place in range(per_unit):
            first, start = divmod(bits * place, 8)
            code = torch.bitwise_right_shift(packed[:, first], start, out=codes[:, place])
            if start + bits > 8:
                code |= packed[:, first + 1] << (8 - start)
        codes &= mask
    else:
        places = torch.arange(per_unit, dtype=torch.int32, device=packed.device) * bits
        byte = places >> 3
        both = packed[:, byte] | (packed[:, (byte + 1).clamp_max(size - 1)] << 8)
        codes = (both >> (places & 7).view(shape)) & mask
    return codes.flatten(0, 1)[:count]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 codes (n,) of 1, 2 or 4 bits as int32 (ceil(n bits / 32),), which have the bytes of
    `pack` on a little-endian machine. For a compiler: a sum over the codes of a word can be formed
    while they are, where it would go through them again for bytes.
    """
    count = 32 // bits
    if missing := -len(codes) % count:
        codes = F.pad(codes, (0, missing))
    places = torch.arange(count, dtype=torch.int32, device=codes.device) * bits
    return (codes.unflatten(0, (-1, count)) << places).sum(1, dtype=torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes again, int32 (count,)."""
    places = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    return ((words[:, None] >> places) & ((1 << bits) - 1)).flatten()[:count]
