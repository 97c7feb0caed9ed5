"""What a training step would take, without taking it: bytes on fake tensors, which have shapes and
no memory.

The step is the harness's own: the model of the configuration with its method and activations,
forward, loss head, backward, and the optimiser's state. What is alive is followed operator by
operator; counts and categories are those of memory.py. Transient memory inside kernels is not seen,
nor what an allocator loses to fragmentation, nor, on CUDA, the context and the workspaces of
cuBLAS. Attention is the CPU's flash kernel, whose bytes are those of CUDA's. The loss head takes
its rows as on the configuration's device (`device=cuda` may be planned anywhere; auto is the one
that is here).

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

*Several processes.* With parallel=fsdp the model is divided as in training, among `world_size`
processes of which only this one exists: PyTorch's fake group takes part in their stead. What is
planned is one process.

`largest` searches for the longest context or the largest micro-batch that fits. Bytes grow along a
convex curve of straight pieces in either, but for small steps, so a few sizes are enough; `peaks`
gives all of them from two long ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

import basis
from basis import head_sizes
from basis.ops import shapes
from harness import activations, memory
from harness.build import apply_method
from harness.config import Config
from harness.device import Runtime
from harness.optim import make_optimizer
from harness.parallel import Parallel, every_process
from models import LanguageModel, ModelConfig, build
from models.hf_config import kinds_of_blocks, shallower


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one step. kept: by category, between forward and backward of a micro-batch. peak: of
    everything at once.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def beyond(self) -> int:
        """Peak without parameters, gradients and optimiser state: activations and temporaries."""
        return self.peak - self.parameters - self.gradients - self.optimizer


def make_model(config: Config, device: str = "cpu") -> LanguageModel:
    """The configuration's model with its method and activations, uninitialised on `device`; inside
    a FakeTensorMode, fake.
    """
    with torch.device("meta"):
        model = build(config.model)
        apply_method(model, config)
        activations.apply(model, config.activations)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = made.setdefault(
                    id(old), nn.Parameter(torch.empty_like(old, device=device))
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    return model


FEW_BLOCKS = 4


def _kind(config: Config) -> str:
    """The kind of device that the configuration's step would run on."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    return here if config.device == "auto" else config.device


def plan(config: Config) -> StepBytes:
    """The bytes of a step of `config`. Raises ValueError as training would, and for what only
    compilation decides.
    """
    return _deep_walk(config).plan()


Series = list[tuple[Any, int]]  # operators, and the bytes alive after each


@dataclass(frozen=True)
class _Walk:
    """What a step on fake tensors did, one operator after the other.

    passes: for each micro-batch in order, the operators that draw its noise keys, those of its
    forward and those of its backward, each with the bytes alive after it.
    """

    parameters: int
    optimizer: int
    passes: list[Series]
    kept: dict[str, int]

    @property
    def operators(self) -> list[Any]:
        return [operator for series in self.passes for operator, _ in series]

    def plan(self) -> StepBytes:
        peak = max(now for series in self.passes for _, now in series) + self.optimizer
        return StepBytes(self.parameters, self.parameters, self.optimizer, peak, self.kept)

    def extended(self, other: _Walk, times: float) -> _Walk:
        """This walk and `times` times what `other`, of one block more or of another size, has more:
        see the module.
        """

        def extend(a: int, b: int) -> int:
            return a + round(times * (b - a))

        passes = []
        for few, more in zip(self.passes, other.passes, strict=True):
            cut = _cut([operator for operator, _ in few], [operator for operator, _ in more])
            pairs = [
                *zip(few[:cut], more, strict=False),
                *zip(few[cut:], more[cut - len(few) :], strict=True),
            ]
            passes.append([(operator, extend(a, b)) for (operator, a), (_, b) in pairs])
        kept = {name: extend(size, other.kept[name]) for name, size in self.kept.items()}
        return _Walk(
            extend(self.parameters, other.parameters),
            extend(self.optimizer, other.optimizer),
            passes,
            kept,
        )


def _cut(few: list[Any], more: list[Any]) -> int:
    """Where to cut `few`, so that `more` begins with its first part and ends with its second: amid
    all such places.
    """
    same_start = sum(
        1
        for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], zip(few, more, strict=False))
    )
    backwards = zip(reversed(few), reversed(more), strict=False)
    same_end = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], backwards))
    assert same_start + same_end >= len(few), "models of different depth differ in more than blocks"
    return (same_start + len(few) - same_end) // 2


