"""From configuration to text and model: weights from the seed, then the method put into the layers
that it names.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

import basis
from basis.diagnostics.adaptive_rank import AdaptiveRank
from basis.diagnostics.budget import split_by_error, with_knob, within_budget
from basis.estimator import Estimator
from basis.linear import SketchedLinear
from data import Sampler
from data.prepare import Prepared, prepare
from data.tokens import TokenFile
from harness import activations, attention, rank_control
from harness.config import Config
from harness.method import WHOLE_MODEL, make_estimator, share_of
from models import GPT, GPTConfig

LOOKS, MEASURED = 10, 4
"""Batches that a method learns from, and batches that are measured, where a budget is divided by
the error of dW.
"""


def fill_vocabulary(config: GPTConfig, tokens: TokenFile) -> GPTConfig:
    """`config` with the data's vocabulary where it names none. Raises ValueError if the model's is
    too small.
    """
    if config.vocab_size is None:
        return dataclasses.replace(config, vocab_size=tokens.vocab_size)
    tokens.check_vocabulary(config.vocab_size)
    return config


def training_text(config: Config, *, progress: bool) -> tuple[Prepared, Sampler]:
    """The text of `config`, prepared, and the batches of its training. Fills in the model's
    vocabulary where it is open.
    """
    prepared = prepare(config.data, progress=progress)
    config.model = fill_vocabulary(config.model, prepared.train)
    sampler = Sampler(
        prepared.train,
        block_size=config.model.block_size,
        batch_size=config.micro_batch_size,
        order=config.data.order,
        seed=config.seed,
        micro_batches=config.micro_batches,
    )
    return prepared, sampler


def check_method(config: Config) -> None:
    """Raise ValueError, before anything is allocated, if the method can't be put into the model
    (see `build_model`).
    """
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config.model, vocab_size=1))
        apply_method(model, config)
    rank_controller(model, config)


def build_model(config: Config) -> tuple[GPT, list[str]]:
    """The model on the CPU, and the names of its sketched layers.

    Weights depend on the seed alone: two runs that differ only in the method start from the same
    point. Raises ValueError naming `method.include` or `method.exclude` if a pattern matches no
    layer.
    """
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    sketched = apply_method(model, config)
    activations.apply(model, config.activations)
    return model, sketched


def apply_method(model: GPT, config: Config) -> list[str]:
    """Put the configuration's method and attention into `model`; the names of the dense layers
    changed.

    Raises ValueError as `build_model`.
    """
    attention.apply(model, config.attention)
    method = config.method
    if method.name in WHOLE_MODEL:
        return []  # nn.Linear is exact already, and without backward nothing is kept
    try:
        estimator = make_estimator(method)
        _check_followed(estimator, config)
        if method.budget is None:
            return basis.convert(model, estimator, include=method.include, exclude=method.exclude)
        chosen = within_budget(estimator, share=share_of(method), **layer_inputs(config))
        return basis.convert(model, chosen, include=method.include, exclude=method.exclude)
    except ValueError as error:
        said = str(error)
        if method.budget is not None:
            said = said.replace(
                f"budget={share_of(method):g}:", f"budget={method.budget}:"
            )  # as it was given, 1/24
        raise ValueError(f"method.{said}") from None


def _check_followed(estimator: Estimator, config: Config) -> None:
    """Raise ValueError for an option that must be as large as a batch and isn't."""
    rows = layer_inputs(config)["rows"]
    for option in dataclasses.fields(cast(Any, estimator)):
        source = option.metadata.get("follows")
        value = getattr(estimator, option.name)
        if source is not None and value < rows:
            raise ValueError(f"{option.name}={value}: must be at least {source} = {rows}")


def layer_inputs(config: Config) -> dict[str, Any]:
    """Rows and precision of every layer's input."""
    rows = config.micro_batch_size * config.model.block_size
    return {
        "rows": rows,
        "dtype": torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
    }


def rank_controller(model: GPT, config: Config) -> AdaptiveRank | None:
    """What sets the rank of `model`'s sketched layers from step to step, if anything does.

    Raises ValueError naming the option if rank and limits don't fit the layers.
    """
    if not config.adaptive_rank.every:
        return None
    return rank_control.start(
        config.adaptive_rank, model, make_estimator(config.method), **layer_inputs(config)
    )


def measure_knobs(model: GPT, config: Config, loss: Callable[[int], Tensor]) -> dict[str, Any]:
    """The budget divided by the error that dW has in each layer of the untrained `model`, see
    basis.diagnostics.budget.split_by_error.

    A fused head keeps no input and has no part in it. loss: of the training batch of a step, with
    graph and under the step's noise. Methods that learn see LOOKS batches first; what they have
    learned is in `model` afterwards, which `apply_knobs` undoes.
    """
    for step in range(LOOKS):
        loss(step)
    squares: dict[str, list[float]] = {}
    for step in range(MEASURED):
        for name, quality in basis.gradient_quality(model, functools.partial(loss, step)).items():
            squares.setdefault(name, []).append(quality.relative_error**2)
    layers = {
        name: layer for name, layer in basis.sketched_layers(model) if layer is not model.head
    }
    errors = {
        name: (layer.in_features, statistics.fmean(squares[name])) for name, layer in layers.items()
    }
    return split_by_error(
        make_estimator(config.method), errors, share=share_of(config.method), **layer_inputs(config)
    )


def apply_knobs(model: GPT, config: Config, knobs: Mapping[str, Any]) -> None:
    """Give each layer of `knobs` its own setting; whatever sketched layers had learned is
    forgotten.
    """

    def choose(name: str, layer: nn.Linear) -> Estimator:
        assert isinstance(layer, SketchedLinear)  # `apply_method` was there before
        return with_knob(layer.estimator, knobs[name]) if name in knobs else layer.estimator

    basis.convert(model, choose, include=config.method.include, exclude=config.method.exclude)
