"""Keyed noise: every random bit is a pure function of a key and a row number, never of history.

A sketch needs the same bins and signs twice, once in forward for X and once in backward for dY, and
a third time when a checkpointed block is recomputed. Keeping them costs bytes; drawing them from a
stateful generator makes a resumed or recomputed run differ from the first one. So the noise of a
layer is `hash(key, row)`:

    key  = fold(seed, step, micro_batch, process, layer name)     a 62-bit integer, made on the host
    bits = random_bits(key, B)                                    B 32-bit integers, made where X is

The hash is two rounds of a 32-bit integer finaliser (xor-shift, multiply, xor-shift; constants of
the `lowbias32` family by C. Wellons). Each round is a bijection of 32-bit integers, so the B values
are distinct: sorting them gives a permutation, and their last bit gives the signs. Arithmetic is
plain int64 tensor work: the same bits on CPU and CUDA, in eager mode and under torch.compile, with
no generator to save. Products stay below 2^63, so no overflow is relied upon.

Cost: about ten integer operations a row and, for a permutation, one sort of B integers.

Matrices of noise, B x R numbers that nobody would want to keep, are made of the same bits and can
be made some rows at a time: row b takes the counters b * w to (b + 1) * w, where w is the number of
integers that a row needs. Signs take 1/32 of an integer each, normal numbers a whole one
(Box-Muller: two integers give two of them). Bits and signs are the same everywhere; logarithm and
cosine differ in the last digit between devices. A method that needs several independent matrices
gives each a key of its own, `derive(key, 0)`, `derive(key, 1)`: keys that differ in their last bits
only, as key ^ 1, have the same integers in another order.

Noise to round with (Dither) has to be cheaper than that: a number is hardly worth a hash when two
bits of it are kept. Row b and column n get 16 bits each, r_b and an odd s_n, and their number is
r_b s_n mod 2^16, one multiplication of short integers. For an odd s, r s runs through all residues
as r does: in each column every value is as likely, and rows are independent, so that sums over rows
have the variance of independent noise. Two columns share r; where s_n / s_m is p / q with small odd
p and q, which is chance, their correlation is about 1 / (p q), as often positive as negative: 5e-5
on average over all ratios, 1e-4 in the mean of squares. A sum r_b + s_n would serve too, but as a
matrix it has low rank: what is nearly constant, rounded with it, would be wrong in few directions.
The product has the spectrum of independent noise.

A key is an int64 tensor. With no dimension it is such a seed. With one dimension it *is* the
hashing, one code per row, as `encode_hashing` packs it (8 bytes a row): the way in for explicit
bins and signs.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from basis.ops.matrix import in_eager_mode, stored

_MASK = 0xFFFFFFFF
_BITS = 31  # of a random integer, those left after one is taken for the sign


def pi() -> float:
    """math.pi. With torch.compile(dynamic=True) PyTorch (2.11 to 2.13) fails on floats from outside
    of a function, of modules and of objects, where an autograd Function works with them.
    """
    return math.radians(180.0)


def fold(*parts: int | str) -> int:
    """One integer in [0, 2^62) from any sequence of integers and names; equal parts give equal keys
    on every machine.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def draw_key(device: torch.device) -> Tensor:
    """A fresh key from PyTorch's default generator of `device`: a 0-dimensional int64 tensor."""
    return torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)


def encode_hashing(bins: Tensor, signs: Tensor) -> Tensor:
    """Pack explicit `bins` (B, integers) and `signs` (B, +1 or -1) into a key of B int64 codes, 2 *
    bin + (sign < 0).
    """
    return 2 * bins.to(torch.int64) + (signs < 0).to(torch.int64)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    # 0x846CA68B as a negative number of 31 bits: the same product modulo 2^32, and it fits into
    # int64.
    x = (x * (0x846CA68B - 0x100000000)) & _MASK
    return x ^ (x >> 16)


def random_bits(key: Tensor, count: int, start: int = 0) -> Tensor:
    """`count` distinct 32-bit integers, as int64 on the key's device, for a 0-dimensional `key`:
    number `start` and on.
    """
    counter = torch.arange(start, start + count, dtype=torch.int64, device=key.device)
    return _mix(_mix(counter ^ (key & _MASK)) ^ ((key >> 32) & _MASK))


def crossed_bits(rows: Tensor, columns: Tensor) -> Tensor:
    """A 32-bit integer for each pair of two lists of random bits: (..., R) and (T,), all distinct,
    give (..., R, T) int64.
    """
    return _mix(rows[..., None] ^ columns)


