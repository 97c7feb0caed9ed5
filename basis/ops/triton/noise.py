"""The noise of ops/noise.py within kernels: the same bits."""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """A bijection of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, counter):
    """The random integers number `counter` (int32) of the key that `key` points to, uint32."""
    seed = tl.load(key)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return mix(mix(counter.to(tl.uint32) ^ low) ^ high)


@triton.jit
def dither_rows(key, rows):
    """What `dither` needs of each row, int32."""
    return (random_bits(key, rows) >> 16).to(tl.int32) - 32768


@triton.jit
def dither_columns(key, columns, count):
    """What `dither` needs of each column of a matrix of `count` rows, int32."""
    return ((random_bits(key, count + columns) >> 16).to(tl.int32) - 32768) | 1


@triton.jit
def dither(of_rows, of_columns):
    """w (R, C) float32 of `Dither` for these rows (R,) and columns (C,)."""
    product = of_rows[:, None] * of_columns[None, :]
    return ((product << 16) >> 16).to(tl.float32)  # the last 16 bits, with their sign
