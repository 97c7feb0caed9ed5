"""ops/gaussian_code.py in two kernels, for CUDA. A program has one chunk of one row, up to 64 x 64
numbers: signs, two products with 64 x 64 matrices, and coding or decoding, in registers. So z (K,
B) is read once and a few bits of each number are written, and back. The bytes are those of
`pack_planes`: what one has coded the other restores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from basis.ops import kernels
from basis.ops.rotation import BLOCK, chunks
from basis.ops.triton.noise import random_bits

_LEAST = 16  # of the sides of a product


@triton.jit
def _hadamard():
    """Symmetric and orthogonal, (64, 64): the sign is the parity of the bits in common."""
    side = tl.arange(0, 64)
    common = side[:, None] & side[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return 0.125 - 0.25 * (common & 1).to(tl.float32)


@triton.jit
def _signs(key, chunk, blocks, BLOCKS: tl.constexpr):
    """The signs of the numbers of a chunk, (BLOCKS, 64): 32 of a random integer."""
    word = 2 * (chunk * blocks + tl.arange(0, BLOCKS))
    within = tl.arange(0, 64)[None, :]
    low, high = random_bits(key, word)[:, None], random_bits(key, word + 1)[:, None]
    bit = (tl.where(within < 32, low, high) >> (within & 31).to(tl.uint32)) & 1
    return 1.0 - 2.0 * bit.to(tl.float32)


@triton.jit
def _best_step(bits):
    """best_steps() of ops/gaussian_code.py."""
    step = tl.where(bits == 1, 1.5958, tl.where(bits == 2, 0.9957, 0.5860))
    step = tl.where(bits == 4, 0.3352, tl.where(bits == 5, 0.1881, step))
    step = tl.where(bits == 6, 0.1041, tl.where(bits == 7, 0.0569, step))
    return tl.where(bits == 8, 0.0308, step)


@triton.jit
def _encode(
    z,
    shift,
    key,
    starts,
    cosine,
    packed,
    scales,
    count,
    number,
    blocks,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of a row of z (K, count)."""
    row, chunk = tl.program_id(0) // number, tl.program_id(0) % number
    first = tl.load(starts + row)
    bits = tl.load(starts + row + 1) - first
    at_scale = scales + row * number + chunk
    if bits == 0:
        tl.store(at_scale, 0.0)
    else:
        block, within = tl.arange(0, BLOCKS), tl.arange(0, 64)
        token = (chunk * blocks + block)[:, None] * 64 + within[None, :]
        here = (block < blocks)[:, None] & (token < count)
        value = tl.load(z + row.to(tl.int64) * count + token, mask=here, other=0.0).to(tl.float32)
        value = tl.where(here, value - tl.load(shift + row), 0.0)
        value *= _signs(key, chunk, blocks, BLOCKS)
        value = tl.dot(value, _hadamard(), input_precision=PRECISION)
        inside = (block < blocks)[:, None] & (block < blocks)[None, :]
        mixer = tl.load(cosine + block[:, None] * blocks + block[None, :], mask=inside, other=0.0)
        value = tl.dot(mixer, value, input_precision=PRECISION)
        square = tl.sum(tl.sum(value * value, 1), 0)
        length = (blocks * 64).to(tl.float32)
        step = tl.sqrt(square) * _best_step(bits) / tl.sqrt(length)
        levels = (1 << bits).to(tl.float32)
        code = tl.floor(value / tl.maximum(step, 1.1754943508222875e-38) + 0.5 * levels)
        code = tl.minimum(tl.maximum(code, 0.0), levels - 1.0)
        along = tl.sum(tl.sum((code - 0.5 * (levels - 1.0)) * value, 1), 0)
        scale = square / tl.maximum(along, 1.1754943508222875e-38)
        tl.store(at_scale, tl.where(square > 0.0, scale, 0.0))
        whole = code.to(tl.int32)
        place = tl.arange(0, 8)
        at = block[:, None] * 8 + place[None, :]
        for plane in range(8):
            if plane < bits:
                bit = tl.reshape((whole >> plane) & 1, (BLOCKS, 8, 8))
                byte = tl.sum(bit << place[None, :, None], 1)
                begin = ((first + plane).to(tl.int64) * number + chunk) * (blocks * 8)
                tl.store(packed + begin + at, byte.to(tl.uint8), mask=(block < blocks)[:, None])


