"""How good is an estimate of dW? The exact one formed next to it, layer by layer, on a batch of
your choice.

    quality = basis.gradient_quality(model, lambda: loss_fn(model(x), y), masks=16)
    quality["blocks.0.mlp.fc"].cosine

One forward and backward in which every sketched layer keeps its whole input, so that backward can
form both

    T  = dY^T X              exact
    T^ = the layer's estimate     with the noise of a training step under the present noise key

and compare them (all norms Frobenius, over the weight):

    relative error |T^ - T| / |T|,    cosine <T^, T> / |T^||T|,    norm ratio |T^| / |T|

A single draw can't tell bias from bad luck. With `masks` = M at least 2, M more noises are drawn
for the same X and dY; with d_i = T^_i - T, their mean m and v = sum |d_i - m|^2 / (M - 1),

    variance = v / |T|^2,    bias = sqrt(max(|m|^2 - v / M, 0)) / |T|

(m holds a chance part whose expected square is v / M; it is taken off, else every unbiased method
would look biased.) The gradients of the other layers, dX and the loss are those of a training step:
sketching changes none of them in the same step. A method that learns looks at X as it would in that
step, and what it has learned is used for the estimates and then forgotten.

What is left as it was: parameters, their `.grad`, buffers' owners aside (BatchNorm counts a
forward), PyTorch's random state. Cost: one more step without optimiser, with 1 + M more estimates
per layer; X of all sketched layers and one dW at a time held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basis.checks import whole_number
from basis.convert import sketched_layers
from basis.estimator import Estimator, State, kept_of
from basis.ops.noise import fold
from basis.ops.shared_noise import SharedNoise
from basis.state import pack_state, unpack_state

TOTAL = "all"
"""The name under which `gradient_quality` reports all sketched layers as one long vector."""


@dataclass(frozen=True)
class Quality:
    """Of one layer: the sums from which everything follows. d = T^ - T; None and 0 where no masks
    were drawn.
    """

    exact_square: float  # |T|^2
    estimate_square: float  # |T^|^2
    product: float  # <T^, T>
    error_square: float  # |d|^2
    masks: int = 0
    mean_error_square: float | None = None  # |mean of d_i|^2
    error_squares: float | None = None  # sum of |d_i|^2

    def __add__(self, other: Quality) -> Quality:
        """Both layers' weights as one vector."""
        assert self.masks == other.masks
        pairs = (
            (self.mean_error_square, other.mean_error_square),
            (self.error_squares, other.error_squares),
        )
        sums = [None if a is None or b is None else a + b for a, b in pairs]
        return Quality(
            self.exact_square + other.exact_square,
            self.estimate_square + other.estimate_square,
            self.product + other.product,
            self.error_square + other.error_square,
            self.masks,
            *sums,
        )

    @property
    def relative_error(self) -> float:
        return _root_of_ratio(self.error_square, self.exact_square)

    @property
    def cosine(self) -> float:
        length = math.sqrt(self.exact_square * self.estimate_square)
        return self.product / length if length else math.nan

    @property
    def norm_ratio(self) -> float:
        return _root_of_ratio(self.estimate_square, self.exact_square)

    @property
    def variance(self) -> float | None:
        """E |T^ - E T^|^2 / |T|^2, estimated; None without masks."""
        spread = self._spread()
        return (
            None
            if spread is None
            else spread / self.exact_square
            if self.exact_square
            else math.nan
        )

    @property
    def bias(self) -> float | None:
        """|E T^ - T| / |T|, estimated; None without masks."""
        spread = self._spread()
        if spread is None or self.mean_error_square is None:
            return None
        return _root_of_ratio(self.mean_error_square - spread / self.masks, self.exact_square)

    def _spread(self) -> float | None:
        if self.error_squares is None or self.mean_error_square is None:
            return None
        return max(self.error_squares - self.masks * self.mean_error_square, 0.0) / (self.masks - 1)

    def metrics(self) -> dict[str, float]:
        """By name: relative_error, cosine, norm_ratio, and with masks bias and variance."""
        values = {
            name: getattr(self, name)
            for name in ("relative_error", "cosine", "norm_ratio", "bias", "variance")
        }
        return {name: value for name, value in values.items() if value is not None}


def _root_of_ratio(square: float, by: float) -> float:
    return math.sqrt(max(square, 0.0) / by) if by else math.nan


