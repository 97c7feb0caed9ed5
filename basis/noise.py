"""Keyed noise: every random bit is a pure function of a key and a row number, never of history.

A sketch needs the same bins and signs twice, once in forward for X and once in backward for dY, and a third time when a
checkpointed block is recomputed. Keeping them costs bytes; drawing them from a stateful generator makes a resumed or
recomputed run differ from the first one. So the noise of a layer is `hash(key, row)`:

    key  = fold(seed, step, micro_batch, rank, layer name)        one 62-bit integer, made on the host
    bits = random_bits(key, B)                                    B integers of 32 bits, made where X lives

The hash is two rounds of a 32-bit integer finaliser (xor-shift, multiply, xor-shift; constants of the `lowbias32` family by
C. Wellons). Each round is a bijection of 32-bit integers, so the B values are distinct: sorting them gives a permutation,
and their last bit gives the signs. Arithmetic is plain int64 tensor work: the same bits on CPU and CUDA, in eager mode and
under torch.compile, with no generator to save. Products stay below 2^63, so no overflow is relied upon.

Cost: about ten integer operations a row and, for a permutation, one sort of B integers.

A key is an int64 tensor. With no dimension it is such a seed. With one dimension it *is* the hashing, one code per row, as
`encode_hashing` packs it (8 bytes a row): the way in for explicit bins and signs.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_BITS = 31  # of a random integer, those left after one is taken for the sign


def fold(*parts: int | str) -> int:
    """One integer in [0, 2^62) from any sequence of integers and names; equal parts give equal keys on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def draw_key(device: torch.device) -> Tensor:
    """A fresh key from PyTorch's default generator of `device`: a 0-dimensional int64 tensor."""
    return torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)


def encode_hashing(bins: Tensor, signs: Tensor) -> Tensor:
    """Pack explicit `bins` (B, integers) and `signs` (B, +1 or -1) into a key of B int64 codes, 2 * bin + (sign < 0)."""
    return 2 * bins.to(torch.int64) + (signs < 0).to(torch.int64)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    # 0x846CA68B as a negative number of 31 bits: the same product modulo 2^32, and it fits into int64.
    x = (x * (0x846CA68B - 0x100000000)) & _MASK
    return x ^ (x >> 16)


def random_bits(key: Tensor, rows: int) -> Tensor:
    """`rows` distinct 32-bit integers, as int64 on the key's device, for a 0-dimensional `key`."""
    counter = torch.arange(rows, dtype=torch.int64, device=key.device)
    return _mix(_mix(counter ^ (key & _MASK)) ^ ((key >> 32) & _MASK))


def crossed_bits(rows: Tensor, columns: Tensor) -> Tensor:
    """A 32-bit integer for each pair of two lists of random bits: (..., R) and (T,), all distinct, give (..., R, T) int64."""
    return _mix(rows[..., None] ^ columns)


def draw_hashing(key: Tensor, rows: int, rank: int, hashing: str) -> tuple[Tensor, Tensor]:
    """Bins (rows, int64 in [0, rank)) and signs (rows, int64, +1 or -1) that belong to `key`.

    `hashing="balanced"`: a random permutation of arange(rows) mod rank, so that bin sizes differ by one at most (BASIS,
    Algorithm 1, line 3). `"uniform"`: an independent bin for each row, as in a plain count sketch.
    A key of one dimension already holds the answer and `hashing` is not looked at.
    """
    if key.ndim == 1:
        return key >> 1, 1 - 2 * (key & 1)
    bits = random_bits(key, rows)
    signs = 1 - 2 * (bits & 1)
    bits = bits >> 1
    if hashing == "uniform":
        return (bits * rank) >> _BITS, signs
    assert hashing == "balanced", hashing
    order = torch.argsort(bits, stable=True)
    slots = torch.arange(rows, dtype=torch.int64, device=key.device) % rank
    return torch.empty_like(slots).scatter_(0, order, slots), signs
