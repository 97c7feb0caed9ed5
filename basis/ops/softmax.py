"""The gradient of a softmax cross-entropy in the place of its logits, and a product that is added
up in a higher precision than its factors have.

Logits Y (B, V) in low precision, on a GPU: the softmax is taken in float32 and rounded once, when
dY is written. A Triton kernel (triton/softmax.py) does a row in two reads and a write, the second
read from the cache. PyTorch's operators need a float32 copy for that, which they go through eight
times, so they take pieces of rows, and no copy is larger than a piece.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from basis.ops import kernels
from basis.ops.matrix import in_eager_mode

_PIECE = 1 << 24  # numbers of a copy in float32: 64 MiB
_LENGTH = 1 << 13  # rows of a product that is rounded before it is added


def softmax_gradient_(
    y: Tensor, classes: int, targets: Tensor, shares: Tensor, losses: Tensor, squares: Tensor
) -> None:
    """Turn logits y (B, >= classes) into dY = shares (softmax(y) - onehot(targets)), in place;
    columns behind `classes` are padding, and become zero.

    targets (B,) int64 in [0, classes); shares (B,), what each row counts for, in float32 at least.
    Written to `losses` and `squares`, (B,), of the same precision: log sum exp(y) - y[target], and
    the squared norms of dY's rows.
    """
    if isinstance(y, FakeTensor) and not torch.compiler.is_compiling():
        y.zero_()  # there are no values; a plan of CUDA's bytes takes the kernel, which holds none
        return
    fast = _plain if y.dtype == torch.float64 else _kernel
    kernels.attempt(fast, _plain, y, classes, targets, shares, losses, squares)


def _kernel(
    y: Tensor, classes: int, targets: Tensor, shares: Tensor, losses: Tensor, squares: Tensor
) -> None:
    from basis.ops.triton import softmax

    softmax.gradient_(y, classes, targets, shares, losses, squares)


def _plain(
    y: Tensor, classes: int, targets: Tensor, shares: Tensor, losses: Tensor, squares: Tensor
) -> None:
    size = max(_PIECE // classes, 1)
    for start in range(0, y.shape[0], size):
        piece = slice(start, start + size)
        logits, index, share = y[piece, :classes], targets[piece, None], shares[piece, None]
        z = logits.to(shares.dtype)  # logits themselves, where they have that precision
        at_target = z.gather(1, index)
        largest = z.amax(1, keepdim=True)
        total = z.sub_(largest).exp_().sum(1, keepdim=True)
        losses[piece] = (total.log() + largest - at_target)[:, 0]
        z.mul_(share / total)
        z.scatter_(1, index, z.gather(1, index) - share)
        squares[piece] = torch.linalg.vector_norm(z, dim=1).square_()
        if z.dtype != y.dtype:
            logits.copy_(z)
        del z  # before the next piece's is made
    if y.shape[1] > classes:
        y[:, classes:] = 0


@functools.cache
def _has_mixed_products(device: torch.device) -> bool:
    """Whether a product of low-precision factors can be added to a float32 matrix there."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total += a @ b`, in place and in the precision of total (m, n); a (m, k) and b (k, n) of the
    same precision or a lower one.

    On CUDA the product of low-precision factors is never rounded. Elsewhere it is, before it is
    added, some rows at a time, so that no copy is as large as `total`.
    """
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, out=total)  # FLOP counters don't know addmm_
    if in_eager_mode(a) and _has_mixed_products(a.device):
        # PyTorch 2.11 to 2.13 know this operator on CUDA alone, and not on fake tensors.
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    for start in range(0, total.shape[0], _LENGTH):
        rows = slice(start, start + _LENGTH)
        total[rows] += a[rows] @ b
    return total
