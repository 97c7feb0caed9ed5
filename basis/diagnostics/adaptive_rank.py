"""A rank that follows the error: up where the sketch of the inputs is too coarse, down where it
could be coarser.

    controller = AdaptiveRank(rank=4, low=0.05, high=0.2)
    every so many steps, on inputs that are not trained on:
        if controller.observe(reconstruction_error(model, lambda: model(x))) != old_rank:
            set_rank(model, controller.rank)

The rule mirrors ROL's for reduced dynamic objectives (ROL_ReducedDynamicObjective.hpp), which H.
Antil and D. Verma (arXiv 2510.00442) build on; theirs was not read. The error is that of the
activations as they are reconstructed, |X^ - X| / |X| over all sketched layers together; ROL raises
the rank by 2 until it is met. Here it also falls by 1 once the error was below `low` three times
running.

It is for methods whose `error_tells_rank`. An unbiased sketch of rows errs by about sqrt(B / R)
whatever X is: nothing to follow.

The error is taken of a sketch of the one batch, without any average over steps: what averaging
loses is not mended by any rank, and a rule that saw it would run to the largest one. With a new
rank the sketches have new sizes and new tests, so averages start again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from basis.checks import check_types
from basis.convert import sketched_layers
from basis.diagnostics.budget import with_knob
from basis.ops.matrix import has_values
from basis.ops.noise import fold
from basis.sketched import Sketched
from basis.state import learned_from_scratch


@dataclass
class AdaptiveRank:
    """The controller: `rank` now, and after each `observe`.

    low, high: tolerances of the relative error, 0 <= low < high. minimum, maximum: bounds of the
    rank. up, down: steps. patience: checks below `low` in a row before a step down. Raises
    ValueError that begins with the name of the wrong option.
    """

    rank: int
    low: float
    high: float
    minimum: int = 1
    maximum: int = 100
    up: int = 2
    down: int = 1
    patience: int = 3
    below: int = field(
        default=0, init=False
    )  # checks below `low` since the last one that was not, or step down

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.minimum <= self.rank <= self.maximum:
            raise ValueError(
                f"rank={self.rank}: must be in [minimum, maximum] = [{self.minimum}, "
                f"{self.maximum}], from 1 on"
            )
        if not 0.0 <= self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: must be 0 <= low < high")
        for name in ("up", "down", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    def observe(self, error: float) -> int:
        """The rank to go on with after a relative error; NaN changes nothing."""
        if math.isnan(error):
            return self.rank
        self.below = self.below + 1 if error < self.low else 0
        if error > self.high:
            self.rank = min(self.rank + self.up, self.maximum)
        elif self.below == self.patience:
            self.below = 0
            self.rank = max(self.rank - self.down, self.minimum)
        return self.rank

    def state_dict(self) -> dict[str, int]:
        """What lives between checks."""
        return {"rank": self.rank, "below": self.below}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state_dict()` of a controller with the same options; `set_rank` is the
        caller's.
        """
        self.rank, self.below = state["rank"], state["below"]


def set_rank(model: nn.Module, rank: int, step: int = 0) -> None:
    """Give every sketched layer of `model` that rank. Parameters stay; what the layers have learned
    is forgotten.

    step: the step that comes next. A method that learns at some steps only, the first ones among
    them, counts from this one. Noise keys are gone with the old rank: call `set_noise_key` next.
    """
    for _, layer in sketched_layers(model):
        layer.restart(with_knob(layer.estimator, rank), step)


@torch.no_grad()
def reconstruction_error(model: nn.Module, forward: Callable[[], object], seed: int = 0) -> float:
    """|X^ - X| / |X| (Frobenius norms) of the inputs of all sketched layers together, in a call of
    `forward`, which runs `model`.

    X^ is what the layer's method would give for dY = I if X were all it had ever seen. NaN where
    all inputs are zero or empty. Nothing is learned and nothing kept. Inputs are what they are in
    `forward`, under autocast too; the rest is in float32.
    """
    squares = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Sketched)
        if not has_values(inputs[0]):
            return
        x = inputs[0].flatten(0, -2).float()
        key = torch.full((), fold("reconstruction", seed), dtype=torch.int64, device=x.device)
        identity = torch.eye(x.shape[0], device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            state = learned_from_scratch(layer.estimator, x, key)
            kept = layer.estimator.compress(x, key, state)
            estimate = layer.estimator.weight_grad(kept, identity)
        squares.append(torch.stack([(estimate - x).square().sum(), x.square().sum()]))

    handles = [layer.register_forward_pre_hook(measure) for _, layer in sketched_layers(model)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    error, whole = torch.stack(squares).sum(0).tolist() if squares else (0.0, 0.0)
    return math.sqrt(error / whole) if whole else math.nan
