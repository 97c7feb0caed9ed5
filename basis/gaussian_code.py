"""A few bits a number for numbers that are nearly normal, without bias: rotation, a uniform quantiser, a scale, bit planes.

    rotate         up to 4,096 numbers together, by random signs, a Hadamard matrix within blocks of 64, a cosine transform across
                   blocks: whatever their distribution was, sums of so many are nearly normal, errors nearly independent
    quantise       b bits: 2^b equal steps that fit a normal variable of the row's deviation best (J. Max, IRE Trans. IT-6, 1960)
    scale          by |z|^2 / <z, q>, one for the numbers rotated together, so that <z^, z> = |z|^2; over the rotations E[z^] = z
                   (DRIVE and EDEN: Vargaftik et al. 2105.08339, 2108.08842). That is exact for uniformly random rotations; with
                   this one a bias of a few percent of z is left at 1 bit (4% for 256 numbers, 2% for 768), under 1% at 2 bits
    bit planes     row i of b_i bits gives b_i planes of one bit a number, 8 to a byte: any bits per row, one static size

Mean-square error of z^ relative to the variance, for a normal z and b bits, with the distortion D_b of the quantiser:

    D_b / (1 - D_b)        b = 1: 0.571   2: 0.135   3: 0.0389   4: 0.0117   5: 0.0035   6: 0.0010   7: 0.0003   8: 0.0001

The bound of rate-distortion theory is 4^-b: D_b exceeds it 1.45-fold at 1 bit, 1.90 at 2, 2.40 at 3, 2.95 at 4. No code of fixed
length for single numbers comes nearer than pi sqrt(3) / 2 = 2.72 at many bits (P. F. Panter and W. Dite, 1951), and one with
equal steps loses slowly more.

Rows here are directions, their numbers are tokens: (K, G, L), G groups of L numbers that are rotated together. Cost: at most
256 K B FLOPs for the rotation, about twelve passes over K B numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.noise import random_bits

BLOCK = 64
MOST_BLOCKS = 64
MOST_BITS = 8
TINY = torch.finfo(torch.float32).tiny
# By bits, 0 first: the best equal step for a normal variable of deviation 1, and the mean-square error with it.
STEPS = (1.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
DISTORTIONS = (1.0, 0.36338, 0.11885, 0.03744, 0.011543, 0.003495, 0.0010400, 0.00030433, 0.000087686)


def groups(count: int) -> tuple[int, int]:
    """How `count` numbers are rotated: in G groups of m blocks of BLOCK numbers, the last ones filled up with zeros."""
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
    matrix = torch.cos(math.pi / size * index[:, None] * (index + 0.5)) * math.sqrt(2.0 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def _signs(key: Tensor, count: int) -> Tensor:
    return (1 - 2 * (random_bits(key, count) & 1)).to(torch.float32)


def rotate(z: Tensor, key: Tensor) -> Tensor:
    """Rows of z (K, B), filled up with zeros and rotated group by group: (K, G, L)."""
    rows, count = z.shape
    number, blocks = groups(count)
    z = F.pad(z * _signs(key, count), (0, number * blocks * BLOCK - count))
    z = z.reshape(-1, BLOCK) @ _hadamard(z)
    if blocks > 1:
        z = _cosine(blocks, z) @ z.view(-1, blocks, BLOCK)  # (m, m) (K G, m, 64)
    return z.view(rows, number, -1)


def rotate_back(z: Tensor, key: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each row, (K, B), as they were before `rotate`."""
    rows = z.shape[0]
    blocks = z.shape[-1] // BLOCK
    if blocks > 1:
        z = _cosine(blocks, z).t() @ z.reshape(-1, blocks, BLOCK)
    z = z.reshape(-1, BLOCK) @ _hadamard(z)
    return z.view(rows, -1)[:, :count] * _signs(key, count)


def allocate(variances: Tensor, planes: int, left_out: float) -> Tensor:
    """Which bit planes to keep: indices 8 i + j of bit j of row i, (planes,), rising, by reverse water-filling.

    Each plane goes where it lowers the error most, sum_i variances_i * error(b_i), error(0) = left_out; error falls and is convex
    in b, so the best planes are the largest of all gains. Raises no error for more planes than 8 K: asserted.
    """
    errors = torch.tensor([left_out, *(d / (1.0 - d) for d in DISTORTIONS[1:])], device=variances.device)
    gains = variances[:, None] * (errors[:-1] - errors[1:])  # (K, 8)
    assert planes <= gains.numel()
    return gains.flatten().topk(planes).indices.sort().values


def bits_by_row(planes: Tensor, rows: int) -> Tensor:
    """b_i (K,), from `allocate`'s indices."""
    return torch.zeros(rows, dtype=torch.int64, device=planes.device).index_add_(
        0, planes // MOST_BITS, torch.ones_like(planes)
    )


def encode(z: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """z (K, G, L) as packed bit planes (planes, G, L / 8) uint8 and the scales (K, G) float32 of `decode`.

    planes: as `allocate` gives them, rising.
    """
    bits = bits_by_row(planes, z.shape[0])
    square = z.square().sum(2)
    step = (square / z.shape[2]).sqrt() * torch.tensor(STEPS, device=z.device)[bits][:, None]
    levels = torch.pow(2.0, bits)[:, None, None]
    code = (z / step.clamp_min(TINY)[..., None] + 0.5 * levels).floor_()
    code = torch.minimum(code.clamp_(min=0.0), levels - 1.0)
    scale = square / (z * (code - 0.5 * (levels - 1.0))).sum(2).clamp_min(TINY)
    scale = torch.where((bits[:, None] > 0) & (square > 0), scale, 0.0)
    chosen = code.to(torch.uint8).index_select(0, planes // MOST_BITS)  # (planes, G, L)
    return pack((chosen >> (planes % MOST_BITS).to(torch.uint8)[:, None, None]) & 1), scale


def decode(packed: Tensor, scale: Tensor, planes: Tensor) -> Tensor:
    """z^ (K, G, L) in float32: planes weighted by the power of two and the scale that they stand for, and summed by row.

    The planes of a row follow each other, so PyTorch's embedding_bag does it in one pass, a bag for each row of each group.
    """
    rows, number = scale.shape
    owner, place = planes // MOST_BITS, planes % MOST_BITS
    bits = unpack(packed.transpose(0, 1)).to(torch.float32)  # (G, planes, L)
    starts = torch.arange(0, number * len(planes), len(planes), device=planes.device)
    first = torch.searchsorted(planes, torch.arange(0, rows * MOST_BITS, MOST_BITS, device=planes.device))
    z = F.embedding_bag(
        torch.arange(number * len(planes), device=planes.device),
        bits.flatten(0, 1),
        (starts[:, None] + first).flatten(),
        mode="sum",
        per_sample_weights=(torch.pow(2.0, place) * scale.t()[:, owner]).flatten(),
    )
    offset = 0.5 * (torch.pow(2.0, bits_by_row(planes, rows)) - 1.0)
    return z.view(number, rows, -1).transpose(0, 1).sub_((offset[:, None] * scale)[..., None])


def pack(plane: Tensor) -> Tensor:
    """Bits (..., B) of 0 and 1 in uint8, 8 to a byte: (..., B / 8). Byte c holds the bits c, c + B/8, c + 2 B/8, ..."""
    parts = plane.unflatten(-1, (8, -1))
    packed = parts[..., 0, :].clone()
    for place in range(1, 8):
        packed |= parts[..., place, :] << place
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The bits again, (..., B)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    return ((packed[..., None, :] >> shifts) & 1).flatten(-2)
