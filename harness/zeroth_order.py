"""Zeroth order: a gradient from two losses, without backward. The floor of every comparison at
equal bytes: it keeps nothing.

One antithetic step of evolution strategies with low-rank directions (EGGROLL, arXiv 2511.16652):
each parameter W (m, n) gets

    D = A B^T / sqrt(r),    A (m, r) and B (n, r) standard normal: E[D_ij D_kl] = [i = k][j = l]

(vectors: standard normal numbers), and with the losses of one micro-batch at W + sigma D and W -
sigma D, all parameters at once,

    gradient ~ (L(W + sigma D) - L(W - sigma D)) / (2 sigma) * D

What is exact: nothing but the two losses. The expectation is the gradient up to O(sigma^2). Of a
direction drawn evenly in d dimensions the cosine to the true gradient has the mean Gamma(d / 2) /
(sqrt(pi) Gamma((d + 1) / 2)), about 0.8 / sqrt(d): with a million parameters less than a
thousandth, and that is what the method is about. The sign is always right.

The estimate goes through the same clipping and the same optimiser as a gradient. Each micro-batch
of a step has a direction of its own, so accumulation averages them. Noise is a function of (seed,
step, micro-batch, parameter name); both losses see the same dropout masks.

Kept for backward: nothing. Held during a step: the parameters' values, to put back what was there
to the last bit, and their direction, which a parameter's gradient then takes the place of. Cost:
two forwards instead of a forward and a backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basis.ops.noise import box_muller, fold, random_bits


def normal(key: int, count: int, device: torch.device) -> Tensor:
    """`count` standard normal float32 numbers that belong to `key`."""
    half = (count + 1) // 2
    bits = random_bits(torch.full((), key, dtype=torch.int64, device=device), 2 * half)
    first, second = ((bits.double() + 0.5) / 2**32).chunk(2)  # in (0, 1)
    return box_muller(first, second)[:count].float()


@dataclass(frozen=True)
class ZerothOrder:
    """sigma: size of the perturbation, positive. rank: r of a matrix's direction, at least 1.

    Raises ValueError that begins with the name of the wrong option.
    """

    sigma: float = 1e-3
    rank: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma}: must be positive")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")

    def direction(self, parameter: Tensor, key: int) -> Tensor:
        """D for `parameter`, of its shape, in float32."""
        if parameter.ndim != 2:
            return normal(key, parameter.numel(), parameter.device).view(parameter.shape)
        rows, columns = parameter.shape
        factors = normal(key, (rows + columns) * self.rank, parameter.device).view(
            rows + columns, self.rank
        )
        return factors[:rows] @ factors[rows:].t() / math.sqrt(self.rank)

    @torch.no_grad()
    def add_gradient(
        self, model: nn.Module, loss: Callable[[], Tensor], key: int, share: float = 1.0
    ) -> Tensor:
        """Add `share` times the estimate to the `.grad` of every trainable parameter; returns the
        mean of both losses.

        loss: runs `model` on one micro-batch, the same each time. `key` decides the directions. The
        parameters are as before.
        """
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        directions = {name: self.direction(p, fold(key, name)) for name, p in parameters.items()}
        before = {name: p.clone() for name, p in parameters.items()}

        def loss_at(sigma: float) -> Tensor:
            for name, p in parameters.items():
                p.copy_(before[name] + sigma * directions[name])
            return loss()

        with torch.random.fork_rng(
            sorted({p.device.index for p in parameters.values() if p.device.type == "cuda"})
        ):
            above = loss_at(self.sigma)
        below = loss_at(-self.sigma)
        slope = share * (above - below) / (2.0 * self.sigma)  # of the loss along D
        for name, p in parameters.items():
            p.copy_(before[name])
            estimate = directions.pop(name).mul_(slope)
            p.grad = estimate if p.grad is None else p.grad.add_(estimate)
        return (above + below) / 2.0
