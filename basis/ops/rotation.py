"""Rotation of up to 4,096 numbers together, so that sums of so many are nearly normal whatever
their distribution was, and the errors of a code nearly independent: random signs, a Hadamard matrix
within blocks of 64, a cosine transform across blocks.

It is exact but for rounding: orthogonal, so products over the numbers of two rows survive a
rotation of both. Kept is nothing but an 8-byte key. Cost: at most 256 FLOPs a number and two
passes, on the CPU for some rows at a time, so that they lie in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.ops.matrix import in_eager_mode, row_blocks
from basis.ops.noise import pi, sign_rows

BLOCK = 64
MOST_BLOCKS = 64


def chunks(count: int) -> tuple[int, int]:
    """How `count` numbers are rotated: in C chunks of m blocks of BLOCK numbers, the last ones
    filled up with zeros.
    """
    blocks = -(-count // BLOCK)
    number = -(-blocks // MOST_BLOCKS)
    return number, -(-blocks // number)


def _hadamard(like: Tensor) -> Tensor:
    """Orthogonal and symmetric, (BLOCK, BLOCK), entries +-1/8."""
    two = like.new_ones(2, 2)
    two[1, 1] = -1.0
    matrix = two
    while matrix.shape[0] < BLOCK:
        matrix = torch.kron(matrix, two)
    return matrix / math.sqrt(BLOCK)


def _cosine(size: int, like: Tensor) -> Tensor:
    """The orthogonal cosine transform (DCT-II), (size, size)."""
    index = torch.arange(size, dtype=like.dtype, device=like.device)
    matrix = torch.cos(pi() / size * index[:, None] * (index + 0.5)) * math.sqrt(2.0 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix


@functools.cache
def _remembered(blocks: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # or what is made there could not be used elsewhere
        like = torch.empty(0, dtype=dtype, device=device)
        return _hadamard(like), _cosine(blocks, like)


def mixers(blocks: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The Hadamard matrix and the cosine transform for `like`. To make them takes longer than to
    use them: so once only.

    In float32 at least: the angles of a cosine transform are far beyond what bfloat16 can tell
    apart.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if in_eager_mode(like):
        return _remembered(blocks, dtype, like.device)
    like = like.new_empty(0, dtype=dtype)
    return _hadamard(like), _cosine(blocks, like)


def _signs(key: Tensor, count: int) -> Tensor:
    """A sign of each number, float32: 32 of a random integer."""
    return sign_rows(key, slice(0, 1), count)[0]


def rotate(z: Tensor, key: Tensor) -> Tensor:
    """Rows of z (K, B), filled up with zeros and rotated chunk by chunk: (K, C, L), float32 at
    least.
    """
    rows, count = z.shape
    number, blocks = chunks(count)
    hadamard, cosine = mixers(blocks, z)
    signs = _signs(key, count)
    missing = number * blocks * BLOCK - count

    def rotated(part: Tensor) -> Tensor:
        part = F.pad(part * signs, (0, missing)) if missing else part * signs
        part = part.reshape(-1, BLOCK) @ hadamard
        return cosine @ part.view(-1, blocks, BLOCK) if blocks > 1 else part  # (m, m) (K C, m, 64)

    return _row_by_row(rotated, z, count + missing).view(rows, number, -1)


def rotate_back(z: Tensor, key: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each row, (K, B), as they were before `rotate`."""
    blocks = z.shape[-1] // BLOCK
    hadamard, cosine = mixers(blocks, z)
    signs = _signs(key, count)

    def rotated(part: Tensor) -> Tensor:
        rows = len(part)
        if blocks > 1:
            part = cosine.t() @ part.reshape(-1, blocks, BLOCK)
        return (part.reshape(-1, BLOCK) @ hadamard).view(rows, -1)[:, :count] * signs

    return _row_by_row(rotated, z, z.shape[1] * z.shape[2])


def _row_by_row(function: Callable[[Tensor], Tensor], z: Tensor, width: int) -> Tensor:
    """The function of all rows, (K, .): of so many at a time that they lie in the cache."""
    return joined(
        [function(z[part]).reshape(part.stop - part.start, -1) for part in row_blocks(z, width)]
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
