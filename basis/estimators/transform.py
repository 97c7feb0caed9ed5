"""Transform coding of X: its principal directions, each with the bits that its variance deserves,
rounded without bias.

    X ~ 1 mean^T + Z^ Q^T,   Z = (X - 1 mean^T) Q,   Z^ = Z in b_i bits a number in direction i
    dW ~ (dY^T Z^) Q^T + (dY^T 1) mean^T

Q holds K orthonormal directions followed from step to step (ops/principal_directions.py). `bits`
times N bits a row of X are given to them by reverse water-filling of their running variances, and
each direction is coded by ops/gaussian_code.py: tokens mixed by a random rotation, a uniform
quantiser, a scale that takes the bias away.

More than `group` features are cut into G groups with directions of their own: Z then costs 2 B N K
/ G FLOPs, a G-th of the state, and the error is that of less concentrated variances. Without that
the projection of an input much wider than the output would cost more than the exact dW (the second
product of an MLP: 4 K / N of it).

What is exact: Y, dX, the part of dW that belongs to the mean. What is noisy, without bias (up to
what the rotation leaves of it): the directions that get bits. What is missing: directions that get
none, and those not tracked. `left_out` says how much worse than noise of the same size that is,
since an error that is there in every step does not average out; it decides how many directions
share the bits.

Error of Z^ in direction i of variance v_i: v_i D_b / (1 - D_b). Relative to the bound for a
Gaussian X with these variances (reverse water-filling, `rate_distortion_bound`) it grows with the
bits: measured on the layers of a trained GPT with all directions, all kept bytes counted
(results/rate_distortion), medians of

    bits a number       0.66    1.33    2.0    2.7    4.0    5.3
    error / bound       2.4     2.5     2.8    3.2    4.0    5.8

ops/gaussian_code.py says why not nearer. With fewer directions, what they leave out decides once
bits are many. Bits beyond 8 a direction are not used: a budget of more than 8 K bits a row is not
spent.

Kept: bits N bit planes of B bits (B filled up to a multiple of 64, above 4,096 a little more), a
float32 scale per direction and 4,096 tokens, the mean (N), an 8-byte key. State: N K / G + K + 1
numbers (ops/principal_directions.py) and the allocation, 8 bytes a plane, between steps. FLOPs: 2 B
N K / G + 256 B K forward, 2 M K (B + N / G) + 256 B min(K, M) backward and about twenty elementwise
passes over B K numbers, instead of 2 B N M. On CUDA the passes are one kernel to code and one to
restore, and dY is not rotated, so 256 B K backward. A look every `every` steps costs 6 B N K / G
and G QR decompositions of (N / G) x (K / G).

Source: transform coding is textbook (Cover and Thomas, 10.3; Goyal, IEEE SPM 2001); its use for dW,
with tracked directions and unbiased coding, is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops import gaussian_code, kernels, principal_directions, rotation
from basis.ops.matrix import in_eager_mode

DIRECTIONS_PER_BIT = 0.45
"""Directions followed, as a share of all, for a bit a number: about as many as trained models give
any bits (results/arena).
"""


@dataclass(frozen=True)
class Transform(Estimator):
    """X in a few bits a number, in the directions that matter.

    bits: per number of X, all directions together; positive, at most 8. directions: K as a share of
    N, in (0, 1], rounded in each group, to 1 at least; None: as many as can use the bits,
    DIRECTIONS_PER_BIT * bits or all. every: steps between looks at where X lies. left_out: error of
    a direction without bits, relative to its variance, as the allocation counts it; at least 1.
    group: features that share directions at most; at least 1.

    Raises ValueError that begins with the name of the wrong option.
    """

    knob: ClassVar[str] = "bits"

    bits: float
    directions: float | None = None
    every: int = 25
    left_out: float = 2.0
    group: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.bits <= gaussian_code.MOST_BITS:
            raise ValueError(f"bits={self.bits}: must be in (0, {gaussian_code.MOST_BITS}]")
        if self.directions is not None and not 0.0 < self.directions <= 1.0:
            raise ValueError(
                f"directions={self.directions}: must be in (0, 1], or null for as many as can use "
                "the bits"
            )
        if self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1")
        if not self.left_out >= 1.0:
            raise ValueError(f"left_out={self.left_out}: must be at least 1")
        if self.group < 1:
            raise ValueError(f"group={self.group}: must be at least 1")

    def knob_values(self, rows: int, width: int) -> Sequence[float]:
        tracked = width if self.directions is None else min(self.tracked(width), width)
        most = gaussian_code.MOST_BITS * tracked
        return [planes / width for planes in range(1, most + 1)]

    def tracked(self, width: int) -> int:
        """K, at least 1 in each group."""
        groups = self.groups(width)
        share = (
            min(DIRECTIONS_PER_BIT * self.bits, 1.0) if self.directions is None else self.directions
        )
        return groups * max(round(share * -(-width // groups)), 1)

    def groups(self, width: int) -> int:
        """G, the least number of groups that `width` features need."""
        return -(-width // self.group)

    def _frames(self, directions: Tensor, width: int) -> Tensor:
        """The directions (N, K / G) of each group as rows, (G, k, n)."""
        return directions.unflatten(0, (self.groups(width), -1)).mT

    def planes(self, width: int) -> int:
        """Bits a row of X, the mean aside."""
        return min(max(round(self.bits * width), 1), gaussian_code.MOST_BITS * self.tracked(width))

    def initial_state(self, width: int, device: torch.device) -> dict[str, Tensor]:
        groups = self.groups(width)
        state = principal_directions.initial_directions(
            width, self.tracked(width) // groups, device, groups
        )
        return state | {"planes": self._allocate(state["variances"], width)}

    def _allocate(self, variances: Tensor, width: int) -> Tensor:
        return gaussian_code.allocate(variances, self.planes(width), self.left_out)

    def learns_at(self, step: int) -> bool:
        return principal_directions.due(step, self.every)

    def learn(self, state: State, x: Tensor, key: Tensor) -> State:
        followed = principal_directions.follow(state, x, self.groups(x.shape[-1]))
        return followed | {"planes": self._allocate(followed["variances"], x.shape[-1])}

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        directions, planes, groups = state["directions"], state["planes"], self.groups(x.shape[1])
        mean = x.mean(0, dtype=torch.float32)
        along = self._frames(directions, x.shape[1])
        z = along.to(x.dtype) @ principal_directions.grouped(x, groups).mT  # (G, k, n) (G, n, B)
        with torch.autocast(x.device.type, enabled=False):
            shift = along @ principal_directions.grouped(mean[None], groups).mT
            packed, scale = gaussian_code.compress(z.flatten(0, 1), shift.flatten(), key, planes)
        return packed, scale, mean, key, directions, planes

    def coordinates(
        self, kept: tuple[Tensor, ...], rows: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Z^ (K, B)."""
        packed, scale, _, key, _, planes = kept
        with torch.autocast(scale.device.type, enabled=False):
            return gaussian_code.restore(packed, scale, key, planes, rows, dtype)

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        packed, scale, mean, key, directions, planes = kept
        dtype = grad_y.dtype
        if grad_y.shape[1] < len(scale) and not kernels.usable(grad_y):
            # Products over tokens survive a rotation of both: dY is the narrower one. A kernel
            # that restores costs less than rotating dY by operators.
            with torch.autocast(scale.device.type, enabled=False):
                coded, rotated = (
                    gaussian_code.decode(packed, scale, planes),
                    rotation.rotate(grad_y.t(), key),
                )
            along = coded.flatten(1).to(dtype) @ rotated.flatten(1).t().to(dtype)
        else:
            along = self.coordinates(kept, len(grad_y), dtype) @ grad_y  # (K, B) (B, M)
        frames = self._frames(directions, len(mean)).to(dtype)
        lifted = along.unflatten(0, (len(frames), -1)).mT @ frames  # (G, M, k) (G, k, n)
        lifted = lifted.transpose(0, 1).flatten(1)[:, : len(mean)]
        # For a compiler in float32: torch 2.13 compiles two sums of dY, this and the bias's, to C++
        # that is wrong in bfloat16. In eager mode on a CPU that is the same and takes ten times as
        # long.
        wide = None if in_eager_mode(grad_y) else torch.float32
        return torch.addr(lifted, grad_y.sum(0, dtype=wide).to(dtype), mean.to(dtype))

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        mean, directions = kept[2], kept[4]
        left = torch.cat([self.coordinates(kept, rows), mean.new_ones(1, rows)]).t()
        right = torch.block_diag(*self._frames(directions, len(mean)))[:, : len(mean)]
        return Factors(left, torch.cat([right, mean[None]]))


def rate_distortion_bound(variances: Tensor, bits: float) -> Tensor:
    """Least mean-square error, summed over directions, of a Gaussian with these variances at `bits`
    bits a row (0-dimensional).

    Reverse water-filling: sum_i min(theta, v_i), theta such that sum_i max(1/2 log2(v_i / theta),
    0) = bits. By sorting: with the n largest above the water, log2(theta) is their mean log2
    variance less 2 bits / n. (Cover and Thomas, Theorem 10.3.3.)
    """
    ordered = variances.double().sort(descending=True).values
    ordered = ordered[ordered > 0]
    counts = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    levels = torch.exp2((ordered.log2().cumsum(0) - 2.0 * bits) / counts)
    # The level belongs to the n for which the n-th variance lies above it and the next one does
    # not.
    count = int((ordered > levels).sum())
    if count == 0:
        return ordered.sum()
    return count * levels[count - 1] + ordered[count:].sum()
