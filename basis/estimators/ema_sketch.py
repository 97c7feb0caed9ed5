"""EMA activation sketch, after H. Antil and D. Verma (arXiv 2510.00442): reconstruction
reconstructed, not the authors'.

Of each layer's input X_t (B, N) of step t the three-sketch (ops/three_sketch.py) is taken, under
test matrices that stay the same for the whole training, and averaged over steps; what is averaged
lives in the layer, and X_t is not kept at all:

    S_0 = 0, S_t = beta S_(t-1) + (1 - beta) sketch(X_t)   corange (B, k), range (N, k), core (s, s)
    P, C, Q = reconstruction from S_t                      C divided by 1 - beta^t for S_0 = 0
    dW^ = (dY^T P) C^T Q^T                             without a B x N matrix

What was read of the paper: exponential averages of three sketches with fixed tests, beta in [0, 1),
and that gradients are formed from a reconstruction. Not read: its reconstruction, its sizes k and s
for a rank, its constants. Its sketches mix two neighbouring layers and one of them is one-sided, so
that the classical formula does not apply; here all three are of the layer's own input, with the
sizes and the formula of the control-theoretic original (ROL, Tropp et al. 2019). k = min(2 r + 1,
B, N), s = min(2 k + 1, B, N).

What is exact: Y, dX, the bias gradient. What is estimated: dW, with bias, for two reasons.
1. A projection: only k directions of the input are there. beta = 0 is this alone, a batch sketch.
   The error goes with r.
2. An average: the sketch is linear, so S_t is the sketch of the average input X- = (1 - beta) sum_i
   beta^i X_(t-i), and row b of it mixes the b-th rows of many batches, which have nothing to do
   with today's dY_b. Of a feature's mean over rows all is left; of its deviation from the mean only
   the (1 - beta) that belongs to X_t is today's, the rest is noise. Where samples are new in every
   step and features have zero mean, X- has a cosine of sqrt(1 - beta^2) to X_t; a dW that adds up
   over the rows is shrunk to about (1 - beta) of itself, one that does not to sqrt((1 - beta) / (1
   + beta)), mostly noise. SGD then takes that much smaller steps, Adam hides it. Where a mean
   dominates, nearly nothing is lost. Where row b is the same sample in every step (collocation
   points of a PINN, full batches), X- only lags behind.

The state has as many rows as X: `rows` is fixed. A batch of fewer rows counts as filled up with
rows of zero, under the first rows of the tests; one of more rows is refused. Forwards that don't
learn (further micro-batches of a step) are paired with the sketches of the first micro-batch's
rows: nothing but the mean helps them, so give one micro-batch a step. Where a forward may learn
each time (no `basis.set_noise_key`), so does each use of a layer within a step.

Kept until backward: nothing beyond the state. State, living between steps too: k (B + N) + s^2
float32 numbers and a counter; the tests are drawn again from `seed`. FLOPs: about 8 k B N to
sketch, against 2 B N M of the exact product, which becomes 2 k (B + N) M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.estimator import Estimator, Factors, State
from basis.ops import three_sketch
from basis.ops.three_sketch import Sketches, Tests


@dataclass(frozen=True)
class EMASketch(Estimator):
    """Average over steps of the three-sketch of X, of rank r.

    rank: r, at least 1. rows: B, the most rows that an input has; None until `for_inputs` sets it.
    beta: of the average, in [0, 1); 0 is a sketch of this step's X alone. seed: of the fixed test
    matrices, in [0, 2^56).

    Raises ValueError that begins with the name of the wrong option; when a layer is made, for
    `rows` of None; in a forward, for an input of more than `rows` rows.
    """

    uses_noise: ClassVar[bool] = False
    knob: ClassVar[str] = "rank"
    error_tells_rank: ClassVar[bool] = True
    state_replaces_input: ClassVar[bool] = True

    rank: int
    rows: int | None = None
    beta: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows={self.rows}: must be at least 1")
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta={self.beta}: must be in [0, 1)")
        if not 0 <= self.seed < 1 << 56:
            raise ValueError(f"seed={self.seed}: must be in [0, 2^56)")

    def for_inputs(self, rows: int) -> EMASketch:
        if self.rows is None:
            return replace(self, rows=rows)
        if self.rows < rows:
            raise ValueError(f"rows={self.rows}: must be at least {rows}, the rows of an input")
        return self

    def _most_rows(self) -> int:
        if self.rows is None:
            raise ValueError("rows=None: ema_sketch needs the most rows that an input has")
        return self.rows

    def knob_values(self, rows: int, width: int) -> Sequence[int]:
        return range(1, three_sketch.largest_rank(rows, width) + 1)

    def initial_state(self, width: int, device: torch.device) -> dict[str, Tensor]:
        rows = self._most_rows()
        k, s = three_sketch.sizes(self.rank, rows, width)
        shapes = ((rows, k), (width, k), (s, s))
        averages = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
        return dict(zip(Sketches._fields, averages, strict=True)) | {
            "steps": torch.zeros((), dtype=torch.int64, device=device)
        }

    def tests(self, width: int, device: torch.device) -> Tests:
        """The fixed test matrices of a layer of `width` = N in_features; layers of one width have
        the same.
        """
        seed = torch.full((), self.seed, dtype=torch.int64, device=device)
        return three_sketch.draw_tests(seed, self.rank, self._most_rows(), width)

    def learn(self, state: State, x: Tensor, key: Tensor) -> State:
        missing = self._most_rows() - x.shape[0]
        if missing < 0:
            raise ValueError(
                f"ema_sketch: an input of {x.shape[0]} rows, and rows={self.rows}; give as many as "
                "there are"
            )
        new = three_sketch.sketch(x, self.tests(x.shape[1], x.device))
        new = new._replace(corange=F.pad(new.corange, (0, 0, 0, missing)))
        averages = {
            name: torch.lerp(t.to(state[name].dtype), state[name], self.beta)
            for name, t in new._asdict().items()
        }
        return averages | {"steps": state["steps"] + 1}

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        return *state.values(), x.new_empty(0)  # the last one for its dtype

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors:
        *averages, steps, like = kept
        sketches = Sketches(*averages)
        left, core, right = three_sketch.reconstruct(
            sketches, self.tests(sketches.range.shape[0], like.device)
        )
        # 1 - beta^t without cancellation. Before the first look all sketches are 0, and so is dW.
        weight = -torch.expm1(
            steps.clamp(min=1) * (math.log(self.beta) if self.beta else -math.inf)
        )
        return Factors(left[:rows].to(like.dtype), core.t() @ right.t() / weight.to(core.dtype))

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        found = self.factors(kept, grad_y.shape[0])
        assert found.right is not None
        return (grad_y.t() @ found.left.to(grad_y.dtype)).to(
            found.right.dtype
        ) @ found.right  # (M, B) (B, k) (k, N)
