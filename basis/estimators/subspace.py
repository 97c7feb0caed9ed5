"""A tracked feature subspace: X kept as its mean and its coordinates along the K directions that
hold most of it.

    X ~ 1 mean^T + Z Q^T,     Z = (X - 1 mean^T) Q
    dW ~ (dY^T Z) Q^T + (dY^T 1) mean^T

Q (N, K) is orthonormal and followed from step to step (ops/principal_directions.py).

What is exact: Y, dX, the part of dW that belongs to the mean and to the span of Q. What is missing:
all of X outside that span, in every step alike. The estimate is a projection, dW P onto the span
(and the mean), without noise and biased: weights never learn along the directions left out, until
these grow and Q turns to them. With K = N it is exact.

Error: |dW^ - dW| <= |dY| |X (I - Q Q^T)| (Frobenius, X without its mean); the second factor is the
energy left out.

Kept: B K + N numbers in the precision of X. State: N K + K + 1 numbers, between steps
(ops/principal_directions.py). FLOPs: 2 B N K forward, 2 M K (B + N) backward, instead of 2 B N M:
fewer if K < N M / (N + M) and N << B. A look costs 6 B N K and a QR decomposition, every `every`
steps.

`energy` makes the rank adaptive: of the K tracked directions, as many are used as hold that share
of the variance tracked. Their number has to be asked of the device; where values can't be looked at
(fake tensors, compilation) all are used.

Source: no one paper is followed. Relatives: PRAC (2602.23111) and OASIS (2604.09406) track such a
subspace, GaLore that of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from basis.estimator import Estimator, Factors, State
from basis.ops import principal_directions


@dataclass(frozen=True)
class Subspace(Estimator):
    """Coordinates of X in a subspace that is followed between steps.

    rank: K, directions; at least 1, those beyond N are not there. every: steps between looks, at
    least 1. energy: share of the tracked variance to keep, in (0, 1], None for all K directions.

    Raises ValueError that begins with the name of the wrong option.
    """

    uses_noise: ClassVar[bool] = False
    knob: ClassVar[str] = "rank"
    error_tells_rank: ClassVar[bool] = True

    rank: int
    every: int = 10
    energy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ValueError(f"energy={self.energy}: must be in (0, 1], or null for all directions")

    def knob_values(self, rows: int, width: int) -> range:
        return range(1, width + 1)

    def initial_state(self, width: int, device: torch.device) -> dict[str, Tensor]:
        return principal_directions.initial_directions(width, min(self.rank, width), device)

    def learns_at(self, step: int) -> bool:
        return principal_directions.due(step, self.every)

    def learn(self, state: State, x: Tensor, key: Tensor) -> State:
        return principal_directions.follow(state, x)

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        directions = state["directions"][:, : self.directions_used(state["variances"])]
        mean = x.mean(0)
        return (x - mean) @ directions.to(x.dtype), mean, directions

    def directions_used(self, variances: Tensor) -> int:
        """How many of the tracked directions, largest variance first, hold the share `energy`."""
        count = len(variances)
        if (
            self.energy is None
            or isinstance(variances, FakeTensor)
            or torch.compiler.is_compiling()
        ):
            return count
        share = variances.cumsum(0) / variances.sum()
        return min(int((share < self.energy).sum()) + 1, count)

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        coordinates, mean, directions = kept
        along = grad_y.t() @ coordinates  # (M, B) (B, K)
        return along @ directions.t().to(along.dtype) + torch.outer(grad_y.sum(0), mean)

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        coordinates, mean, directions = kept
        left = torch.cat([coordinates, coordinates.new_ones(rows, 1)], 1)
        return Factors(left, torch.cat([directions.t().to(mean.dtype), mean[None]]))
