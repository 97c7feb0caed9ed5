"""The dense layer with an exact forward, an exact dX and an estimated dW.

One autograd Function serves all estimators. What autograd keeps between forward and backward is W
(a parameter, there anyway) and the tensors that the estimator's `compress` returns; X is released
as soon as nobody else holds it. Gradients that nobody asked for are neither prepared nor computed:
without grad mode, or with a frozen weight, the layer is F.linear.

Layers that read the same tensor keep one sketch of it (shared_input.py). A sketch that would take
as many bytes as X, or more, is not kept: X is, and dW is exact.

Under autocast the input is cast first and sketched in the low precision, so what is kept is small
too; the weight is kept as the parameter itself and cast again in backward, so no copy of it is
kept.

Second derivatives are refused, since X is not kept (first_order.py). So is forward mode
(torch.func.jvp): it has no backward, hence no dW to estimate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.estimator import Estimator, State, kept_of
from basis.exchange import StandIn
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.layers.spread import mesh_of, spread_product
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import cast_for_autocast, has_values, in_eager_mode, without_autocast
from basis.ops.noise import draw_key
from basis.ops.shared_noise import Passes, SharedNoise
from basis.shared_input import Reading, can_share, find, is_kept_anyway, note
from basis.state import Learning, learned_from_scratch, pack_state, unpack_state

WANTED = "an Estimator, such as basis.BalancedSketch(rank=32)"


class _SketchedLinearFunction(torch.autograd.Function):
    """Y = X W^T + b; backward: dX = dY W, dW by the estimator, db = column sums of dY."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        key: Tensor,
        estimator: Estimator,
        reading: Reading | None,
        *state: Any,  # as pack_state gives it
    ) -> Tensor:
        output = F.linear(input, weight, bias)  # (..., N) (M, N) -> (..., M)
        # Where the rows are flattened, F.linear returns a view, and autograd refuses to write into
        # a view that a Function returns: the next layer may be ReLU(inplace=True). Same storage, no
        # kernel.
        return output if input.ndim == 2 else torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, key, estimator, reading, *state = inputs
        refuse_nested_transforms()
        kept: tuple[Tensor, ...] | None = ()
        if ctx.needs_input_grad[1]:
            if reading is not None and reading.is_kept:
                kept = reading.kept
            else:
                rows = input.reshape(-1, input.shape[-1])
                with without_autocast(rows):
                    kept = kept_of(estimator, rows, key, unpack_state(*state))
                if reading is not None:
                    reading.is_kept, reading.kept = True, kept
        ctx.keeps_input = kept is None
        if kept is None:
            kept = (input,)
        ctx.inputs = len(inputs)
        ctx.estimator = estimator
        ctx.transformed = in_transform()
        ctx.save_for_backward(link(input), weight, *kept)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, *kept = ctx.saved_tensors
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])  # (B, M)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight.to(grad_output.dtype)  # (..., M) (M, N) -> (..., N)
        if ctx.needs_input_grad[1]:  # (M, N)
            if ctx.keeps_input:
                grad_weight = grad_rows.t() @ kept[0].reshape(-1, kept[0].shape[-1])
            else:
                grad_weight = ctx.estimator.weight_grad(tuple(kept), grad_rows)
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_input, grad_weight, grad_bias, *(None,) * (ctx.inputs - 3)


def wants_weight_grad(weight: Tensor) -> bool:
    """Whether a forward now will be asked for dW; if not, there is nothing to keep and no noise to
    draw.
    """
    return torch.is_grad_enabled() and weight.requires_grad


def sketched_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Tensor,
    estimator: Estimator,
    state: State | None = None,
    reading: Reading | None = None,
) -> Tensor:
    """`F.linear(input, weight, bias)` whose weight gradient is `estimator`'s.

    input (..., N), of which all leading dimensions count as B rows; weight (M, N); bias (M,) or
    None; key: int64 tensor on the input's device (ops/noise.py); state: what the layer has learned,
    None for a method that does not learn, or that shall learn from this input alone; reading: what
    the layers that read this input keep together (shared_input.py). Returns (..., M). An input
    without rows, or on the meta device, is F.linear's: dW is zero, or has no values. Raises
    ValueError for an input that is not floating point or has another last dimension than the
    weight.
    """
    if not input.is_floating_point():
        raise ValueError(f"sketched linear: input must be floating point, got {input.dtype}")
    if input.ndim == 0 or input.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"sketched linear: input {tuple(input.shape)} does not fit weight {tuple(weight.shape)}"
        )
    if not wants_weight_grad(weight) or not has_values(input):
        return F.linear(input, weight, bias)
    input = cast_for_autocast(input)
    if state is None:
        rows = input.detach().reshape(-1, input.shape[-1])
        state = learned_from_scratch(estimator, rows, key)
    return _SketchedLinearFunction.apply(
        input, weight, bias, key, estimator, reading, *pack_state(state)
    )