class _Recorder(Estimator):
    """Stands in for a layer's estimator during one forward and backward, and looks at both
    gradients.
    """

    at_most_input = False  # it keeps X and more

    def __init__(self, estimator: Estimator, name: str, masks: int) -> None:
        self.estimator, self.name, self.masks = estimator, name, masks
        self.uses_noise = estimator.uses_noise  # type: ignore[misc]  # of this object, as of the one it stands for
        self.quality: Quality | None = None
        self.uses: list[list[_Recorder]] = []  # of the layer in parts
        self.learned: State | None = None
        self.shares_noise = estimator.shares_noise  # type: ignore[misc]
        self.shared: State = {}

    def learns_at(self, step: int) -> bool:
        return self.estimator.learns_at(step)

    def for_parts(self, rows: Sequence[int], whole: int) -> list[Estimator]:
        made = [
            _Recorder(part, f"{self.name}, part {place}", self.masks)
            for place, part in enumerate(self.estimator.for_parts(rows, whole))
        ]
        for part in made:
            part.learned = self.learned
        self.uses.append(made)
        return [*made]

    def seen(self) -> Quality | None:
        """Of the whole layer: of its parts, where the layer has parts."""
        used = [[q for part in parts if (q := part.quality)] for parts in self.uses]
        if not any(used):
            return self.quality
        first, *others = (q for parts in used for q in parts)
        if sum(map(bool, used)) > 1:
            raise self._twice()
        return sum(others, first)

    def _twice(self) -> ValueError:
        return ValueError(
            f"gradient_quality: layer {self.name} is used twice in one forward, which is not "
            "supported"
        )

    def learn(self, state: State, x: Tensor, key: Tensor) -> State:
        self.learned = self.estimator.learn(state, x, key)
        return state

    def shared_noise(self, shared: SharedNoise, place: int, rows: int, like: Tensor) -> State:
        self.shared = self.estimator.shared_noise(shared, place, rows, like)
        return self.shared

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        # What was learned is still kept: a recomputed forward doesn't learn.
        state = {**state, **(self.learned or {})}
        self.state_names, *tensors = pack_state(state)
        return x, key, *tensors

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        if self.quality is not None:
            raise self._twice()
        x, key, *learned = kept
        state = unpack_state(self.state_names, *learned)
        learned_state = {name: state[name] for name in state if name not in self.shared}

        def estimate(with_key: Tensor) -> Tensor:
            # Noise that layers share belongs to the layer's own key.
            known = state if with_key is key else learned_state
            sketch = kept_of(self.estimator, x, with_key, known)
            if sketch is None:
                return grad_y.float().t() @ x.float()
            return self.estimator.weight_grad(sketch, grad_y).float()

        with torch.autocast(
            x.device.type, enabled=False
        ):  # a loss head asks for dW in forward, where autocast is on
            return self._compare(estimate, key, exact=grad_y.float().t() @ x.float())

    def _compare(self, estimate: Callable[[Tensor], Tensor], key: Tensor, exact: Tensor) -> Tensor:
        own = estimate(key)
        product = float(torch.sum(own * exact, dtype=torch.float64))
        sums = (_square(exact), _square(own), product, _square(own - exact))
        if self.masks == 0:
            self.quality = Quality(*sums)
            return own
        total, squares = torch.zeros_like(exact), 0.0
        seed = int(key.flatten()[0])  # the draws are as reproducible as the layer's own
        for mask in range(self.masks):
            fresh = torch.full(
                (), fold("mask", seed, self.name, mask), dtype=torch.int64, device=key.device
            )
            error = estimate(fresh) - exact
            total += error
            squares += _square(error)
        self.quality = Quality(*sums, self.masks, _square(total) / self.masks**2, squares)
        return own


def _square(x: Tensor) -> float:
    return float(torch.sum(x * x, dtype=torch.float64))


def gradient_quality(
    model: nn.Module, loss: Callable[[], Tensor], *, masks: int = 0
) -> dict[str, Quality]:
    """Compare estimated with exact weight gradients of every sketched layer of `model` on one
    batch.

    loss: runs `model` and returns a scalar with graph, not scaled (a head fused with its loss sees
    the loss before any scaling, other layers after it). masks: further noises per layer, 0 or at
    least 2. Returns one `Quality` per layer that took part, by name, and all of them together as
    "all"; an empty dict if no layer is sketched. A product of experts is one layer: the weights of
    its experts as one long vector. Raises ValueError for a wrong `masks`, and for a layer that is
    used twice in one forward; TypeError if `loss` is no function or returns no such scalar;
    RuntimeError where gradients are off.
    """
    if not callable(loss):
        raise TypeError(
            "gradient_quality: loss must be a function that computes the loss, such as lambda: "
            f"loss_fn(model(x), y); got a {type(loss).__name__}"
        )
    if whole_number("masks", masks) < 0 or masks == 1:
        raise ValueError(f"masks={masks}: must be 0, or at least 2 to tell bias from variance")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "gradient_quality: compares gradients, and they are off here (torch.no_grad or "
            "inference_mode)"
        )
    layers = dict(sketched_layers(model))
    if not layers:
        return {}
    learning = {name: layer.learning for name, layer in layers.items()}
    recorders = {name: _Recorder(layer.estimator, name, masks) for name, layer in layers.items()}
    devices = {
        layer.weight.device for layer in layers.values() if layer.weight.device.type == "cuda"
    }
    try:
        for name, layer in layers.items():
            layer.estimator = recorders[name]
        with torch.random.fork_rng(sorted(device.index for device in devices)):
            parameters = [p for p in model.parameters() if p.requires_grad]
            value = loss()
            if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                got = (
                    f"shape {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else f"a {type(value).__name__}"
                )
                raise TypeError(
                    f"gradient_quality: loss must return a scalar tensor with graph, got {got}"
                )
            torch.autograd.grad(value, parameters, allow_unused=True)
    finally:
        for name, layer in layers.items():
            layer.estimator, layer.learning = recorders[name].estimator, learning[name]
    seen = {name: recorder.seen() for name, recorder in recorders.items()}
    found = {name: quality for name, quality in seen.items() if quality is not None}
    if found:
        first, *others = found.values()
        found[TOTAL] = sum(others, first)
    return found
