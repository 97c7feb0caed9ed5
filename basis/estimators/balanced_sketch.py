"""BASIS: a balanced count sketch of X, with norms restored (V. Khasia, arXiv 2604.16324, Algorithm
1).

Forward takes a signed hashing of the B rows into R bins (ops/hashing.py),
S[r, b] = signs[b] * [bins[b] = r], and keeps

    X~ = S X                    R x N instead of B x N (Balanced Hashing: equal bins, or one off)
    X^ = X~ |X| / (|X~| + eps)  same norm as X              (Invariant Scalar; Frobenius norms)

Backward takes the same hashing, sketches dY alike, and multiplies R rows instead of B:

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

Kept: R N elements in the precision of X (with `center` N more), and an 8-byte key, or a part of
the hashing that all layers of a micro-batch have in common: 12 B + 4 R bytes for all of them. In
eager mode that is twelve operations a layer beyond the exact ones, two more on a CPU where X or dY
has more than 65,536 numbers. FLOPs besides the product: B (N + M) multiply-adds for the norms and
as many for the sketches (in a loss head, where dY lies column by column, 2 R B M for its sketch).
State between steps: none. The published code also uses shrinkage = 0.01 unless told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops.hashing import Hashing, as_state, from_state, own_hashing, shared_hashing
from basis.ops.matrix import at_least_float32, frobenius_norms
from basis.ops.shared_noise import SharedNoise


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
    shares_noise: ClassVar[bool] = True

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

    @property
    def at_most_input(self) -> bool:  # type: ignore[override]
        """With shrinkage, dW is shrunk at every rank, also where it could be exact."""
        return self.constant("shrinkage") == 0.0

    def shared_noise(self, shared: SharedNoise, place: int, rows: int, like: Tensor) -> State:
        if self._is_permutation(rows):
            return {}
        rank = min(self.rank, rows)
        return as_state(shared_hashing(shared, place, rows, like, rank, self.hashing))

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        """The sketch; what the hashing can be had from again, the key or what layers share; with
        `center` the mean.
        """
        shared = from_state(state) if key.ndim == 0 else None
        source = (key,) if shared is None else shared.tensors
        if not self.center:
            return self.sketch(x, *source), *source
        mean = x.mean(0, dtype=at_least_float32(x.dtype)).to(x.dtype)
        return self.sketch(x - mean, *source), *source, mean

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        sketched_x, source, mean = self._parts(kept)
        result = self.sketch(grad_y, *source).t() @ sketched_x
        return result if mean is None else torch.addr(result, grad_y.sum(0), mean)

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        sketched_x, source, mean = self._parts(kept)
        hashing = self._hashing(rows, sketched_x, *source)
        if hashing is None:
            return Factors(sketched_x, None, lambda norm, _: self._scale(norm, norm), mean)
        return Factors(hashing.matrix(sketched_x.dtype).t(), sketched_x, self._scale, mean)

    def _parts(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """The sketch, the source of the hashing and the mean of what `compress` has kept."""
        sketch, *source = kept
        mean = source.pop() if self.center else None
        return sketch, tuple(source), mean

    def _scale(self, norm: Tensor, sketched_norm: Tensor) -> Tensor:
        """What a sketch is multiplied by, from |X| and |X~|."""
        share = 1.0 - self.constant("shrinkage")
        if self.invariant_scalars:
            # share |X| / (|X~| + eps), with the share in the denominator: one operation less
            return norm / torch.rsub(sketched_norm, self.constant("eps") / share, alpha=-1 / share)
        return torch.full_like(norm, share)

    def _is_permutation(self, rows: int) -> bool:
        """Whether every row has a bin for itself: S is a signed permutation then, which S^T S takes
        away again.
        """
        return self.rank >= rows and self.hashing == "balanced"

    def _hashing(self, rows: int, like: Tensor, *source: Tensor) -> Hashing | None:
        """The hashing of `rows` rows, with signs in the dtype of `like`; None for a permutation."""
        if len(source) > 1:
            return Hashing(*source)
        (key,) = source
        if key.ndim == 0 and self._is_permutation(rows):
            return None
        return own_hashing(key, rows, like, min(self.rank, rows), self.hashing)

    def sketch(self, x: Tensor, *source: Tensor) -> Tensor:
        """X^ of Algorithm 1 for `x` (B, N), times 1 - shrinkage: (min(R, B), N) in the dtype of
        `x`. source: a key, or the tensors of a Hashing.
        """
        hashing = self._hashing(x.shape[0], x, *source)
        if self.invariant_scalars:
            if hashing is None:
                sketch, *norms = x, *frobenius_norms(x, x)
            else:
                explicit = len(source) == 1 and source[0].ndim == 1
                balanced = self.hashing == "balanced" and not explicit
                sketch, *norms = hashing.sums_and_norms(x, balanced=balanced)
            return (sketch * self._scale(*norms)).to(x.dtype)
        sketch = x if hashing is None else hashing.sums(x)
        shrinkage = self.constant("shrinkage")
        return sketch if shrinkage == 0.0 else sketch * (1.0 - shrinkage)
