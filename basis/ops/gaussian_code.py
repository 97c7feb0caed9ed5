"""A few bits a number for numbers that are nearly normal, without bias: rotation, a uniform
quantiser, a scale, bit planes.

    rotate       up to 4,096 numbers together (rotation.py): whatever their distribution was, they
                 are nearly normal then, and errors nearly independent
    quantise     b bits: 2^b equal steps that fit a normal variable of the row's deviation best
                 (J. Max, IRE Trans. IT-6, 1960)
    scale        by |z|^2 / <z, q>, one for the numbers rotated together, so that <z^, z> = |z|^2;
                 over the rotations E[z^] = z (DRIVE and EDEN: Vargaftik et al. 2105.08339,
                 2108.08842). That is exact for uniformly random rotations; with this one a bias of
                 a few percent of z is left at 1 bit (4% for 256 numbers, 2% for 768), under 1% at
                 2 bits
    bit planes   row i of b_i bits gives b_i planes of one bit a number, 8 to a byte: any bits per
                 row, one static size

Mean-square error of z^ relative to the variance, for a normal z and b bits, with the distortion D_b
of the quantiser:

    b                  1       2       3        4        5        6        7        8
    D_b / (1 - D_b)    0.571   0.135   0.0389   0.0117   0.0035   0.0010   0.0003   0.0001

The bound of rate-distortion theory is 4^-b: D_b exceeds it 1.45-fold at 1 bit, 1.90 at 2, 2.40 at
3, 2.95 at 4. No code of fixed length for single numbers comes nearer than pi sqrt(3) / 2 = 2.72 at
many bits (P. F. Panter and W. Dite, 1951), and one with equal steps loses slowly more.

Rows here are directions, their numbers are tokens: (K, C, L), C chunks of L numbers that are
rotated together. Cost: at most 256 K B FLOPs for the rotation, about twelve passes over K B
numbers, on the CPU some at a time so that they lie in the cache. On CUDA all of that is one kernel
of Triton to code and one to restore (triton/gaussian_code.py): a chunk of a row, 64 x 64 numbers,
lies in a program's registers from the first product to the last bit, so z is read once and z^ is
written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.ops import kernels
from basis.ops.bits import to_bytes
from basis.ops.matrix import in_eager_mode, row_blocks
from basis.ops.rotation import chunks, joined, mixers, rotate, rotate_back
from basis.ops.tables import table

MOST_BITS = 8
_ONES = 0x0101010101010101  # the lowest bit of each of eight bytes
# By bits, 0 first: the mean-square error of the best equal step for a normal variable of deviation
# 1. The steps are in `best_steps`.
DISTORTIONS = (
    1.0,
    0.36338,
    0.11885,
    0.03744,
    0.011543,
    0.003495,
    0.0010400,
    0.00030433,
    0.000087686,
)


def tiny() -> float:
    """The least positive normal float32."""
    return torch.finfo(torch.float32).tiny


def best_steps() -> tuple[float, ...]:
    """By bits, 0 first: the best equal step for a normal variable of deviation 1."""
    return (1.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)


def allocate(variances: Tensor, planes: int, left_out: float) -> Tensor:
    """Which bit planes to keep: indices 8 i + j of bit j of row i, (planes,), rising, by reverse
    water-filling.

    Each plane goes where it lowers the error most, sum_i variances_i * error(b_i), error(0) =
    left_out; error falls and is convex in b, so the best planes are the largest of all gains. A
    row's lower planes come first also where gains are alike: with left_out = 1 (the second bit
    would gain 1% more than the first), and in rows without variance. So gains are made to fall by
    0.1% over 8 bits, and variances are 1e-12 of the largest at least. Raises no error for more
    planes than 8 K: asserted.
    """
    errors = table((left_out, *(d / (1.0 - d) for d in DISTORTIONS[1:])), variances)
    by_bit = torch.cummin(errors[:-1] - errors[1:], 0).values * torch.linspace(
        1.0, 0.999, MOST_BITS, device=variances.device
    )
    gains = (
        variances.clamp_min(1e-12 * variances.max()).clamp_min(tiny() * 1e12)[:, None] * by_bit
    )  # (K, 8)
    # gain (i, j) is that of bit j of row i, so the places of the largest ones are the planes.
    assert planes <= gains.numel()
    return gains.flatten().topk(planes).indices.sort().values


def starts(planes: Tensor, rows: int) -> Tensor:
    """Where the planes of each row begin among `planes`, as `allocate` gives them, and the number
    of all: (rows + 1,) int32.
    """
    first = torch.arange(0, MOST_BITS * rows + 1, MOST_BITS, device=planes.device)
    return torch.searchsorted(planes, first, out_int32=True)


def bits_by_row(planes: Tensor, rows: int) -> Tensor:
    """b_i (K,), from `allocate`'s indices."""
    return starts(planes, rows).diff()


