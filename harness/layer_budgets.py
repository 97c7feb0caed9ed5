"""method.allocation=variance: a budget of bytes divided among the layers by the error of their dW.

The layers of the untrained model start with equal shares. A few batches are run, the error of each
layer's dW is measured against the exact one, and `split_by_error` (basis/diagnostics/budget.py)
gives more bytes to the layers where they lower the summed error most (layers that read one tensor
count as one). The result is one value of
the method's knob (rank, rows, bits) per layer. It is measured once, before the first step; a
checkpoint holds it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import basis
from basis.diagnostics.budget import split_by_error, with_knob
from basis.diagnostics.kept import first_readers
from data import Sampler
from harness.build import layer_inputs
from harness.config import Config
from harness.device import Runtime
from models import LanguageModel

LEARNING_BATCHES = 10
"""Batches that methods which learn see before the error is measured."""
MEASURED_BATCHES = 4
"""Batches that the error is averaged over."""


def measure_knobs(
    model: LanguageModel, config: Config, sampler: Sampler, runtime: Runtime
) -> dict[str, Any]:
    """The knob of each sketched layer of the untrained `model`; PyTorch's random state is kept.

    A fused head keeps no input and has no part in it. Methods that learn have then learned from
    these batches, which `apply_knobs` undoes.
    """

    def loss(step: int) -> Tensor:
        basis.set_noise_key(model, seed=config.seed, step=step, micro_batch=0)
        return runtime.forward(model, *sampler.batch(step, 0))

    with torch.random.fork_rng():
        return _split(model, config, loss)


def _split(model: LanguageModel, config: Config, loss: Callable[[int], Tensor]) -> dict[str, Any]:
    for step in range(LEARNING_BATCHES):
        loss(step)
    squares: dict[str, list[float]] = {}
    for step in range(MEASURED_BATCHES):
        for name, quality in basis.gradient_quality(model, functools.partial(loss, step)).items():
            squares.setdefault(name, []).append(quality.relative_error**2)
    # Layers that read one tensor keep one sketch of it: one setting, whose bytes count once.
    leaders = first_readers(model, functools.partial(loss, 0), skip=[model.head])
    errors: dict[str, tuple[int, float]] = {}
    inputs, times = layer_inputs(config), {}
    for name, layer in basis.sketched_layers(model):
        if layer.weight is not model.head.weight:
            leader, rows = leaders[name]
            _, others = errors.get(leader, (0, 0.0))
            errors[leader] = layer.in_features, others + statistics.fmean(squares[name])
            times[leader] = rows / inputs["rows"]
    method = config.method
    assert method.budget is not None
    share = method.budget.share
    knobs = split_by_error(method.estimator, errors, share=share, times=times, **inputs)
    return {name: knobs[leader] for name, (leader, _) in leaders.items() if leader in knobs}


def apply_knobs(model: nn.Module, knobs: Mapping[str, Any]) -> None:
    """Set the knob of each layer in `knobs`; all sketched layers forget what they have learned."""

    for name, layer in basis.sketched_layers(model):
        known = layer.estimator
        layer.restart(with_knob(known, knobs[name]) if name in knobs else known)