class Sketched(StandIn, HasNoiseKey, Learning):
    """Mixin of layers that keep what `estimator` makes of their input instead of the input: where
    their noise comes from, what they have learned, what they share.

    `weight` is the Parameter whose gradient is estimated, whatever its shape; `in_features` is the
    width of the input. For `noise_key` see noise_key.py.
    """

    passes: tuple[Passes, int]
    """Where no key is set: what this layer shares with others, and its place among them."""

    exact_if_kept: bool = False
    """Whether an input that is kept by the operation before is kept as it is (shared_input.py)."""

    reads_casts: bool = False
    """Whether two casts of one tensor are one input to share (shared_input.py)."""

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset(
            {"estimator", "passes", *(f"estimator_{name}" for name in self._state_names)}
        )

    def restart(self, estimator: Estimator, step: int = 0) -> None:
        """Go on with `estimator`, knowing nothing, as if `step` were the first one. All else that
        this object has stays, but its noise key.
        """
        for name in self._state_names:
            del self._buffers[f"estimator_{name}"]
        self.estimator, self.first_step, self.learning = estimator, step, None
        self.noise_key = None
        self.forget()

    def key_for(self, input: Tensor) -> Tensor:
        """The key of a forward now, on the input's device: `noise_key`, else a fresh one if this
        forward may be trained on.
        """
        if self.noise_key is not None:
            return self.noise_key.to(input.device)
        if self._draws():
            return draw_key(input.device)
        return torch.zeros((), dtype=torch.int64, device=input.device)

    def _draws(self) -> bool:
        """Whether a forward now takes noise from PyTorch's generator if no key is set.

        Not only in grad mode: a reentrant checkpoint runs its first forward without, and its
        recomputation must find that the generator has moved on, else all steps would share one key.
        """
        return (
            self.estimator.uses_noise
            and self.weight.requires_grad
            and (self.training or torch.is_grad_enabled())
        )

    def prepare(self, input: Tensor) -> tuple[Tensor, State]:
        """Key and state for a forward now on `input` (..., N), in the precision in which it will
        be sketched: what the layer has learned, after a look at the input if this is a step to
        learn at, and what it shares with other layers.
        """
        return self._prepare(input, self._in_pass(input))

    def _prepare(
        self, input: Tensor, in_pass: tuple[SharedNoise, int] | None
    ) -> tuple[Tensor, State]:
        wanted = wants_weight_grad(self.weight) and has_values(input)
        key = None
        drawn: State = {}
        if in_pass is not None and wanted and self.estimator.shares_noise:
            noise, place = in_pass
            rows = input.numel() // input.shape[-1]
            drawn = self.estimator.shared_noise(noise, place, rows, input)
            if drawn and self.noise_key is None:
                key = noise.key  # another one would not be looked at
        if key is None:
            key = self.key_for(input)
        return key, {**(self.learn(input, key) if wanted else self.state), **drawn}

    def _in_pass(self, input: Tensor) -> tuple[SharedNoise, int] | None:
        """What this layer shares with others in a forward that begins now, and its place among
        them; None where it shares nothing.
        """
        if self.noise_key is not None:
            return self._fixed_noise
        passes, place = self.passes
        trains = self.weight.requires_grad and (self.training or torch.is_grad_enabled())
        if passes.layers == 1 or not trains or not in_eager_mode(input):
            return None  # for one layer 8 bytes and a second draw are less than a kept hashing
        return passes.noise(place, input.device), place

    def product(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_pass: tuple[SharedNoise, int] | None = None,
    ) -> Tensor:
        """`sketched_linear` of this layer's noise and state; `weight` (M, N) may be computed from
        the layer's own. in_pass: `_in_pass`, where one forward has several products.
        """
        if mesh_of(weight) is not None:
            return spread_product(self, input, weight, bias)
        x = cast_for_autocast(input)
        in_pass = in_pass or self._in_pass(x)
        if not (wants_weight_grad(self.weight) and has_values(x)):
            self._prepare(x, in_pass)  # draws what a recomputation of this forward will draw
            return F.linear(x, weight, bias)
        noise = None if in_pass is None else in_pass[0]
        by_hand = self.noise_key is not None and noise is None
        reading = None if by_hand else find(input, x.dtype, self.estimator, noise, self.reads_casts)
        if reading is None:
            reading = Reading(self.estimator, *self._prepare(x, in_pass))
            if not by_hand:
                note(input, x.dtype, reading, noise, self.reads_casts)
        elif self._state_names:
            self.learn(x, reading.key)
        if self.exact_if_kept and x is input and can_share(x) and is_kept_anyway(x):
            reading = replace(reading, is_kept=True, kept=None)
        memo = reading if can_share(x) else None
        return sketched_linear(x, weight, bias, reading.key, self.estimator, reading.state, memo)
