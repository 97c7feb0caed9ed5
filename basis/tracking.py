"""Where X lies: its principal directions, followed from step to step by orthogonal iteration.

The rows of a layer's input fill their N dimensions unevenly: after a few hundred steps of a small GPT, a third of the directions
holds 99.5% of the variance. The directions change slowly, so that a look every few steps is enough,

    Y = (1 - r) Q diag(v) + r C Q,    C = (X - mean)^T (X - mean) / B          one step of orthogonal iteration, averaged
    Q' R = Y                           orthonormal (N, K)
    v'                                 variances along Q', averaged alike, largest first

with r = 1 / (looks + 1) at first, then never below 1 - memory. Q diag(v) stands for the covariance seen so far, so nothing of
size N x N is kept or formed. Source: Oja, J. Math. Biol. 15 (1982) for the idea; simultaneous iteration as in Golub and Van Loan.

State of a layer: N K + K + 1 numbers in float32. Cost of a look: products of 6 B N K FLOPs and a QR decomposition of N x K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from basis.estimator import State

MEMORY = 0.8
"""Weight of the past in a look, once there have been some."""
EAGER_STEPS = 10
"""So many first steps are all looked at, since Q starts as the first coordinates."""


def initial_directions(width: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """State before the first look: the first `count` coordinates, equal variances."""
    return {
        "directions": torch.eye(width, count, device=device),
        "variances": torch.ones(count, device=device),
        "looks": torch.zeros((), device=device),
    }


def follow(state: State, x: Tensor) -> dict[str, Tensor]:
    """The state after a look at `x` (B, N): directions (N, K) orthonormal, variances (K,) along them, largest first."""
    x = x.float()
    centered = x - x.mean(0)
    directions, variances, looks = state["directions"], state["variances"], state["looks"]
    rate = (1.0 / (looks + 1.0)).clamp_min(1.0 - MEMORY)
    seen = centered.t() @ (centered @ directions) / x.shape[0]  # (N, B) (B, K)
    mixed = torch.lerp(directions * variances, seen, rate)
    new, _ = torch.linalg.qr(mixed)
    variances = torch.lerp(variances, (centered @ new).square().mean(0), rate)
    variances, order = variances.sort(descending=True, stable=True)
    return {"directions": new[:, order].contiguous(), "variances": variances, "looks": looks + 1.0}


def due(step: int, every: int) -> bool:
    """Whether to look at `step`: at each of the first ones, then at every `every`-th."""
    return step < EAGER_STEPS or step % every == 0