@triton.jit
def _decode(
    packed,
    scales,
    key,
    starts,
    cosine,
    out,
    count,
    number,
    blocks,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of a row of out (K, count)."""
    row, chunk = tl.program_id(0) // number, tl.program_id(0) % number
    first = tl.load(starts + row)
    bits = tl.load(starts + row + 1) - first
    block, within = tl.arange(0, BLOCKS), tl.arange(0, 64)
    real = (block < blocks)[:, None]
    token = (chunk * blocks + block)[:, None] * 64 + within[None, :]
    here = real & (token < count)
    target = out + row.to(tl.int64) * count + token
    if bits == 0:
        tl.store(target, tl.zeros((BLOCKS, 64), tl.float32), mask=here)
    else:
        code = tl.zeros((BLOCKS, 64), tl.int32)
        at = block[:, None] * 8 + (within & 7)[None, :]
        for plane in range(8):
            if plane < bits:
                begin = ((first + plane).to(tl.int64) * number + chunk) * (blocks * 8)
                byte = tl.load(packed + begin + at, mask=real, other=0).to(tl.int32)
                code += ((byte >> (within >> 3)[None, :]) & 1) << plane
        middle = 0.5 * ((1 << bits).to(tl.float32) - 1.0)
        value = (code.to(tl.float32) - middle) * tl.load(scales + row * number + chunk)
        value = tl.where(real, value, 0.0)
        inside = (block < blocks)[:, None] & (block < blocks)[None, :]
        mixer = tl.load(cosine + block[None, :] * blocks + block[:, None], mask=inside, other=0.0)
        value = tl.dot(mixer, value, input_precision=PRECISION)
        value = tl.dot(value, _hadamard(), input_precision=PRECISION)
        value *= _signs(key, chunk, blocks, BLOCKS)
        tl.store(target, value, mask=here)


def _constants(blocks: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Tensor cores' ten bits of a factor are enough where z has eight: the error is a tenth of the
    code's at 8 bits.
    """
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return {
        "BLOCKS": max(triton.next_power_of_2(blocks), _LEAST),
        "PRECISION": precision,
        "num_warps": 8,
    }


def _encode_op(
    z: Tensor, shift: Tensor, key: Tensor, starts: Tensor, cosine: Tensor, planes: int
) -> tuple[Tensor, Tensor]:
    z = z.contiguous()
    rows, count = z.shape
    number, blocks = chunks(count)
    packed = torch.empty((planes, number, blocks * BLOCK // 8), dtype=torch.uint8, device=z.device)
    scales = torch.empty((rows, number), dtype=torch.float32, device=z.device)
    kernels.wrap(_encode)[(rows * number,)](
        z,
        shift,
        key,
        starts,
        cosine,
        packed,
        scales,
        count,
        number,
        blocks,
        **_constants(blocks, z.dtype),
    )
    return packed, scales


def _decode_op(
    packed: Tensor,
    scales: Tensor,
    key: Tensor,
    starts: Tensor,
    cosine: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    rows, number = scales.shape
    _, blocks = chunks(count)
    out = torch.empty((rows, count), dtype=dtype, device=scales.device)
    kernels.wrap(_decode)[(rows * number,)](
        packed,
        scales,
        key,
        starts,
        cosine,
        out,
        count,
        number,
        blocks,
        **_constants(blocks, dtype),
    )
    return out


encode = kernels.as_op("gaussian_encode", _encode_op)
decode = kernels.as_op("gaussian_decode", _decode_op)
