"""Codes of 1 to 8 bits packed into bytes.

Codes are packed along the first dimension, so that the codes of some rows can be had without those
of the others, and rows of any width lie side by side. The least number of codes that fills whole
bytes is a unit: 8 of 1 bit, 4 of 2, 2 of 4, 8 of 3 (in 3 bytes), 4 of 6 (in 3), 8 of 5 or 7. A
number of bits that is no power of two is split into such: 3 = 2 + 1, 7 = 4 + 2 + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit(bits: int) -> tuple[int, int]:
    """Codes of a unit, and the bytes that they fill."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def to_bytes(codes: Tensor) -> Tensor:
    """Whole floating-point numbers from 0 to 255 as uint8. By way of int16: PyTorch's CPU kernel is
    then four times as fast.
    """
    return codes.to(torch.int16).to(torch.uint8)


def _parts(bits: int) -> list[tuple[int, int]]:
    """The powers of two that add up to `bits`, each with the bits that come before it."""
    sizes = [size for size in (8, 4, 2, 1) if bits & size]
    return [(size, sum(sizes[:i])) for i, size in enumerate(sizes)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (n, ...) below 2^bits as bytes (ceil(n / codes) * bytes, ...), codes and bytes
    being those of a unit.
    """
    per_unit, size = unit(bits)
    if missing := -len(codes) % per_unit:
        codes = torch.cat((codes, codes.new_zeros(missing, *codes.shape[1:])))
    packed = []
    for part, before in _parts(bits):
        piece = codes if part == bits else (codes >> before) & ((1 << part) - 1)
        piece = piece.unflatten(
            0, (-1, per_unit * part // 8, 8 // part)
        )  # (units, bytes, codes of a byte, ...)
        joined = piece[:, :, 0].clone()
        for place in range(1, 8 // part):
            joined |= piece[:, :, place] << (part * place)
        packed.append(joined)
    result = packed[0] if len(packed) == 1 else torch.cat(packed, 1)
    assert result.shape[1] == size
    return result.flatten(0, 1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes again, uint8 (count, ...)."""
    per_unit, size = unit(bits)
    packed = packed.unflatten(0, (-1, size))
    codes: Tensor | None = None
    start = 0
    for part, before in _parts(bits):
        end = start + per_unit * part // 8
        shifts = torch.arange(0, 8, part, dtype=torch.uint8, device=packed.device).view(
            -1, *(1,) * (packed.ndim - 2)
        )
        piece = packed[:, start:end, None] >> shifts  # (units, bytes, codes of a byte, ...)
        piece = (piece & ((1 << part) - 1)).flatten(1, 2)
        codes = piece if codes is None else codes | (piece << before)
        start = end
    assert codes is not None
    return codes.flatten(0, 1)[:count]
