"""The two-sided three-sketch of a matrix, and its reconstruction in factors: what `ema_sketch` and
its like are made of.

Of X (B, N), one row per token, and a target rank r, three products with random test matrices are
kept:

    corange  X Upsilon          (B, k)     combinations of columns: along which rows X lies
    range    X^T Omega          (N, k)     combinations of rows: along which features X lies
    core     Phi^T X^T Psi      (s, s)     both sides at once: how the two go together

with k = min(2 r + 1, B, N) and s = min(2 k + 1, B, N). From them alone, with thin QR factorisations
and two least-squares problems (Q and P have orthonormal columns, + is the pseudo-inverse),

    P = qr(corange)   Q = qr(range)   C = (Phi^T Q)^+ core ((Psi^T P)^+)^T        X^ = P C^T Q^T

This is the method of Tropp, Yurtsever, Udell and Cevher (arXiv 1902.08651) in the sizes of
ROL_Sketch.hpp (Sandia), for M = X^T. X^ is exact if X has rank k or less, biased otherwise: a
projection. It is not linear in X, but each *sketch* is: the average of sketches under the same
tests is the sketch of the average.

Tests have independent standard normal entries, each a function of a key and its place
(ops/noise.py): a row of Omega or Psi does not depend on how many rows there are, so that a batch
with fewer rows uses the first ones. They are never kept, but drawn again, 3 k (B + N) numbers or so
each time. All of this is done in float32, or float64 for such an X.

FLOPs: 2 B N (2 k + s) ~ 8 k B N for the sketches, 4 (B + N) k^2 for the two large QR
factorisations, as many for the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from basis.ops.noise import derive, normal_rows


class Tests(NamedTuple):
    """Test matrices for X (B, N)."""

    upsilon: Tensor  # (N, k)
    omega: Tensor  # (B, k)
    phi: Tensor  # (N, s)
    psi: Tensor  # (B, s)


class Sketches(NamedTuple):
    """What is kept of X (B, N)."""

    corange: Tensor  # X upsilon (B, k)
    range: Tensor  # X^T omega (N, k)
    core: Tensor  # phi^T X^T psi (s, s)


class Reconstruction(NamedTuple):
    """X^ = left core^T right^T, left and right with orthonormal columns."""

    left: Tensor  # P (B, k)
    core: Tensor  # C (k, k)
    right: Tensor  # Q (N, k)


def sizes(rank: int, rows: int, width: int) -> tuple[int, int]:
    """k and s for target `rank` of X (rows, width)."""
    k = min(2 * rank + 1, rows, width)
    return k, min(2 * k + 1, rows, width)


def largest_rank(rows: int, width: int) -> int:
    """The rank from which on X (rows, width) is reconstructed whole."""
    return max(1, min(rows, width) // 2)


def draw_tests(key: Tensor, rank: int, rows: int, width: int) -> Tests:
    """The tests that belong to `key` (0-dimensional int64, ops/noise.py) for X (rows, width), on
    the key's device.
    """
    k, s = sizes(rank, rows, width)
    shapes = ((width, k), (rows, k), (width, s), (rows, s))
    return Tests(
        *(
            normal_rows(derive(key, i), slice(0, length), columns)
            for i, (length, columns) in enumerate(shapes)
        )
    )


def sketch(x: Tensor, tests: Tests) -> Sketches:
    """The three sketches of `x` (B, N); B may be less than the tests have rows, which is as good as
    rows of zeros below.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    upsilon, omega, phi, psi = (t.to(x.dtype) for t in tests)
    rows = x.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        return Sketches(x @ upsilon, x.t() @ omega[:rows], (x @ phi).t() @ psi[:rows])


def reconstruct(sketches: Sketches, tests: Tests) -> Reconstruction:
    """P, C and Q of the reconstruction from `sketches` (of as many rows as the tests have) under
    the `tests` they were made with.

    Sketches of zero give C = 0.
    """
    corange, range, core = sketches
    left, right = torch.linalg.qr(corange).Q, torch.linalg.qr(range).Q
    with torch.autocast(core.device.type, enabled=False):
        # Q and P are orthonormal even where the sketches are not of full rank, so both systems have
        # full column rank.
        half = _least_squares(
            tests.phi.to(core.dtype).t() @ right, core
        )  # (s, k) \ (s, s) -> (k, s)
        middle = _least_squares(
            tests.psi.to(core.dtype).t() @ left, half.t()
        )  # (s, k) \ (s, k) -> (k, k)
    return Reconstruction(left, middle.t(), right)


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """A^+ b for A of full column rank; torch.linalg.lstsq does the same, but has no shapes to be
    traced or counted with.
    """
    q, r = torch.linalg.qr(a)
    return torch.linalg.solve_triangular(r, q.t() @ b, upper=True)
