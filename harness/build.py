"""From a configuration to the text it trains on and the model it trains.

`training_text` prepares the text. `build_model` draws the weights from the seed and puts the method
into the layers that it names, then the activations. `check_method` does the same on a model without
memory, so that options which do not fit the model are refused before anything is allocated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import basis
from basis.diagnostics.adaptive_rank import AdaptiveRank
from basis.diagnostics.budget import BudgetError, within_budget
from data import Sampler
from data.prepare import Prepared, prepare
from harness import activations, attention, rank_control
from harness.config import Config
from harness.method import WHOLE_MODEL
from harness.world import here
from models import LanguageModel, build


def training_text(
    config: Config, *, progress: bool, known: str | None = None
) -> tuple[Config, Prepared, Sampler]:
    """The configuration with the vocabulary of its text, the text, and the batches of its training.

    known: see `data.prepare.prepare`. Raises ValueError if the text can't be
    had, or has ids that the model's vocabulary lacks.
    """
    prepared = prepare(config.data, progress=progress, known=known)
    config = config.resolved(prepared.train.vocab_size)
    assert config.model.vocab_size is not None
    prepared.train.check_vocabulary(config.model.vocab_size)
    sampler = Sampler(
        prepared.train,
        block_size=config.model.block_size,
        batch_size=config.micro_batch_size,
        order=config.data.order,
        seed=config.seed,
        micro_batches=config.micro_batches,
        rank=here().rank,
        world_size=config.world_size,
    )
    return config, prepared, sampler


def check_method(config: Config) -> None:
    """Raise ValueError, before anything is allocated, if the method can't be put into the model
    (see `build_model`).
    """
    with torch.device("meta"):
        of_folder = config.model.family == "hf"  # whose vocabulary is known, and has a say
        model = build(
            config.model if of_folder else dataclasses.replace(config.model, vocab_size=1)
        )
        apply_method(model, config)
    rank_controller(model, config)


def build_model(config: Config) -> tuple[LanguageModel, list[str]]:
    """The model on the CPU, and the names of its sketched layers.

    Weights depend on the seed alone: two runs that differ only in the method start from the same
    point. Raises ValueError naming `method.include` or `method.exclude` if a pattern matches no
    layer.
    """
    torch.manual_seed(config.seed)
    model = build(config.model)
    sketched = apply_method(model, config)
    activations.apply(model, config.activations)
    return model, sketched


def apply_method(model: LanguageModel, config: Config) -> list[str]:
    """Put the configuration's method and attention into `model`; returns the names of the dense
    layers that it sketches.

    Raises ValueError as `build_model`, and BudgetError if no setting of the method keeps to the
    budget.
    """
    attention.apply(model, config.attention)
    method = config.method
    if method.name in WHOLE_MODEL:
        return []  # nn.Linear is exact already, and without backward nothing is kept
    try:
        if method.budget is None:
            chosen: Any = method.estimator
        else:
            share = method.budget.share
            chosen = within_budget(method.estimator, share=share, **layer_inputs(config))
        # Every layer is sketched, as in the paper, also one whose input attention keeps anyway.
        include, exclude = (
            [model.pattern(p) for p in ps] for ps in (method.include, method.exclude)
        )
        return basis.convert(model, chosen, include=include, exclude=exclude, exact_if_kept=False)
    except BudgetError as error:
        assert method.budget is not None
        raise BudgetError(method.budget.text, error.reason, option="method.budget") from None
    except ValueError as error:
        raise ValueError(f"method.{error}") from None


def layer_inputs(config: Config) -> dict[str, Any]:
    """Rows and precision of every layer's input."""
    rows = config.micro_batch_size * config.model.block_size
    return {
        "rows": rows,
        "dtype": torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
    }


def rank_controller(model: LanguageModel, config: Config) -> AdaptiveRank | None:
    """What sets the rank of `model`'s sketched layers from step to step, if anything does.

    Raises ValueError naming the option if rank and limits don't fit the layers.
    """
    if not config.adaptive_rank.every:
        return None
    return rank_control.start(
        config.adaptive_rank, model, config.method.estimator, **layer_inputs(config)
    )
