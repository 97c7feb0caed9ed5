"""From configuration to model: weights from the seed, then the method put into the layers that it names."""

from __future__ import annotations

import dataclasses

import torch

import basis
from data.tokens import TokenFile
from harness import activations, attention
from harness.config import WHOLE_MODEL, Config, make_estimator, share_of
from models import GPT, GPTConfig


def fill_vocabulary(config: GPTConfig, tokens: TokenFile) -> GPTConfig:
    """`config` with the data's vocabulary where it names none. Raises ValueError if the model's is too small."""
    if config.vocab_size is None:
        return dataclasses.replace(config, vocab_size=tokens.vocab_size)
    tokens.check_vocabulary(config.vocab_size)
    return config


def check_method(config: Config) -> None:
    """Raise ValueError, before anything is allocated, if the method can't be put into the model (see `build_model`)."""
    with torch.device("meta"):
        apply_method(GPT(dataclasses.replace(config.model, vocab_size=1)), config)


def build_model(config: Config) -> tuple[GPT, list[str]]:
    """The model on the CPU, and the names of its sketched layers.

    Weights depend on the seed alone: two runs that differ only in the method start from the same point. Raises ValueError
    naming `method.include` or `method.exclude` if a pattern matches no layer.
    """
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    sketched = apply_method(model, config)
    activations.apply(model, config.activations)
    return model, sketched


def apply_method(model: GPT, config: Config) -> list[str]:
    """Put the configuration's method and attention into `model`; the names of the dense layers changed.

    Raises ValueError as `build_model`.
    """
    attention.apply(model, config.attention)
    method = config.method
    if method.name in WHOLE_MODEL:
        return []  # nn.Linear is exact already, and without backward nothing is kept
    try:
        estimator = make_estimator(method)
        if method.budget is None:
            return basis.convert(model, estimator, include=method.include, exclude=method.exclude)
        rows = config.micro_batch_size * config.model.block_size
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        chosen = basis.within_budget(estimator, share=share_of(method), rows=rows, dtype=dtype)
        return basis.convert(model, chosen, include=method.include, exclude=method.exclude)
    except ValueError as error:
        raise ValueError(f"method.{error}") from None
