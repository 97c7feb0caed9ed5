"""The gradient of a softmax cross-entropy in the place of its logits, and a product that is added
up in a higher precision than its factors have.

Logits Y (B, V) in low precision, on a GPU: the softmax is taken in float32 and rounded once, when
dY is written. A Triton kernel (triton/softmax.py) does a row in two reads and a write, the second
read from the cache. PyTorch's operators need a float32 copy for that, which they go through eight
times, so they take pieces of rows, and no copy is larger than a piece.

A loss may have terms beside the cross-entropy (`Terms`). With l = c tanh(y / c) for a soft cap c,
or l = y, and s = log sum exp(l), a row's loss and its gradient are

    loss = s - (1 - e) l[target] - e / V sum(l) + z s^2
    dl   = (1 + 2 z s) softmax(l) - (1 - e) onehot(target) - e / V
    dy   = dl (1 - (l / c)^2)

for a label smoothing e and a coefficient z. A cap holds a second number for each logit of a piece.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from basis.ops import kernels
from basis.ops.matrix import in_eager_mode

_PIECE = 1 << 24  # numbers of a copy in float32: 64 MiB
_LENGTH = 1 << 13  # rows of a product that is rounded before it is added


@dataclass(frozen=True)
class Terms:
    """What a row's loss has beside the cross-entropy: see the module. 0.0 is none of it."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0

    def losses(
        self, log_sums: Tensor, at_target: Tensor, totals: Tensor | None, classes: int
    ) -> Tensor:
        """Of rows, from s, l[target] and, for a label smoothing, sum(l), all of one shape."""
        if totals is None:
            losses = log_sums - at_target
        else:
            losses = log_sums - (1.0 - self.label_smoothing) * at_target
            losses = losses - totals * (self.label_smoothing / classes)
        return losses + self.z_loss * log_sums.square() if self.z_loss else losses


PLAIN = Terms()


def soft_cap_(y: Tensor, softcap: float) -> Tensor:
    """Turn y into l = softcap tanh(y / softcap), in place; returns dl/dy."""
    slope = torch.neg(y.div_(softcap).tanh_().square()).add_(1.0)
    y.mul_(softcap)
    return slope


def softmax_gradient_(
    y: Tensor,
    classes: int,
    targets: Tensor,
    shares: Tensor,
    losses: Tensor,
    squares: Tensor,
    terms: Terms = PLAIN,
) -> None:
    """Turn logits y (B, >= classes) into dY, the gradient of the rows' losses times `shares`, in
    place; columns behind `classes` are padding, and become zero.

    targets (B,) int64 in [0, classes); shares (B,), what each row counts for, in float32 at least.
    Written to `losses` and `squares`, (B,), of the same precision: log sum exp(y) - y[target] and
    the other terms, and the squared norms of dY's rows.
    """
    if isinstance(y, FakeTensor) and not torch.compiler.is_compiling():
        y.zero_()  # there are no values; a plan of CUDA's bytes takes the kernel, which holds none
        return
    fast = _plain if y.dtype == torch.float64 else _kernel
    kernels.attempt(fast, _plain, y, classes, targets, shares, losses, squares, terms)


def _kernel(
    y: Tensor,
    classes: int,
    targets: Tensor,
    shares: Tensor,
    losses: Tensor,
    squares: Tensor,
    terms: Terms,
) -> None:
    from basis.ops.triton import softmax

    own = (terms.label_smoothing, terms.z_loss, terms.softcap)
    softmax.gradient_(y, classes, targets, shares, losses, squares, *own)


def _plain(
    y: Tensor,
    classes: int,
    targets: Tensor,
    shares: Tensor,
    losses: Tensor,
    squares: Tensor,
    terms: Terms,
) -> None:
    size = max(_PIECE // classes, 1)
    for start in range(0, y.shape[0], size):
        piece = slice(start, start + size)
        logits, index, share = y[piece, :classes], targets[piece, None], shares[piece, None]
        z = logits.to(shares.dtype)  # logits themselves, where they have that precision
        slope = soft_cap_(z, terms.softcap) if terms.softcap else None
        at_target = z.gather(1, index)
        totals = z.sum(1, keepdim=True) if terms.label_smoothing else None
        largest = z.amax(1, keepdim=True)
        total = z.sub_(largest).exp_().sum(1, keepdim=True)
        log_sums = total.log() + largest
        losses[piece] = terms.losses(log_sums, at_target, totals, classes)[:, 0]
        factor = share / total
        z.mul_(factor * (1.0 + 2.0 * terms.z_loss * log_sums) if terms.z_loss else factor)
        if terms.label_smoothing:
            z.sub_(share * (terms.label_smoothing / classes))
            share = share * (1.0 - terms.label_smoothing)
        z.scatter_(1, index, z.gather(1, index) - share)
        if slope is not None:
            z.mul_(slope)
        squares[piece] = torch.linalg.vector_norm(z, dim=1).square_()
        if z.dtype != y.dtype:
            logits.copy_(z)
        del z, slope  # before the next piece's is made
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
