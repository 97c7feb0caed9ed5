"""BASIS: a balanced count sketch of X, with norms restored (V. Khasia, arXiv 2604.16324, Algorithm
1).

Forward draws a signed hashing of the B rows into R bins, S[r, b] = signs[b] * [bins[b] = r], and
keeps

    X~ = S X                    R x N instead of B x N (Balanced Hashing: equal bins, or one off)
    X^ = X~ |X| / (|X~| + eps)  same norm as X              (Invariant Scalar; Frobenius norms)

Backward draws the same hashing again from its key, sketches dY alike, and multiplies R rows instead
of B:

    dW^ = (1 - shrinkage)^2 dY^^T X^                        M x N, 2 R N M FLOPs instead of 2 B N M

What is exact: Y, dX, the bias gradient. What is estimated: dW. Without Invariant Scalars and
shrinkage it is unbiased, since E[S^T S] = I. With them it is not: they keep the magnitude of X and
dY, hence bound |dW^| by |X| |dY|.

Variance without them, over the draws of S for fixed X and dY (T = dY^T X, sums over rows b, all
norms Frobenius):

    E |dW^ - T|^2 = p (|X|^2 |dY|^2 + |T|^2 - 2 sum_b |x_b|^2 |dy_b|^2)

where p is the probability that two given rows share a bin: 1/R for uniform hashing, and for
balanced hashing with B = q R + s the share of same-bin pairs, (s (q + 1) q + (R - s) q (q - 1)) /
(B (B - 1)); with s = 0 that is (B/R - 1) / (B - 1). So balancing multiplies the variance by (B - R)
/ (B - 1), and R = B is exact. (Proof: S^T S - I has entries signs[a] signs[b] [bins[a] = bins[b]]
off the diagonal; two of them correlate only if they belong to the same unordered pair of rows.
reference.py has the formula, the tests compare it with draws.)

`hashing="uniform"` is the paper's ablation of balancing, and stays what it is: at R = B it pays the
bytes of X and is noisy, since two rows may meet in a bin. The count sketch that keeps X then is
count_sketch.py.

An option of ours, not the paper's, is `center`: the mean m of X's rows is taken out first and kept.
Since X = (X - 1 m^T) + 1 m^T,

    dW^ = sketched product of dY and X - 1 m^T,  plus  (sum of dY's rows) m^T

whose second part is exact. The variance above then has X - 1 m^T in the place of X, so it is
without what m's direction contributes; the Invariant Scalars are those of X - 1 m^T and of dY, and
shrinkage spares the exact part. dY is not centred.

Kept: R N elements in the precision of X (with `center` N more), and the 8-byte key. FLOPs besides
the product: B (N + M) multiply-adds for the norms and as many for the sketches (in a loss head,
where dY lies column by column, 2 R B M for its sketch). State between steps: none. The published
code also uses shrinkage = 0.01 unless told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops.matrix import frobenius_norm, sign_matrix, signed_bin_sums
from basis.ops.noise import draw_hashing


@dataclass(frozen=True)
class BalancedSketch(Estimator):
    """Rank-R sketch of X by signed hashing of its rows.

    rank: R, rows kept; at least 1. Rows fewer than R are all kept (R_safe = min(R, B)). hashing:
    "balanced" (the paper) or "uniform" (an independent bin per row: the paper's ablation, not exact
    at any rank). invariant_scalars: restore the Frobenius norms of X and dY. shrinkage: lambda of
    the published code, in [0, 1); dW is multiplied by (1 - lambda)^2. eps: added to the norm that
    is divided by; positive. center: keep the mean of X's rows exactly and sketch the rest.

    Raises ValueError that begins with the name of the wrong option.
    """

    knob: ClassVar[str] = "rank"

    rank: int
    hashing: str = "balanced"
    invariant_scalars: bool = True
    shrinkage: float = 0.0
    eps: float = 1e-8
    center: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.hashing not in ("balanced", "uniform"):
            raise ValueError(f"hashing={self.hashing!r}: must be balanced or uniform")
        if not 0.0 <= self.shrinkage < 1.0:
            raise ValueError(f"shrinkage={self.shrinkage}: must be in [0, 1)")
        if not self.eps > 0.0:
            raise ValueError(f"eps={self.eps}: must be positive")

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        if not self.center:
            return self.sketch(x, key), key
        mean = x.mean(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        return self.sketch(x - mean, key), key, mean

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        sketched_x, key, *mean = kept
        result = self.sketch(grad_y, key).t() @ sketched_x
        return torch.addr(result, grad_y.sum(0), mean[0]) if mean else result

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        sketched_x, key, *means = kept
        mean = means[0] if means else None
        rank = sketched_x.shape[0]
        if self._is_permutation(rows, key):
            return Factors(sketched_x, None, lambda norm, _: self._scale(norm, norm), mean)
        bins, signs = draw_hashing(key, rows, rank, self.hashing)
        return Factors(
            sign_matrix(bins, signs, rank, sketched_x.dtype).t(), sketched_x, self._scale, mean
        )

    def _scale(self, norm: Tensor, sketched_norm: Tensor) -> Tensor:
        """What a sketch is multiplied by, from |X| and |X~|."""
        share = 1.0 - self.constant("shrinkage")
        if self.invariant_scalars:
            return share * norm / (sketched_norm + self.constant("eps"))
        return torch.full_like(norm, share)

    def _is_permutation(self, rows: int, key: Tensor) -> bool:
        """Whether every row has a bin for itself: S is a signed permutation then, which S^T S takes
        away again.
        """
        return self.rank >= rows and self.hashing == "balanced" and key.ndim == 0

    def sketch(self, x: Tensor, key: Tensor) -> Tensor:
        """X^ of Algorithm 1 for `x` (B, N), times 1 - shrinkage: (min(R, B), N) in the dtype of
        `x`.
        """
        rows = x.shape[0]
        rank = min(self.rank, rows)
        if self._is_permutation(rows, key):
            sketch = x
        else:
            bins, signs = draw_hashing(key, rows, rank, self.hashing)
            sketch = signed_bin_sums(x, bins, signs, rank)
        if self.invariant_scalars:
            return (sketch * self._scale(frobenius_norm(x), frobenius_norm(sketch))).to(x.dtype)
        shrinkage = self.constant("shrinkage")
        return sketch if shrinkage == 0.0 else sketch * (1.0 - shrinkage)
