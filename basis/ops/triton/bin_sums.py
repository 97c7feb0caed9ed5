"""Sums of signed rows by bin, with the norms before and after, in one read of X.

A program takes a part of one bin's rows and some columns: it reads the numbers of the rows from
their list (hashing.py), then the rows, and adds them up in float32 with their signs and their
squares. Nothing is sorted, scattered or added atomically, so the same input gives the same bits.
Where bins are too few to fill a device, several programs share a bin and a second kernel adds up
their parts. A last, small one takes the roots.

Read: X once, 8 bytes a row for each block of columns. Written: R N numbers; where bins are shared,
`split` R N of them more, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from basis.ops.kernels import as_op, wrap

_ROWS = 16  # of a bin that are read at once
_COLUMNS = 512
_PROGRAMS = 1056  # eight on each of an H100's 132 multiprocessors


@triton.jit
def _sums(
    x,
    stride,
    order,
    signs,
    out,
    squares,
    squares_out,
    COLUMNS_ALL,
    RANK,
    size,  # rows of a bin, but for
    larger,  # the first bins, which have one more
    per,  # rows of a bin for one program
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0)
    block = tl.program_id(1)
    part = tl.program_id(2)
    begin = r * size + tl.minimum(r, larger) + part * per
    end = tl.minimum(r * size + tl.minimum(r, larger) + size + (r < larger), begin + per)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < COLUMNS_ALL
    total = tl.zeros((COLUMNS,), tl.float32)
    square = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        place = begin + step * ROWS + tl.arange(0, ROWS)
        real = place < end
        row = tl.load(order + place, mask=real, other=0).to(tl.int64)
        sign = tl.load(signs + place, mask=real, other=0.0).to(tl.float32)
        at = x + row[:, None] * stride + columns[None, :]
        values = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(values * sign[:, None], 0)
        square += tl.sum(values * values, 0)
    where = part.to(tl.int64) * RANK + r
    tl.store(out + where * COLUMNS_ALL + columns, total, mask=inside)
    number = where * tl.num_programs(1) + block
    tl.store(squares + number, tl.sum(square, 0))
    tl.store(squares_out + number, tl.sum(total * total, 0))


@triton.jit
def _join(parts, out, squares_out, COLUMNS_ALL, RANK, SPLIT: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0)
    block = tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < COLUMNS_ALL
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(SPLIT):
        at = parts + (part * RANK + r).to(tl.int64) * COLUMNS_ALL + columns
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(out + r.to(tl.int64) * COLUMNS_ALL + columns, total, mask=inside)
    tl.store(squares_out + r * tl.num_programs(1) + block, tl.sum(total * total, 0))


@triton.jit
def _roots(squares, squares_out, norms, count, count_out, STEPS: tl.constexpr, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), tl.float32)
    total_out = tl.zeros((SIZE,), tl.float32)
    for step in range(STEPS):
        place = step * SIZE + tl.arange(0, SIZE)
        total += tl.load(squares + place, mask=place < count, other=0.0)
        total_out += tl.load(squares_out + place, mask=place < count_out, other=0.0)
    tl.store(norms, tl.sqrt(tl.sum(total, 0)))
    tl.store(norms + 1, tl.sqrt(tl.sum(total_out, 0)))


def _bin_sums(x: Tensor, order: Tensor, signs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    size, larger = rows // rank, rows % rank
    most = size + (larger > 0)
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    blocks = triton.cdiv(width, columns)
    split = max(1, min(triton.cdiv(most, _ROWS), triton.cdiv(_PROGRAMS, rank * blocks)))
    per = triton.cdiv(most, split)
    split = triton.cdiv(most, per)
    at_once = min(_ROWS, triton.next_power_of_2(per))
    out = x.new_empty(rank, width)
    parts = out if split == 1 else x.new_empty(split * rank, width, dtype=torch.float32)
    squares = x.new_empty(2, split * rank * blocks, dtype=torch.float32)
    norms = x.new_empty(2, dtype=torch.float32)
    wrap(_sums)[(rank, blocks, split)](
        x,
        x.stride(0),
        order,
        signs,
        parts,
        squares[0],
        squares[1],
        width,
        rank,
        size,
        larger,
        per,
        STEPS=triton.cdiv(per, at_once),
        ROWS=at_once,
        COLUMNS=columns,
        num_warps=4,
    )
    if split > 1:
        wrap(_join)[(rank, blocks)](
            parts, out, squares[1], width, rank, SPLIT=split, COLUMNS=columns, num_warps=4
        )
    count = split * rank * blocks
    wrap(_roots)[(1,)](
        squares[0],
        squares[1],
        norms,
        count,
        rank * blocks,
        STEPS=triton.cdiv(count, 1024),
        SIZE=1024,
        num_warps=4,
    )
    return out, norms


_op = as_op("bin_sums", _bin_sums)


def bin_sums(x: Tensor, order: Tensor, signs: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """S x (rank, N) in the dtype of `x` (B, N), rank <= B, and |x| and |S x| in float32, for a
    balanced hashing: bins of `order` (B,), int32, one after the other, the first B mod rank with a
    row more; `signs` (B,) in that order.
    """
    out, norms = _op(x, order, signs, rank)
    norm, norm_out = norms.unbind()
    return out, norm, norm_out
