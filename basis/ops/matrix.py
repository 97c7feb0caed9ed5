"""Work on the rows of a matrix that several methods share: precision, norms, blocks of rows, sums
down a tall matrix.

A matrix here is X (B, N) or dY (B, M), rows being tokens. In a loss head dY lies in memory column
by column; what is faster there is told apart by the strides.

A tall matrix on the CPU, a vocabulary's logits (V, B): element-wise work and W X^T give each core a
run of its rows, but a sum down the columns and Y^T W give each core some columns of all rows. Every
cache line then passes from one core to the other and back: what is 14 ms of the paper's step
without that was 16 ms at some times and 23 at others, for minutes each, on two virtual cores that
seem to share a cache at some times only. So a tall matrix is reduced piece by piece, then over the
pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_CACHED = 1 << 18  # numbers: a megabyte of float32
_HELD = 1 << 22
_EXACT = 1 << 16  # numbers whose squares one float32 sum adds up without losing digits
_PIECE = 1024  # rows of a tall matrix that one core reduces


def cast_for_autocast(input: Tensor) -> Tensor:
    """`input` in the precision of autocast, if that is on: what is kept of it is then small too."""
    if input.is_meta:  # autocast knows nothing of this device
        return input
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return input.to(torch.get_autocast_dtype(device))
    return input


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within, autocast is off for the device of `x`: what a method computes has the precisions that
    it chose. (For the CPU, float16 autocast refuses to join bfloat16 tensors.)
    """
    device = x.device.type
    # The meta device has no autocast. torch.amp.is_autocast_available knows that, but torch 2.11
    # cannot trace it.
    if not x.is_meta and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def has_values(x: Tensor) -> bool:
    """Whether there is anything to sketch: a batch may be empty (an expert without tokens), the
    meta device has shapes only.
    """
    return x.numel() > 0 and not x.is_meta


def transposed(x: Tensor) -> bool:
    """Whether the matrix lies in memory column by column."""
    return x.stride(0) == 1 and x.stride(1) > 1


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """`torch.promote_types(dtype, torch.float32)`, which PyTorch dispatches as an operation."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_norms(x: Tensor) -> Tensor:
    """Norms of the rows (B,), in the dtype of `x` on the CPU for bfloat16, else in float32 at
    least.

    The CPU's bfloat16 kernel adds in float32 and is 25 times as fast as the one that returns
    float32; a norm is then off by 0.2% at most, in either direction.
    """
    fast = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return torch.linalg.vector_norm(x, dim=1, dtype=x.dtype if fast else at_least_float32(x.dtype))


def frobenius_norm(x: Tensor) -> Tensor:
    """Frobenius norm of a matrix, 0-dimensional, in float32 at least.

    Row by row first, then over the rows: one long float32 sum over millions of elements loses
    digits on the CPU.
    """
    norms = row_norms(x.t() if transposed(x) else x)
    return torch.linalg.vector_norm(norms.to(at_least_float32(x.dtype)))


def _in_parts(x: Tensor) -> Tensor:
    """What has the norm of `x` and can be summed up at once: `x`, or the norms of its rows."""
    if x.numel() <= _EXACT and x.dtype != torch.bfloat16:
        return x
    return row_norms(x.t() if transposed(x) else x)


def frobenius_norms(x: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """`frobenius_norm` of both, in as few operations as there can be in eager mode: a sketch's norm
    comes with that of what it is a sketch of.
    """
    if not in_eager_mode(x):
        return frobenius_norm(x), frobenius_norm(small)
    if x.device.type == "cpu":
        x, small = _in_parts(x), _in_parts(small)
    norm, small_norm = torch._foreach_norm((x, small), 2, at_least_float32(x.dtype))
    return norm, small_norm


def in_eager_mode(x: Tensor) -> bool:
    """Whether operations on `x` are carried out one by one, and now: it is not fake, no compiler or
    transform looks on.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
    )


def stored(x: Tensor) -> Tensor:
    """`x`, which a compiler then computes once and stores; else it may compute it anew wherever it
    is used, a number of a row for each number of a matrix.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def row_blocks(x: Tensor, width: int) -> list[slice]:
    """The rows of `x` in blocks such that `width` numbers for each row of a block are few enough to
    be held next to x.

    Blocks begin at multiples of 8. In eager mode on the CPU they fit into the cache; a compiler
    joins operations anyway, and among fake tensors, where each operation costs the same whatever
    its size, blocks are large too.
    """
    in_cache = x.device.type == "cpu" and in_eager_mode(x)
    size = max((_CACHED if in_cache else _HELD) // width // 8, 1) * 8
    return [slice(start, min(start + size, x.shape[0])) for start in range(0, x.shape[0], size)]


def _pieces(x: Tensor, least: int = _PIECE) -> int:
    """How many pieces of at least `least` rows to reduce a matrix in; 1 where they gain nothing."""
    return max(x.shape[0] // max(least, _PIECE), 1) if x.device.type == "cpu" else 1


def _split(x: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """Views of `x` (V, B): pieces of equal length (pieces, V // pieces, B), and the fewer than
    `pieces` rows left over.
    """
    length = x.shape[0] // pieces
    return x[: pieces * length].view(pieces, length, x.shape[1]), x[pieces * length :]


def reduce_columns(reduce: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    """`reduce(x, 0)`, shape (B,), of a contiguous `x` (V, B), for a reduction of reductions such as
    torch.amax or torch.sum.
    """
    pieces = _pieces(x)
    if pieces == 1:
        return reduce(x, 0)
    parts, rest = _split(x, pieces)
    return reduce(torch.cat((reduce(parts, 1), rest)), 0)


def tall_product(a: Tensor, b: Tensor) -> Tensor:
    """A^T B, shape (B, N), of contiguous a (V, B) and b (V, N) with many more rows than columns.

    The sums of the pieces together are at most an eighth of A. In low precision it is one product:
    rounded once.
    """
    pieces = _pieces(a, 8 * b.shape[1]) if a.dtype in (torch.float32, torch.float64) else 1
    if pieces == 1:
        return a.t() @ b
    (parts_a, rest_a), (parts_b, rest_b) = _split(a, pieces), _split(b, pieces)
    total = torch.bmm(parts_a.transpose(1, 2), parts_b).sum(0)
    return torch.addmm(total, rest_a.t(), rest_b, out=total)  # FLOP counters don't know addmm_
