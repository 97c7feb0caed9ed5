"""GELU that keeps two bits a number: which of four intervals its input lies in.

Backward needs nothing of the input but the derivative, dX = dY GELU'(X). The derivative is replaced
by a step function, constant on 2^bits intervals, that is nearest to it in mean square for inputs
that are normal with deviation 1.5; forward is exact. (Few-bit activations: Novikov et al.,
2202.00441. Intervals and levels are found here, by dynamic programming.)

What is exact: the output. What is approximated: dX, by a fixed function of X, so with a bias that
does not average out; its relative mean-square error is about 2% at 2 bits and 0.1% at 4. Kept:
`bits` per number instead of 32.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from basis.exchange import StandIn, take_over
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.ops import step_code
from basis.ops.step_code import Levels

DEVIATION = 1.5
BITS = (1, 2, 4)


def derivative(x: float, approximate: str) -> float:
    """GELU'(x); approximate: "none" or "tanh". Also SiLU'(x), "silu", and that of x / (1 +
    exp(-1.702 x)), "quick".
    """
    if approximate in ("silu", "quick"):
        z = x if approximate == "silu" else 1.702 * x
        gate = 1 / (1 + math.exp(-z))
        return gate * (1 + z * (1 - gate))
    if approximate == "none":
        density = math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + math.erf(x / math.sqrt(2))) + x * density
    root = math.sqrt(2 / math.pi)
    t = math.tanh(root * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)


@functools.cache
def steps(bits: int, approximate: str) -> tuple[Levels, Levels]:
    """Boundaries (2^bits - 1) and levels (2^bits) of the step function nearest to `derivative`.

    Exact for a grid of 240 points: the best division into n intervals is the best of n - 1 up to
    some point, and one more. Plain Python, since it is asked for wherever a model is made, on the
    meta device and among fake tensors too.
    """
    count = 1 << bits
    x = [(i - 119.5) / 20 for i in range(240)]
    weights = [math.exp(-0.5 * (v / DEVIATION) ** 2) for v in x]
    slopes = [derivative(v, approximate) for v in x]
    w = [0.0, *itertools.accumulate(weights)]
    s = [0.0, *itertools.accumulate(a * b for a, b in zip(weights, slopes, strict=True))]
    s2 = [0.0, *itertools.accumulate(a * b * b for a, b in zip(weights, slopes, strict=True))]

    def cost(i: int, j: int) -> float:
        """Squared error of one level for the points i to j - 1."""
        return (s2[j] - s2[i]) - (s[j] - s[i]) ** 2 / (w[j] - w[i])

    # best[j]: least error for the points before j, with the intervals so far. cuts: for each
    # further interval and each j, where that interval begins.
    points = len(x)
    best = [0.0, *(cost(0, j) for j in range(1, points + 1))]
    cuts: list[list[int]] = []
    for interval in range(1, count):
        choices = [
            min(((best[i] + cost(i, j), i) for i in range(interval, j)), default=(math.inf, 0))
            for j in range(points + 1)
        ]
        best, cut = [error for error, _ in choices], [i for _, i in choices]
        cuts.append(cut)
    # Back from the end: the last interval begins where `cut` says, the one before ends there.
    ends = [points]
    for cut in reversed(cuts):
        ends.append(cut[ends[-1]])
    ends.reverse()  # where each interval ends, as a number of points
    starts = [0, *ends[:-1]]
    levels = tuple((s[b] - s[a]) / (w[b] - w[a]) for a, b in zip(starts, ends, strict=True))
    return tuple((x[i - 1] + x[i]) / 2 for i in ends[:-1]), levels


class _FewBitGELU(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, bits: int, approximate: str, boundaries: Levels, levels: Levels
    ) -> Tensor:
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.bits, _, boundaries, ctx.levels = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.save_for_backward(step_code.encode(x, ctx.bits, boundaries), link(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, _ = ctx.saved_tensors
        grad_input = step_code.times_levels(grad_output, packed, ctx.bits, ctx.levels)
        return grad_input, None, None, None, None


def check_bits(bits: int) -> None:
    """Raise ValueError, beginning with `gelu_bits=`, unless there is a GELU of so many bits."""
    if bits not in BITS:
        raise ValueError(f"gelu_bits={bits}: must be one of {', '.join(map(str, BITS))}")


class LeanGELU(StandIn, nn.GELU):
    """nn.GELU that keeps `bits` (1, 2 or 4) per number. Raises ValueError for another number of
    bits.
    """

    def __init__(self, approximate: str = "none", bits: int = 2) -> None:
        super().__init__(approximate)
        check_bits(bits)
        self.bits = bits
        self.boundaries, self.levels = steps(bits, approximate)

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset({"bits", "boundaries", "levels"})

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        if self.for_inference() or not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        return _FewBitGELU.apply(input, self.bits, self.approximate, self.boundaries, self.levels)

    @classmethod
    def from_gelu(cls, gelu: nn.GELU, bits: int) -> LeanGELU:
        """The same GELU with the same hooks and attributes."""
        return take_over(cls(gelu.approximate, bits), gelu)

    def original(self) -> nn.GELU:
        return take_over(nn.GELU(self.approximate), self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"
