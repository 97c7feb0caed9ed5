"""What a training step would take, without taking it: bytes on fake tensors, which have shapes and
no memory.

The step is the harness's own (memory_walk.py). What is alive is followed operator by operator;
counts and categories are those of memory.py. Transient memory inside kernels is not seen, nor what
an allocator loses to fragmentation, nor, on CUDA, the context and the workspaces of cuBLAS.
`device=cuda` may be planned anywhere; auto is the one that is here. What is planned is one process,
also of several.

A plan takes seconds for any size, because what is alike is gone through once or twice.

*Depth.* Models of 3 and 4 blocks are walked through (of a folder's, whose blocks may be of several
kinds in turn, of as many as their period asks for). Bytes alive at an operator are a straight line
in the depth, if operators are paired by their distance from the beginning or from the end of
forward and backward; so each pair is extended to the depth of the model, and the peak is the
largest. What stands between is no larger, since bytes change by the same amount from block to
block. To extend the two peaks instead would be wrong where a deep model's peak is at another
operator than a shallow one's.

*Rows of the loss head.* Of its blocks of rows (131,072 tokens of GPT-2 have 394 on a CPU) the
first two and the last are taken. A block writes its rows of dX and adds to dW where they already
exist, so those between need no more than the second did and leave nothing behind but, on a CPU, a
number or two each, of 4 bytes. An estimator that must see dY whole collects the blocks: all are
taken.

`largest` searches for the longest context or the largest micro-batch that fits. Bytes grow along a
convex curve of straight pieces in either, but for small steps, so a few sizes are enough; `peaks`
gives all of them from two long ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from basis import head_sizes
from bench.memory_walk import StepBytes, Walk, kind_of, walk
from harness.config import Config
from models import ModelConfig
from models.hf_config import kinds_of_blocks, shallower

FEW_BLOCKS = 4


def plan(config: Config) -> StepBytes:
    """The bytes of a step of `config`. Raises ValueError as training would, and for what only
    compilation decides.
    """
    return _deep_walk(config).plan()


def _deep_walk(config: Config, *, categories: bool = True) -> Walk:
    """`walk`, with deep models extended from two of few blocks."""
    depths = _depths(_kinds(config.model))
    if depths is None:
        return walk(config, categories=categories)
    few, more = (walk(with_size(config, n_layer=depth), categories=categories) for depth in depths)
    times = (config.model.n_layer - depths[0]) // (depths[1] - depths[0])
    return few.extended(more, times)


def _kinds(model: ModelConfig) -> list[Any]:
    """Of each block something that two have in common if they are alike."""
    if model.family != "hf":
        return [None] * model.n_layer
    return kinds_of_blocks(model)


def _depths(kinds: list[Any]) -> tuple[int, int] | None:
    """The two depths to walk through: blocks between them are all that follow, again and again.
    None: the model is not deeper than that.
    """
    depth = len(kinds)
    for more in range(FEW_BLOCKS, depth):
        for few in range(more - 1, FEW_BLOCKS - 2, -1):
            times, rest = divmod(depth - few, more - few)
            if rest == 0 and kinds[few:] == kinds[few:more] * times:
                return few, more
    return None


MANY_BLOCKS = 32


def peaks(config: Config, option: str, limit: int) -> Callable[[int], int]:
    """The peak as a function of `option` ("block_size" or "micro_batch_size") up to `limit`, in
    bytes.

    Where the loss head has more than `MANY_BLOCKS` blocks of rows, their size hardly changes any
    more, so that bytes at each operator are a straight line between there and the limit: two sizes
    are walked through, and all others lie on the lines (within 0.5%). Smaller sizes, and models
    that do not have the same operators at both, are planned one by one.
    """
    assert config.model.vocab_size is not None, "plan a resolved configuration"
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    with head_sizes.blocks_of(kind_of(config)):
        rows_per_block = head_sizes.most_rows(config.model.vocab_size, dtype, torch.device("cpu"))
    rows_per_unit = config.micro_batch_size if option == "block_size" else config.model.block_size
    first = -(-MANY_BLOCKS * rows_per_block // rows_per_unit)

    @functools.cache
    def at(size: int) -> Walk:
        return _deep_walk(with_size(config, **{option: size}), categories=False)

    def peak(size: int) -> int:
        if first < size < limit and at(first).operators == at(limit).operators:
            return at(first).extended(at(limit), (size - first) / (limit - first)).plan().peak
        return at(size).plan().peak

    return peak


def largest(peak: Callable[[int], int], budget: float, unit: int, limit: int) -> int:
    """The largest multiple of `unit` up to `limit` whose `peak` bytes are at most `budget`; 0 if
    one unit's are more.

    peak: not falling. Secant steps between the largest size known to fit and the smallest known not
    to: of a convex curve they fall short a little less each time, and arrive at once on its last
    straight piece.
    """
    low, high = 1, limit // unit
    low_bytes = peak(unit)
    if low_bytes > budget:
        return 0
    high_bytes = peak(high * unit)
    if high_bytes <= budget:
        return high * unit
    while high - low > 1:
        ahead = int((budget - low_bytes) * (high - low) / (high_bytes - low_bytes))
        guess = min(max(low + ahead, low + 1), high - 1)
        found = peak(guess * unit)
        if found <= budget:
            low, low_bytes = guess, found
        else:
            high, high_bytes = guess, found
    return low * unit


def with_size(
    config: Config,
    *,
    block_size: int | None = None,
    micro_batch_size: int | None = None,
    n_layer: int | None = None,
) -> Config:
    """`config` for another context, micro-batch or depth; where a step has several micro-batches,
    it keeps two.
    """
    model = config.model
    if n_layer is not None:
        of_folder = model.family == "hf"
        model = (
            shallower(model, n_layer) if of_folder else dataclasses.replace(model, n_layer=n_layer)
        )
    model = dataclasses.replace(model, block_size=block_size or model.block_size)
    windows = micro_batch_size or config.micro_batch_size
    return dataclasses.replace(
        config,
        model=model,
        micro_batch_size=windows,
        tokens_per_step=2 * windows * model.block_size * config.world_size
        if config.micro_batches > 1
        else None,
    )