def _deep_walk(config: Config, *, categories: bool = True) -> _Walk:
    """`_walk`, with deep models extended from two of few blocks."""
    depths = _depths(_kinds(config.model))
    if depths is None:
        return _walk(config, categories=categories)
    few, more = (_walk(with_size(config, n_layer=depth), categories=categories) for depth in depths)
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


def _walk(config: Config, *, categories: bool = True, every_block: bool = False) -> _Walk:
    """Go through a step of `config`. every_block: of the loss head's rows too."""
    if config.compile or config.activations.name == "budget":
        raise ValueError(
            "compile=true: what a compiled step keeps is known only by compiling it; plan without"
        )
    if config.method.zeroth_order is not None:
        raise ValueError(
            f"method.name={config.method.name}: it has no backward, and keeps nothing for one"
        )
    low = config.precision == "bfloat16"
    blocks = nullcontext() if every_block else head_sizes.skipping_blocks()
    with (
        _others(config) as mesh,
        head_sizes.blocks_of(_kind(config)),
        shapes.alone(),
        _grouped_products(),
        blocks,
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model = make_model(config)
        runtime = Runtime(torch.device("cpu"), config.precision, compile=False)
        # ddp's processes hold what a single one does: gradients lie in its buckets.
        kind = "none" if mesh is None else config.parallel
        parallel = Parallel(kind, model, runtime, config.activations, mesh)
        optimizer = make_optimizer(model, config.optim)
        tokens = torch.zeros(config.micro_batch_size, config.model.block_size, dtype=torch.int64)

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
                return model(tokens, tokens)

        basis.set_noise_key(model, seed=0, step=0)
        kept = memory.saved_bytes(model, forward) if categories else {}
        ends = [0]
        micro_batches = min(config.micro_batches, 2)
        # No list of them is held: what layers learn takes the place of what they knew.
        with memory.LiveBytes(
            memory.held_tensors(model, optimizer), resized=mesh is not None
        ) as live:
            for micro_batch in range(micro_batches):
                basis.set_noise_key(model, seed=0, step=0)
                ends.append(len(live.series))
                with parallel.micro_batch(last=micro_batch == micro_batches - 1):
                    loss = forward()
                    ends.append(len(live.series))
                    loss.backward()
                del loss
                ends.append(len(live.series))
        passes = [live.series[start:end] for start, end in itertools.pairwise(ends)]
        return _Walk(
            memory.tensor_bytes(model.parameters()), memory.optimizer_bytes(optimizer), passes, kept
        )


class _GroupedProduct(torch.autograd.Function):
    """A (S, N) times W (E, N, M) by groups of its rows: what it keeps, and shapes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(a, weights, offs)
        return a.new_empty(a.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, weights, _ = ctx.saved_tensors
        return torch.empty_like(a), torch.empty_like(weights), None


@contextmanager
def _grouped_products() -> Iterator[None]:
    """Plain experts of transformers multiply by PyTorch's grouped_mm, which knows fake tensors in
    bfloat16 only.
    """
    with patch.object(F, "grouped_mm", lambda a, b, offs: _GroupedProduct.apply(a, b, offs)):
        yield


@contextmanager
def _others(config: Config) -> Iterator[DeviceMesh | None]:
    """Where the model is divided: the processes of `config`, of which this one exists."""
    if config.parallel != "fsdp":
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    try:
        yield every_process("cpu")
    finally:
        dist.destroy_process_group()


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
    with head_sizes.blocks_of(_kind(config)):
        rows_per_block = head_sizes.most_rows(config.model.vocab_size, dtype, torch.device("cpu"))
    rows_per_unit = config.micro_batch_size if option == "block_size" else config.model.block_size
    first = -(-MANY_BLOCKS * rows_per_block // rows_per_unit)

    @functools.cache
    def walk(size: int) -> _Walk:
        return _deep_walk(with_size(config, **{option: size}), categories=False)

    def peak(size: int) -> int:
        if first < size < limit and walk(first).operators == walk(limit).operators:
            return walk(first).extended(walk(limit), (size - first) / (limit - first)).plan().peak
        return walk(size).plan().peak

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
