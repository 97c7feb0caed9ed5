"""ops/rounding.py in two kernels, for CUDA: x is read once, with whatever strides its four
dimensions have, and 8 bits a number are written; these are read and x^ is written. A program works
on one block of columns of some rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from basis.ops import kernels
from basis.ops.rounding import block_length
from basis.ops.triton.noise import dither, dither_columns, dither_rows

WIDEST = 8192
"""Numbers of a block at most."""
_NUMBERS = 1024  # of a program


@triton.jit
def _place(ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, width):
    """The rows (ROWS,) of this program, its block, and the columns (COLUMNS,) of that."""
    blocks = width // BLOCK
    rows = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % blocks
    return rows, block, block * BLOCK + tl.arange(0, COLUMNS)


@triton.jit
def _encode(
    x,
    key,
    codes,
    scales,
    count,
    skipped,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    stride3,
    width,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x (size0, size1, size2, width) as codes (count, width) and scales (count, blocks)."""
    row, block, column = _place(ROWS, COLUMNS, BLOCK, width)
    there = row < count
    here = there[:, None] & (tl.arange(0, COLUMNS) < BLOCK)[None, :]
    wide = row.to(tl.int64)
    outer = wide // size2
    at = (outer // size1) * stride0 + (outer % size1) * stride1 + (wide % size2) * stride2
    at = at[:, None] + column[None, :] * stride3
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(value), 1) * (1.0 / 127)
    tl.store(scales + wide * (width // BLOCK) + block, scale, mask=there)
    inverse = tl.div_rn(1.0, tl.maximum(scale, 1.1754943508222875e-38))
    w = dither(dither_rows(key, row), dither_columns(key, skipped + column, count))
    q = tl.floor((value * inverse[:, None] + (0.5 + 0.5 / 65536)) + w * (1.0 / 65536))
    q = tl.minimum(tl.maximum(q, -127.0), 127.0)
    tl.store(codes + wide[:, None] * width + column[None, :], q.to(tl.int8), mask=here)


@triton.jit
def _decode(
    codes,
    scales,
    out,
    count,
    width,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, block, column = _place(ROWS, COLUMNS, BLOCK, width)
    there = row < count
    here = there[:, None] & (tl.arange(0, COLUMNS) < BLOCK)[None, :]
    wide = row.to(tl.int64)
    at = wide[:, None] * width + column[None, :]
    scale = tl.load(scales + wide * (width // BLOCK) + block, mask=there, other=0.0)
    q = tl.load(codes + at, mask=here, other=0).to(tl.float32)
    tl.store(out + at, q * scale[:, None], mask=here)


def _sizes(count: int, width: int, block: int) -> tuple[int, dict[str, int]]:
    """How many programs there are, and the constants of the kernel."""
    columns = triton.next_power_of_2(block)
    rows = max(_NUMBERS // columns, 1)
    constants = {"BLOCK": block, "ROWS": rows, "COLUMNS": columns}
    return triton.cdiv(count, rows) * (width // block), constants


def _encode_op(x: Tensor, key: Tensor, place: int) -> tuple[Tensor, Tensor]:
    shape, width = x.shape, x.shape[-1]
    block = block_length(width)
    codes = torch.empty(shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*shape[:-1], width // block), dtype=torch.float32, device=x.device)
    wide = x.reshape(-1, *shape[-3:]) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]
    count = codes.numel() // width
    programs, constants = _sizes(count, width, block)
    kernels.wrap(_encode)[(programs,)](
        wide,
        key,
        codes,
        scales,
        count,
        place * width,
        wide.shape[1],
        wide.shape[2],
        wide.stride(0),
        wide.stride(1),
        wide.stride(2),
        wide.stride(3),
        width,
        **constants,
    )
    return codes, scales


def _decode_op(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    width = codes.shape[-1]
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    count = codes.numel() // width
    programs, constants = _sizes(count, width, width // scales.shape[-1])
    kernels.wrap(_decode)[(programs,)](codes, scales, out, count, width, **constants)
    return out


encode = kernels.as_op("round_to_int8", _encode_op)
decode = kernels.as_op("restore_int8", _decode_op)
