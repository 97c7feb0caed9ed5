"""Count sketch: X by signed sums of rows, each row in a bin of its own choice (Charikar, Chen,
Farach-Colton 2002).

What BASIS is without its two additions: bins are independent instead of balanced, and norms are not
restored. With S[r, b] = signs[b] * [bins[b] = r], R x B, forward keeps S X and backward forms

    dW^ = (S dY)^T (S X)         unbiased, since E[S^T S] = I

    E |dW^ - T|^2 = (|X|^2 |dY|^2 + |T|^2 - 2 sum_b |x_b|^2 |dy_b|^2) / R

with T = dY^T X and Frobenius norms.

(Proof: off its diagonal, S^T S - I has entries signs[a] signs[b] [bins[a] = bins[b]]; two of them
correlate only if they belong to the same unordered pair of rows, and a pair shares a bin with
probability 1/R.) That is the variance of Rademacher RMM at the same R, for B (N + M) additions
instead of R B (N + M). More bins alone never make it exact: among B bins two rows may still meet.
But B bins cost the bytes of X, so at R >= B no row is hashed: X itself is kept. (A key that holds
the hashing is obeyed.)

What is exact: Y, dX, the bias gradient; dW too at R >= B. What is estimated: dW, without bias.
Kept: min(R, B) N elements in the precision of X, and the 8-byte key. FLOPs: B (N + M) for the
sketches (none at R >= B), 2 min(R, B) N M for the product. State between steps: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops.hashing import Hashing, as_state, from_state, own_hashing, shared_hashing
from basis.ops.shared_noise import SharedNoise


@dataclass(frozen=True)
class CountSketch(Estimator):
    """Rank-R sketch of X by independent signed hashing of its rows.

    rank: R, rows kept; at least 1; B or more keep X. Raises ValueError that begins with the name of
    the wrong option.
    """

    knob: ClassVar[str] = "rank"
    shares_noise: ClassVar[bool] = True

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")

    def shared_noise(self, shared: SharedNoise, place: int, rows: int, like: Tensor) -> State:
        if self.rank >= rows:
            return {}
        return as_state(shared_hashing(shared, place, rows, like, self.rank, "uniform"))

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        shared = from_state(state) if key.ndim == 0 else None
        source = (key,) if shared is None else shared.tensors
        return self.sketch(x, *source), *source

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        sketched_x, *source = kept
        return self.sketch(grad_y, *source).t() @ sketched_x

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        sketched_x, *source = kept
        hashing = self._hashing(rows, sketched_x, *source)
        if hashing is None:
            return Factors(sketched_x)
        return Factors(hashing.matrix(sketched_x.dtype).t(), sketched_x)

    def _hashing(self, rows: int, like: Tensor, *source: Tensor) -> Hashing | None:
        """The hashing of `rows` rows, with signs in the dtype of `like`; None where S is the
        identity: there are as many bins as rows, and nobody has said which is whose.
        """
        if len(source) > 1:
            return Hashing(*source)
        (key,) = source
        if key.ndim == 0 and self.rank >= rows:
            return None
        return own_hashing(key, rows, like, min(self.rank, rows), "uniform")

    def sketch(self, x: Tensor, *source: Tensor) -> Tensor:
        """S x, (min(R, B), N), for `x` (B, N). source: a key, or the tensors of a Hashing."""
        hashing = self._hashing(x.shape[0], x, *source)
        return x if hashing is None else hashing.sums(x)
