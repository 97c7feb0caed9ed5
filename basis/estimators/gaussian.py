"""RMM: X multiplied from the left by a dense random matrix (Bershatsky et al., 2201.13195,
randomised matrix multiplication).

With S (B, R) of independent entries of mean 0 and variance 1, drawn again in backward from the key,
forward keeps S^T X / R and backward forms

    dW^ = (S^T dY)^T (S^T X) / R          unbiased, since E[S S^T] / R = I

    Gaussian      E |dW^ - T|^2 = (|X|^2 |dY|^2 + |T|^2) / R
    Rademacher    E |dW^ - T|^2 = (|X|^2 |dY|^2 + |T|^2 - 2 sum_b |x_b|^2 |dy_b|^2) / R

with T = dY^T X, Frobenius norms, and rows x_b and dy_b.

(Proof: the R columns of S are independent draws, so it is a variance divided by R. For one column
s, the entries s_a s_b of s s^T correlate only within the same unordered pair of rows, which gives
the first two terms; the diagonal has E s_a^4 - 1, which is 2 for a normal number, what pairs of
equal rows would count for anyway, and 0 for a sign.) So signs are never worse, cost less, and are
exact in low precision. The gain is small where no row dominates. More columns alone never make it
exact: at R = B the error is still of the size of dW, at the bytes of X. So at R >= B nothing is
multiplied: X itself is kept.

S never exists whole: it is formed for some rows at a time, multiplied with them, and dropped; X is
read once. (A fused loss head asks for S whole, B R numbers.)

What is exact: Y, dX, the bias gradient; dW too at R >= B. What is estimated: dW, without bias.
Kept: min(R, B) N elements in the precision of X, and the 8-byte key. FLOPs: 2 R B (N + M) for the
sketches, 2 R N M for the product, and 2 R B normal numbers at some 30 integer and floating-point
operations each; at R >= B the exact product alone. State between steps: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops.matrix import row_blocks
from basis.ops.noise import normal_rows, sign_rows


@dataclass(frozen=True)
class Gaussian(Estimator):
    """Rank-R projection of X over its rows by a dense random matrix.

    rank: R, rows kept; at least 1; B or more keep X. distribution: of the matrix's entries,
    "gaussian" or "rademacher" (+1 or -1). Raises ValueError that begins with the name of the wrong
    option.
    """

    knob: ClassVar[str] = "rank"

    rank: int
    distribution: str = "gaussian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.distribution not in ("gaussian", "rademacher"):
            raise ValueError(f"distribution={self.distribution!r}: must be gaussian or rademacher")

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        if self.rank >= x.shape[0]:
            return x, key
        return (self._project(x, key) / self.rank).to(x.dtype), key

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        projected_x, key = kept
        if self.rank >= grad_y.shape[0]:
            return grad_y.to(projected_x.dtype).t() @ projected_x
        return self._project(grad_y, key).to(projected_x.dtype).t() @ projected_x

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        projected_x, key = kept
        if self.rank >= rows:
            return Factors(projected_x)
        return Factors(self._matrix(key, slice(0, rows)).to(projected_x.dtype), projected_x)

    def _matrix(self, key: Tensor, rows: slice) -> Tensor:
        """These rows of S, float32."""
        return (normal_rows if self.distribution == "gaussian" else sign_rows)(key, rows, self.rank)

    def _project(self, x: Tensor, key: Tensor) -> Tensor:
        """S^T x, (R, N), for `x` (B, N), R < B; in float32 at least, as blocks are summed."""
        total = torch.zeros(
            self.rank,
            x.shape[1],
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        for rows in row_blocks(x, self.rank):
            total += self._matrix(key, rows).to(x.dtype).t() @ x[rows]
        return total
