"""ops/group_code.py in two kernels, for CUDA: X is read once and its codes and ranges are written,
B N (2 + bits / 8) bytes in bfloat16; these are read and X^ is written, as many bytes.

A program works on one group of columns, in some units of rows. It goes through the rows whose codes
share bytes, the first of each unit, then the second, and keeps the codes in one integer a unit and
column, 32 bits or, for 5 and 7 bits a code, 64. Noise costs a hash a row and a hash a column of a
program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from basis.ops import group_code, kernels
from basis.ops.bits import unit
from basis.ops.triton.noise import dither, dither_columns, dither_rows

_NUMBERS = 1024  # of a program at a time
_WIDEST = 8192


def fits(dtype: torch.dtype, width: int, group: int) -> bool:
    """Whether there is a kernel for this: not for float64, nor for very wide groups."""
    return dtype.itemsize <= 4 and min(group, width) <= _WIDEST


@triton.jit
def _up_to_bfloat16(x):
    """The bits of x, rounded up to a number that bfloat16 has."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + ((~bits >> 31) & 0xFFFF)) & -65536


@triton.jit
def _encode(
    x,
    key,
    codes,
    ranges,
    count,
    first,
    last,
    first_byte,
    row_stride,
    column_stride,
    N,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    BYTES: tl.constexpr,
    WIDE: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows `first` to `last` of x (count, N)."""
    groups = tl.cdiv(N, GROUP)
    group = tl.program_id(0) % groups
    units = (tl.program_id(0) // groups) * UNITS + tl.arange(0, UNITS)
    within = tl.arange(0, COLUMNS)
    column = group * GROUP + within
    in_group = (within < GROUP) & (column < N)
    of_columns = dither_columns(key, column, count)
    word = tl.zeros((UNITS, COLUMNS), tl.int64 if WIDE else tl.int32)
    for place in range(CODES):
        row = first + units * CODES + place
        there = row < last
        at = row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
        here = there[:, None] & in_group[None, :]
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        least = tl.min(tl.where(in_group[None, :], value, float("inf")), 1)
        most = tl.max(tl.where(in_group[None, :], value, float("-inf")), 1)
        low = -_up_to_bfloat16(-least).to(tl.float32, bitcast=True)
        step_bits = _up_to_bfloat16(tl.div_rn(most - low, (1 << BITS) - 1.0))
        step = step_bits.to(tl.float32, bitcast=True)
        inverse = tl.div_rn(1.0, tl.maximum(step, 1.1754943508222875e-38))
        kept = ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | step_bits
        tl.store(ranges + row.to(tl.int64) * groups + group, kept, mask=there)
        t = (value - low[:, None]) * inverse[:, None]
        w = dither(dither_rows(key, row), of_columns)
        q = tl.floor((t + (0.5 + 0.5 / 65536)) + w * (1.0 / 65536))
        q = tl.minimum(tl.maximum(q, 0.0), (1 << BITS) - 1.0)
        word |= tl.where(here, q.to(tl.int32), 0).to(word.dtype) << (BITS * place)
    used = (first + units * CODES < last)[:, None] & in_group[None, :]
    for byte in tl.static_range(BYTES):
        at = (first_byte + units * BYTES + byte).to(tl.int64)[:, None] * N + column[None, :]
        tl.store(codes + at, ((word >> (8 * byte)) & 255).to(tl.uint8), mask=used)


@triton.jit
def _decode(
    codes,
    ranges,
    key,
    out,
    count,
    first,
    last,
    first_byte,
    N,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    BYTES: tl.constexpr,
    WIDE: tl.constexpr,
    DITHERED: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows `first` to `last` of out (count, N)."""
    groups = tl.cdiv(N, GROUP)
    group = tl.program_id(0) % groups
    units = (tl.program_id(0) // groups) * UNITS + tl.arange(0, UNITS)
    within = tl.arange(0, COLUMNS)
    column = group * GROUP + within
    in_group = (within < GROUP) & (column < N)
    used = (first + units * CODES < last)[:, None] & in_group[None, :]
    word = tl.zeros((UNITS, COLUMNS), tl.int64 if WIDE else tl.int32)
    for byte in tl.static_range(BYTES):
        at = (first_byte + units * BYTES + byte).to(tl.int64)[:, None] * N + column[None, :]
        word |= tl.load(codes + at, mask=used, other=0).to(word.dtype) << (8 * byte)
    of_columns = dither_columns(key, column, count)
    for place in range(CODES):
        row = first + units * CODES + place
        there = row < last
        kept = tl.load(ranges + row.to(tl.int64) * groups + group, mask=there, other=0)
        low = (kept << 16).to(tl.float32, bitcast=True)
        step = (kept & -65536).to(tl.float32, bitcast=True)
        q = ((word >> (BITS * place)) & ((1 << BITS) - 1)).to(tl.float32)
        if DITHERED:
            q -= dither(dither_rows(key, row), of_columns) * (1.0 / 65536)
            low -= step * (0.5 / 65536)
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        value = q * step[:, None] + low[:, None]
        tl.store(out + at, value, mask=there[:, None] & in_group[None, :])


def _sizes(part: group_code.Part, group: int, width: int) -> tuple[int, dict[str, int]]:
    """How many programs a part takes, and the constants of its kernel."""
    codes, size = unit(part.bits)
    group = min(group, width)
    columns = triton.next_power_of_2(group)
    units = max(_NUMBERS // columns, 1)
    blocks = triton.cdiv(triton.cdiv(part.rows.stop - part.rows.start, codes), units)
    return blocks * triton.cdiv(width, group), {
        "GROUP": group,
        "BITS": part.bits,
        "CODES": codes,
        "BYTES": size,
        "WIDE": size > 3,
        "UNITS": units,
        "COLUMNS": columns,
    }


def _encode_op(x: Tensor, key: Tensor, bits: float, group: int) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    parts = group_code.parts(rows, bits)
    codes = torch.empty((parts[-1].bytes.stop, width), dtype=torch.uint8, device=x.device)
    groups = triton.cdiv(width, min(group, width))
    ranges = torch.empty((rows, groups), dtype=torch.int32, device=x.device)
    for part in parts:
        programs, constants = _sizes(part, group, width)
        kernels.wrap(_encode)[(programs,)](
            x,
            key,
            codes,
            ranges,
            rows,
            part.rows.start,
            part.rows.stop,
            part.bytes.start,
            x.stride(0),
            x.stride(1),
            width,
            **constants,
        )
    return codes, ranges


def _decode_op(
    codes: Tensor,
    ranges: Tensor,
    key: Tensor,
    bits: float,
    group: int,
    dithered: bool,
    dtype: torch.dtype,
) -> Tensor:
    rows, width = ranges.shape[0], codes.shape[1]
    out = torch.empty((rows, width), dtype=dtype, device=codes.device)
    for part in group_code.parts(rows, bits):
        programs, constants = _sizes(part, group, width)
        kernels.wrap(_decode)[(programs,)](
            codes,
            ranges,
            key,
            out,
            rows,
            part.rows.start,
            part.rows.stop,
            part.bytes.start,
            width,
            DITHERED=dithered,
            **constants,
        )
    return out


encode = kernels.as_op("group_encode", _encode_op)
decode = kernels.as_op("group_decode", _decode_op)
