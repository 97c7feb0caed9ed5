"""Logits to dY in place, a row a program: see basis/ops/softmax.py, whose plain version is the
oracle.

A row of 50,257 bfloat16 numbers, 98 KiB, is read twice and written once. The rows that run at once
fit into the cache of a GPU, so that memory sees one read and one write. The largest logit and the
sum are kept up together in the first pass, the sum scaled down whenever a larger logit comes. Whole
tiles are read without a mask: a mask that ends amid eight neighbours would split their load.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_WARPS = 8


@triton.jit
def _gradient(
    y,
    stride,
    targets,
    shares,
    at_targets,
    losses,
    squares,
    CLASSES: tl.constexpr,
    PADDED: tl.constexpr,
    WHOLE: tl.constexpr,  # columns in whole tiles
    TILE: tl.constexpr,
):
    number = tl.program_id(0)
    row = y + number.to(tl.int64) * stride
    place = tl.arange(0, TILE)
    target = tl.load(targets + number)
    share = tl.load(shares + number)
    at_target = tl.load(at_targets + number).to(tl.float32)

    # A row ends in a part of a tile, which may have no number at all.
    last = WHOLE + place
    z = tl.load(row + last, mask=last < CLASSES, other=-float("inf")).to(tl.float32)
    largest = tl.maximum(tl.max(z, 0), at_target)
    total = tl.sum(tl.exp(z - largest), 0)
    for first in range(0, WHOLE, TILE):
        z = tl.load(row + first + place).to(tl.float32)
        larger = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), 0)
        largest = larger
    tl.store(losses + number, tl.log(total) + largest - at_target)

    factor = share / total
    square = tl.zeros((TILE,), tl.float32)
    z = tl.load(row + last, mask=last < CLASSES, other=-float("inf")).to(tl.float32)
    z = tl.exp(z - largest) * factor - tl.where(last == target, share, 0.0)
    z = tl.where(last < CLASSES, z, 0.0)
    square += z * z
    tl.store(row + last, z, mask=last < PADDED)
    for first in range(0, WHOLE, TILE):
        z = tl.load(row + first + place).to(tl.float32)
        z = tl.exp(z - largest) * factor - tl.where(first + place == target, share, 0.0)
        square += z * z
        tl.store(row + first + place, z)
    tl.store(squares + number, tl.sum(square, 0))


def gradient_(
    y: Tensor, classes: int, targets: Tensor, shares: Tensor, losses: Tensor, squares: Tensor
) -> None:
    """`softmax_gradient_` of basis/ops/softmax.py; y in bfloat16, float16 or float32, its rows
    contiguous.
    """
    padded = y.shape[1]
    tile = min(_TILE, triton.next_power_of_2(padded))
    whole = classes // tile * tile
    assert padded - whole <= tile  # what is left and the padding are in one tile
    # A kernel would read the logit of a target out of range from anywhere; gather asserts.
    at_targets = y[:, :classes].gather(1, targets[:, None])
    with torch.cuda.device_of(y):
        _gradient[(y.shape[0],)](
            y,
            y.stride(0),
            targets,
            shares,
            at_targets,
            losses,
            squares,
            CLASSES=classes,
            PADDED=padded,
            WHOLE=whole,
            TILE=tile,
            num_warps=_WARPS,
        )