def compress(z: Tensor, shift: Tensor, key: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of z (K, B), less a number of each row (K,), rotated and coded: bit planes (planes, C, L
    / 8) uint8, and the scales (K, C) float32 of `restore`. z is overwritten.
    """
    return kernels.attempt(_compress_by_kernel, _compress, z, shift, key, planes)


def _compress(z: Tensor, shift: Tensor, key: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    return encode(rotate(z.float().sub_(shift[:, None]), key), planes)


def _compress_by_kernel(
    z: Tensor, shift: Tensor, key: Tensor, planes: Tensor
) -> tuple[Tensor, Tensor]:
    from basis.ops.triton import gaussian_code

    _, blocks = chunks(z.shape[1])
    first = starts(planes, len(z))
    return gaussian_code.encode(z, shift, key, first, mixers(blocks, shift)[1], len(planes))


def restore(
    packed: Tensor, scale: Tensor, key: Tensor, planes: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    """z^ (K, B), the rows that `compress` was given with the shift taken off, in `dtype`."""
    return kernels.attempt(_restore_by_kernel, _restore, packed, scale, key, planes, count, dtype)


def _restore(
    packed: Tensor, scale: Tensor, key: Tensor, planes: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    return rotate_back(decode(packed, scale, planes), key, count).to(dtype)


def _restore_by_kernel(
    packed: Tensor, scale: Tensor, key: Tensor, planes: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    from basis.ops.triton import gaussian_code

    _, blocks = chunks(count)
    first = starts(planes, len(scale))
    return gaussian_code.decode(packed, scale, key, first, mixers(blocks, scale)[1], count, dtype)


def encode(z: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """z (K, C, L) as packed bit planes (planes, C, L / 8) uint8 and the scales (K, C) float32 of
    `decode`.

    planes: as `allocate` gives them, rising.
    """
    rows, number, length = z.shape
    owner, place = planes // MOST_BITS, (planes % MOST_BITS).to(torch.uint8)[:, None, None]
    first = starts(planes, rows)
    bits = first.diff()
    steps = table(best_steps(), z)[bits][:, None]
    levels = (1 << bits)[:, None].to(torch.float32)
    packed: list[Tensor] = []
    scales: list[Tensor] = []
    for part, of_part in _blocks(first, number * length):
        codes, scale = _quantise(z[part], steps[part], levels[part])
        chosen = codes.index_select(0, owner[of_part] - part.start)  # (planes, C, L)
        packed.append(pack_planes((chosen >> place[of_part]) & 1))
        scales.append(scale)
    return joined(packed), joined(scales)


def _blocks(first: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows, with the planes that are theirs, in blocks that lie in the cache; all together where
    that is in vain.

    first: of `starts`. A block may have no planes.
    """
    if first.device.type == "cpu" and in_eager_mode(first):
        begin = first.tolist()
        for part in row_blocks(first[1:], width):
            yield part, slice(begin[part.start], begin[part.stop])
    else:
        yield slice(0, len(first) - 1), slice(None)


def _quantise(z: Tensor, best: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 to levels - 1 of z (k, C, L), and scales (k, C). best: the step for deviation 1;
    levels: 2^bits; both (k, 1).
    """
    norm = torch.linalg.vector_norm(z, dim=2)
    step = norm * best / math.sqrt(z.shape[2])
    code = (
        (z * (1.0 / step.clamp_min(tiny()))[..., None])
        .add_((0.5 * levels)[..., None])
        .floor_()
        .clamp_(min=0.0)
    )
    code = torch.minimum(code, (levels - 1.0)[..., None], out=code)
    codes = to_bytes(code)
    along = code.sub_((0.5 * (levels - 1.0))[..., None]).mul_(z).sum(2)
    scale = norm.square() / along.clamp_min(tiny())
    return codes, torch.where((levels > 1.0) & (norm > 0.0), scale, 0.0)


def decode(packed: Tensor, scale: Tensor, planes: Tensor) -> Tensor:
    """z^ (K, C, L) in float32: planes weighted by the power of two and the scale that they stand
    for, and summed by row.

    The planes of a row follow each other, so PyTorch's embedding_bag does it in one pass, a bag for
    each row of each chunk.
    """
    rows, number = scale.shape
    first = starts(planes, rows)
    weights = (1 << planes % MOST_BITS)[:, None] * scale[planes // MOST_BITS]  # (planes, C)
    # A code of b bits is the sum of its planes, 2^place each; quantisation levels lie around 0, so
    # half the largest code, (2^b - 1) / 2, is taken off.
    offset = ((((1 << first.diff()) - 1) * 0.5)[:, None] * scale)[..., None]
    length = 8 * packed.shape[-1]
    found: list[Tensor] = []
    for part, of_part in _blocks(first, number * length):
        ones = unpack_planes(packed[of_part].transpose(0, 1)).to(torch.float32)  # (C, planes, L)
        index = torch.arange(ones.shape[0] * ones.shape[1], device=planes.device)
        # embedding_bag sums runs of consecutive rows: run (chunk c, row i) begins at plane first[i]
        # of chunk c, and a row without planes is an empty run, whose sum is 0.
        begin = torch.arange(number, device=planes.device)[:, None] * ones.shape[1]
        bags = begin + (first[part] - first[part.start])
        by_plane = weights[of_part].t().flatten()
        sums = F.embedding_bag(
            index, ones.flatten(0, 1), bags.flatten(), mode="sum", per_sample_weights=by_plane
        )
        found.append(sums.view(number, -1, length).transpose(0, 1).sub_(offset[part]))
    return joined(found)


def pack_planes(plane: Tensor) -> Tensor:
    """Bits (..., L) of 0 and 1 in uint8, 8 to a byte: (..., L / 8). L is a multiple of 64; a byte
    holds bits that lie 8 apart within 64.

    So eight bytes at a time are shifted and added, as one integer.
    """
    words = plane.view(torch.int64).unflatten(-1, (-1, 8))  # (..., L / 64, 8)
    return (words << torch.arange(8, device=plane.device)).sum(-1).view(torch.uint8)


def unpack_planes(packed: Tensor) -> Tensor:
    """The bits of which `pack_planes` made `packed`: (..., L) of 0 and 1, uint8."""
    words = packed.view(torch.int64)[..., None] >> torch.arange(8, device=packed.device)
    return words.bitwise_and_(_ONES).flatten(-2).view(torch.uint8)
