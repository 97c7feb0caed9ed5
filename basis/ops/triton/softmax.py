"""Logits to dY in place, a row a program: see basis/ops/softmax.py, whose plain version is the
oracle.

A row of 50,257 bfloat16 numbers, 98 KiB, is read twice and written once. The rows that run at once
fit into the cache of a GPU, so that memory sees one read and one write. The largest logit and the
sum are kept up together in the first pass, the sum scaled down whenever a larger logit comes. Whole
tiles are read without a mask: a mask that ends amid eight neighbours would split their load.

The other terms of a loss are constants of the kernel: where there are none, it has none of their
work. A soft cap is taken again in the second pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_WARPS = 8


@triton.jit
def _tanh(z):
    """By its series near zero, where the quotient would lose digits."""
    square = z * z
    series = z * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
    return tl.where(square < 0.005, series, 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def _capped(z, SOFTCAP: tl.constexpr):
    if SOFTCAP > 0.0:
        z = SOFTCAP * _tanh(z / SOFTCAP)
    return z


@triton.jit
def _slope(z, SOFTCAP: tl.constexpr):
    """The gradient in the place of a capped logit, by one in its place before."""
    return 1.0 - (z / SOFTCAP) * (z / SOFTCAP)


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
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    number = tl.program_id(0)
    row = y + number.to(tl.int64) * stride
    place = tl.arange(0, TILE)
    target = tl.load(targets + number)
    share = tl.load(shares + number)
    at_target = _capped(tl.load(at_targets + number).to(tl.float32), SOFTCAP)

    # A row ends in a part of a tile, which may have no number at all.
    last = WHOLE + place
    there = last < CLASSES
    z = tl.load(row + last, mask=there, other=-float("inf")).to(tl.float32)
    if SOFTCAP > 0.0:
        z = tl.where(there, _capped(z, SOFTCAP), -float("inf"))
    largest = tl.maximum(tl.max(z, 0), at_target)
    total = tl.sum(tl.exp(z - largest), 0)
    logits = tl.sum(tl.where(there, z, 0.0), 0) if SMOOTHING > 0.0 else 0.0
    for first in range(0, WHOLE, TILE):
        z = _capped(tl.load(row + first + place).to(tl.float32), SOFTCAP)
        larger = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), 0)
        largest = larger
        if SMOOTHING > 0.0:
            logits += tl.sum(z, 0)
    log_sum = tl.log(total) + largest
    loss = log_sum - at_target
    factor = share / total
    each = 0.0  # in all places
    hit = share  # at the target
    if SMOOTHING > 0.0:
        loss += SMOOTHING * (at_target - logits / CLASSES)
        each = share * (SMOOTHING / CLASSES)
        hit = share * (1.0 - SMOOTHING)
    if Z_LOSS > 0.0:
        loss += Z_LOSS * log_sum * log_sum
        factor *= 1.0 + 2.0 * Z_LOSS * log_sum
    tl.store(losses + number, loss)

    square = tl.zeros((TILE,), tl.float32)
    z = _capped(tl.load(row + last, mask=there, other=-float("inf")).to(tl.float32), SOFTCAP)
    dz = tl.exp(z - largest) * factor - tl.where(last == target, hit, 0.0)
    if SMOOTHING > 0.0:
        dz -= each
    if SOFTCAP > 0.0:
        dz *= _slope(z, SOFTCAP)
    dz = tl.where(there, dz, 0.0)
    square += dz * dz
    tl.store(row + last, dz, mask=last < PADDED)
    for first in range(0, WHOLE, TILE):
        z = _capped(tl.load(row + first + place).to(tl.float32), SOFTCAP)
        dz = tl.exp(z - largest) * factor - tl.where(first + place == target, hit, 0.0)
        if SMOOTHING > 0.0:
            dz -= each
        if SOFTCAP > 0.0:
            dz *= _slope(z, SOFTCAP)
        square += dz * dz
        tl.store(row + first + place, dz)
    tl.store(squares + number, tl.sum(square, 0))


def gradient_(
    y: Tensor,
    classes: int,
    targets: Tensor,
    shares: Tensor,
    losses: Tensor,
    squares: Tensor,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
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
            SMOOTHING=smoothing,
            Z_LOSS=z_loss,
            SOFTCAP=softcap,
            num_warps=_WARPS,
        )
