"""Exact backpropagation written as an estimator: keep X, multiply.

nn.Linear does the same, so no run needs it. It is the smallest example of the protocol, and the
control that shows what the machinery around an estimator costs.

Source: the textbook's backpropagation. What is exact: all; nothing is estimated, so nothing is
biased. Kept: B N elements in the precision of X. FLOPs: 2 B N M. State between steps: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basis.estimator import Estimator, Factors, State


@dataclass(frozen=True)
class Exact(Estimator):
    """dW = dY^T X: B * N elements kept, 2 B N M FLOPs."""

    uses_noise: ClassVar[bool] = False

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        return (x,)

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        (x,) = kept
        return grad_y.t() @ x

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        return Factors(kept[0])