def _mix32(x: Tensor) -> Tensor:
    """`_mix` of 32-bit integers held in int32, of which the last 32 bits of products are wanted."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 0x100000000)
    return x ^ ((x >> 16) & 0xFFFF)


def random_int32(key: Tensor, count: int, start: int = 0) -> Tensor:
    """The bits of `random_bits` as int32, of which a compiler makes fewer instructions."""
    counter = torch.arange(start, start + count, dtype=torch.int32, device=key.device)
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)  # the last 32 bits of each
    return _mix32(_mix32(counter ^ low) ^ high)


class Dither:
    """A matrix of uniform noise, (rows, width), on the device of `key` (0-dimensional); see above.

    Rows are made when they are asked for: only rows + width integers are held. `dither[rows]` are
    whole numbers w from -2^15 to 2^15 - 1, float32, and the noise is u = middle + unit w, an odd
    multiple of 2^-17 in (0, 1). Who rounds adds it up on the way, `t.add_(middle()).add_(w,
    alpha=unit())`: a product with a power of two is exact.

    more: rows beyond `rows` that may be asked for too, 8 at most, with noise that columns have.
    skipped: columns before these, of the same matrix.
    """

    def __init__(self, key: Tensor, rows: int, width: int, more: int = 0, skipped: int = 0) -> None:
        count = rows + max(skipped + width, more)
        # Short integers are multiplied fastest where operations are carried out one by one; a
        # compiler's vectors have none, and it would hash anew for each number of the matrix.
        if in_eager_mode(key):
            held = ((random_bits(key, count) >> 16) - (1 << 15)).to(torch.int16)
        else:
            held = stored(((random_int32(key, count) >> 16) & 0xFFFF) - (1 << 15))
        self._rows = held[: rows + more, None]
        self._columns = held[rows + skipped : rows + skipped + width] | 1

    @staticmethod
    def middle() -> float:
        return 0.5 + 2.0**-17

    @staticmethod
    def unit() -> float:
        return 2.0**-16

    def __getitem__(self, rows: slice) -> Tensor:
        """These rows, (n, width)."""
        product = self._rows[rows] * self._columns
        if product.dtype == torch.int16:  # wraps
            return product.to(torch.float32)
        return (product << 16).to(torch.float32) * 2.0**-16  # the last 16 bits, with their sign


def derive(key: Tensor, index: int) -> Tensor:
    """A key for the use number `index` of a 0-dimensional `key`, independent of the others and of
    `key` itself.
    """
    low, high = random_bits(key, 2, start=(1 << 32) - 2 - 2 * index)  # counters that no row has
    return low ^ (high << 30)


def combine(key: Tensor, identities: Tensor) -> Tensor:
    """A key for each of `identities` (n,), int64: (n,) keys in [0, 2^62), each a function of the
    0-dimensional `key` and its identity alone.
    """
    words = torch.stack((identities & _MASK, identities >> 32))  # (2, n)
    low, high = _mix(_mix(words ^ (key & _MASK)) ^ ((key >> 32) & _MASK))
    return low ^ ((high & (_MASK >> 2)) << 32)


def uniform(key: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`count` numbers in [0, 1): multiples of 2^-24 in float32, of 2^-52 in float64."""
    if dtype == torch.float64:
        high, low = random_bits(key, 2 * count).view(2, count)
        return ((high << 20) | (low >> 12)).to(torch.float64) * 2.0**-52
    return (random_bits(key, count) >> 8).to(torch.float32) * (1.0 / (1 << 24))


def _integers(key: Tensor, rows: slice, width: int) -> Tensor:
    """`width` integers for each of `rows`."""
    count = rows.stop - rows.start
    assert rows.stop * width < _MASK
    return random_bits(key, count * width, start=rows.start * width).view(count, width)


def box_muller(first: Tensor, second: Tensor) -> Tensor:
    """Independent standard normal numbers (..., 2 n) from uniform ones, `first` (..., n) in (0, 1]
    and `second` (..., n) in [0, 1); both are overwritten. (Box and Muller, 1958.)
    """
    radius = first.log_().mul_(-2.0).sqrt_()
    angle = second.mul_(2.0 * pi())
    return torch.cat((radius * angle.cos(), radius * angle.sin()), -1)


def sign_rows(key: Tensor, rows: slice, width: int) -> Tensor:
    """Rows of a matrix of `width` columns of +1 or -1, float32."""
    bits = _integers(key, rows, (width + 31) // 32)
    places = torch.arange(32, dtype=torch.int64, device=key.device)
    ones = ((bits[:, :, None] >> places) & 1).flatten(1)[:, :width]
    return ones.to(torch.float32).mul_(-2.0).add_(1.0)


def normal_rows(key: Tensor, rows: slice, width: int) -> Tensor:
    """Rows of a matrix of `width` columns of independent standard normal numbers, float32, at most
    6.7 in magnitude.
    """
    half = (width + 1) // 2
    bits = _integers(key, rows, 2 * half)
    first = (
        bits[:, :half].to(torch.float32).add_(1.0).mul_(2.0**-32)
    )  # not 0, whose log is infinite
    second = bits[:, half:].to(torch.float32).mul_(2.0**-32)
    return box_muller(first, second)[:, :width]
