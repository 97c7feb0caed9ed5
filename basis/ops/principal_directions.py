"""Where X lies: its principal directions, followed from step to step by orthogonal iteration.

The rows of a layer's input fill their N dimensions unevenly: after a few hundred steps of a small
GPT, a third of the directions holds 98% of the variance (results/rate_distortion). The directions
change slowly, so that a look every few steps is enough,

    C = (X - mean)^T (X - mean) / B
    Y = (1 - r) Q diag(v) + r C Q      one step of orthogonal iteration, averaged
    Q' R = Y                           orthonormal (N, K)
    v'                                 variances along Q', averaged alike, largest first

with r = 1 / (looks + 1) at first, then never below 1 - memory. Q diag(v) stands for the covariance
seen so far, so nothing of size N x N is kept or formed. Source: Oja, J. Math. Biol. 15 (1982) for
the idea; simultaneous iteration as in Golub and Van Loan.

State of a layer: N K + K + 1 numbers in float32. Cost of a look: products of 6 B N K FLOPs and a QR
decomposition of N x K.

The features may be cut into G groups with K / G directions each, found among the group's own
features: state and cost are then 1 / G of that, and what features of different groups share is not
seen. Directions of the groups stand below each other, (N, K / G) together, and a few rows more if G
doesn't divide N.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MEMORY = 0.8
"""Weight of the past in a look, once there have been some."""
EAGER_STEPS = 10
"""So many first steps are all looked at, since Q starts as the first coordinates."""


def initial_directions(
    width: int, count: int, device: torch.device, groups: int = 1
) -> dict[str, Tensor]:
    """State before the first look: of each group the first `count` coordinates, equal variances.

    directions (N, count), variances (groups * count,), looks (), all float32.
    """
    return {
        "directions": torch.eye(
            -(-width // groups), count, dtype=torch.float32, device=device
        ).repeat(groups, 1),
        "variances": torch.ones(groups * count, dtype=torch.float32, device=device),
        "looks": torch.zeros((), dtype=torch.float32, device=device),
    }


def grouped(x: Tensor, groups: int) -> Tensor:
    """`x` (B, N), filled up with zeros, group by group: (G, B, N / G)."""
    if missing := -x.shape[1] % groups:
        x = F.pad(x, (0, missing))
    return x.unflatten(1, (groups, -1)).transpose(0, 1)


def follow(state: Mapping[str, Tensor], x: Tensor, groups: int = 1) -> dict[str, Tensor]:
    """The state after a look at `x` (B, N).

    directions (N, K / G): orthonormal in each group. variances (K,): along them, largest first in
    each group.
    """
    x = x.float()
    centered = grouped(x - x.mean(0), groups)  # (G, B, n)
    directions, looks = state["directions"].unflatten(0, (groups, -1)), state["looks"]
    variances = state["variances"].unflatten(0, (groups, -1))
    rate = (1.0 / (looks + 1.0)).clamp_min(1.0 - MEMORY)
    seen = centered.mT @ (centered @ directions) / x.shape[0]  # (G, n, B) (G, B, k)
    mixed = torch.lerp(directions * variances[:, None], seen, rate)
    new, _ = torch.linalg.qr(mixed)
    variances = torch.lerp(variances, (centered @ new).square().mean(1), rate)
    variances, order = variances.sort(descending=True, stable=True)
    new = new.gather(2, order[:, None].expand_as(new))
    return {"directions": new.flatten(0, 1), "variances": variances.flatten(), "looks": looks + 1.0}


def due(step: int, every: int) -> bool:
    """Whether to look at `step`: at each of the first ones, then at every `every`-th."""
    return step < EAGER_STEPS or step % every == 0
