"""A low-rank approximation of the batch from three random sketches (Tropp, Yurtsever, Udell, Cevher
2019, 1902.08651).

The sketch that Antil and Verma (2510.00442) keep of activations over training steps, here of one
batch alone and with fresh random matrices, so that nothing lives between steps. For X (B, N) and a
target rank r,

    k = min(2 r + 1, B, N),  s = min(2 k + 1, B, N)
    Upsilon (N, k), Omega (B, k), Phi (N, s), Psi (B, s) standard normal
    P, Q = orthonormal bases of X Upsilon (B, k) and of X^T Omega (N, k);   Z = Psi^T X Phi (s, s)
    C = (Psi^T P)^+ Z ((Phi^T Q)^+)^T                  (k, k), two least-squares problems
    X^ = P C Q^T,  C cut to its r largest singular values if `truncate`
    dW^ = (dY^T P) (C Q^T)                             X^ is never formed

What is kept are the two factors, not the three sketches: they are smaller, and backward is left
with two thin products. The cut halves them once more: the columns beyond r make P and Q better and
are then dropped. The sketched core Z lets X be read once and forgotten, which is what the sketch is
made for: data that stream by. In a forward X is there, and `core="exact"` takes C = P^T X Q, the
best for given P and Q, which costs less than Phi and Psi.

What is exact: Y, dX, the bias gradient; dW too, up to rounding, where the rank of X is at most r (k
without the cut), so for r >= min(B, N). What is estimated: dW, with a bias: what lies outside of
the r directions is lost in every step, however often one draws. There is no variance formula; |X -
X^| is within a constant factor of the best approximation of rank r. Relative errors |X - X^| / |X|
for B = 768, N = 512, singular values i^-p, at the bytes of r = 51:

    p                            0       0.5     1       2
    best of rank 51              0.949   0.581   0.103   0.002
    core exact, cut              0.982   0.728   0.141   0.002
    core sketched, cut           1.374   1.020   0.193   0.002       the default: as published
    core sketched, not cut       1.404   1.158   0.284   0.006       r = 25, k = 51

A flat spectrum is no matter for this method, and with the sketched core it is worse than to forget
X.

Kept: r (B + N) elements in the precision of X (k (B + N) without the cut). FLOPs: 4 B N k + 2 B N s
for the sketches (6 B N k with the exact core), about 4 (B + N) k^2 for the bases, 2 B M r + 2 N M r
for the product; bases and least squares in float32 at least. On a GPU, QR and the small SVD take
more time than these FLOPs suggest. State between steps: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops import three_sketch


@dataclass(frozen=True)
class LowRank(Estimator):
    """X by two factors of rank r.

    rank: r, at least 1. truncate: cut the approximation of rank 2 r + 1 down to r, for half the
    bytes. core: "sketched" (as published) or "exact". Raises ValueError that begins with the name
    of the wrong option.
    """

    knob: ClassVar[str] = "rank"
    error_tells_rank: ClassVar[bool] = True

    rank: int
    truncate: bool = True
    core: str = "sketched"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.core not in ("sketched", "exact"):
            raise ValueError(f"core={self.core!r}: must be sketched or exact")

    def knob_values(self, rows: int, width: int) -> Sequence[int]:
        return range(1, min(rows, width) + 1)

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):
            left, right = self._factorise(x.to(torch.promote_types(x.dtype, torch.float32)), key)
        return left.to(x.dtype), right.to(x.dtype)

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        left, right = kept
        return (grad_y.t() @ left) @ right

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        left, right = kept
        return Factors(left, right)

    def _factorise(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors (B, r) and (r, N) whose product is near `x`."""
        tests = three_sketch.draw_tests(key, self.rank, *x.shape)
        if self.core == "exact":
            p, q = (
                torch.linalg.qr(x @ tests.upsilon.to(x.dtype)).Q,
                torch.linalg.qr(x.t() @ tests.omega.to(x.dtype)).Q,
            )
            core = (p.t() @ x) @ q
        else:
            p, core, q = three_sketch.reconstruct(three_sketch.sketch(x, tests), tests)
            core = core.t()
        k = core.shape[0]
        if not self.truncate or self.rank >= k:
            return p, core @ q.t()
        u, values, v = torch.linalg.svd(core)
        r = self.rank
        return p @ u[:, :r], (values[:r, None] * v[:r]) @ q.t()
