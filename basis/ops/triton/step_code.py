"""ops/step_code.py in two kernels, for CUDA: one reads x and writes a few bits a number, the other
reads these and y and writes the product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from basis.ops import kernels

_NUMBERS = 2048  # of a program


@triton.jit
def _encode(x, boundaries, packed, count, BITS: tl.constexpr, BYTES: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    place = tl.arange(0, PER)[None, :]
    at = byte[:, None] * PER + place
    here = at < count
    value = tl.load(x + at, mask=here, other=0.0)
    code = tl.zeros((BYTES, PER), tl.int32)
    for i in range((1 << BITS) - 1):
        code += (value > tl.load(boundaries + i)).to(tl.int32)
    word = tl.sum(tl.where(here, code, 0) << (BITS * place), 1)
    tl.store(packed + byte, word.to(tl.uint8), mask=byte * PER < count)


@triton.jit
def _times_levels(y, packed, levels, out, count, BITS: tl.constexpr, BYTES: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    place = tl.arange(0, PER)[None, :]
    at = byte[:, None] * PER + place
    here = at < count
    word = tl.load(packed + byte, mask=byte * PER < count, other=0).to(tl.int32)
    code = (word[:, None] >> (BITS * place)) & ((1 << BITS) - 1)
    product = tl.load(y + at, mask=here, other=0.0) * tl.load(levels + code)
    tl.store(out + at, product, mask=here)


def _encode_op(x: Tensor, boundaries: Tensor, bits: int) -> Tensor:
    x = x.contiguous()
    size = _NUMBERS * bits // 8
    packed = torch.empty(triton.cdiv(x.numel() * bits, 8), dtype=torch.uint8, device=x.device)
    programs = triton.cdiv(packed.numel(), size)
    kernels.wrap(_encode)[(programs,)](x, boundaries, packed, x.numel(), BITS=bits, BYTES=size)
    return packed


def _times_levels_op(y: Tensor, packed: Tensor, levels: Tensor, bits: int) -> Tensor:
    y = y.contiguous()
    size = _NUMBERS * bits // 8
    out = torch.empty_like(y)
    programs = triton.cdiv(packed.numel(), size)
    kernels.wrap(_times_levels)[(programs,)](
        y, packed, levels, out, y.numel(), BITS=bits, BYTES=size
    )
    return out


encode = kernels.as_op("step_encode", _encode_op)
times_levels = kernels.as_op("times_levels", _times_levels_op)
