"""What a training step would take, without taking it: bytes on fake tensors, which have shapes and no memory.

The step is the harness's own: the model of the configuration with its method and activations, forward, loss head, backward,
and the optimiser's state. What is alive is followed operator by operator; counts and categories are those of memory.py.
Transient memory inside kernels is not seen, nor what an allocator loses to fragmentation, nor, on CUDA, the context and the
workspaces of cuBLAS. Attention is the CPU's flash kernel, whose bytes are those of CUDA's.

A plan takes seconds for any size, because what is alike is gone through once or twice. Of a deep model the third and the fourth
block say what each further one adds. Of the loss head's blocks of rows (131,072 tokens of GPT-2 have 394) the first, the second
and the last are taken: a block writes its rows of dX and adds to dW where they already exist, so whatever the number of blocks
between, they leave nothing behind but a number or two each, 4 bytes, and need no more than the second did. An estimator that
must see dY whole collects the blocks, and all are taken.

`largest` searches for the longest context or the largest micro-batch that fits. Bytes grow along a convex curve of straight
pieces in either, but for small steps, so a few plans are enough.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import basis
from basis import Estimator, Exact, SketchedLinear, loss_head
from harness import activations, memory
from harness.build import apply_method
from harness.config import Config
from harness.optim import make_optimizer
from models import GPT


@dataclass(frozen=True)
class Plan:
    """Bytes of one step. kept: by category, between forward and backward of a micro-batch. peak: of everything at once."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def beyond(self) -> int:
        """Peak without parameters, gradients and optimiser state: activations and temporaries."""
        return self.peak - self.parameters - self.gradients - self.optimizer


def make_model(config: Config, device: str = "cpu") -> GPT:
    """The configuration's model with its method and activations, uninitialised on `device`; inside a FakeTensorMode, fake."""
    with torch.device("meta"):
        model = GPT(config.model)
        apply_method(model, config)
        activations.apply(model, config.activations)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = made.setdefault(id(old), nn.Parameter(torch.empty_like(old, device=device)))
    return model


FEW_BLOCKS = 4


def plan(config: Config) -> Plan:
    """The bytes of a step of `config`. Raises ValueError as training would, and for what only compilation decides.

    Blocks are all alike: of a deep model, 3 and 4 blocks are gone through, and each further one adds what the fourth did.
    """
    depth = config.model.n_layer
    if depth <= FEW_BLOCKS:
        return _walk(config)
    few, more = (_walk(with_size(config, n_layer=FEW_BLOCKS - 1 + i)) for i in range(2))

    def extended(a: int, b: int) -> int:
        return a + (depth - FEW_BLOCKS + 1) * (b - a)

    totals = {n: extended(getattr(few, n), getattr(more, n)) for n in ("parameters", "gradients", "optimizer", "peak")}
    return Plan(**totals, kept={name: extended(size, more.kept[name]) for name, size in few.kept.items()})


def _walk(config: Config, *, every_block: bool = False) -> Plan:
    """The bytes of a step, operator by operator. every_block: of the loss head's rows too."""
    if config.compile or config.activations.name == "budget":
        raise ValueError("compile=true: what a compiled step keeps is known only by compiling it; plan without")
    low = config.precision == "bfloat16"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(config)
        optimizer = make_optimizer(model, config.optim)
        tokens = torch.zeros(config.micro_batch_size, config.model.block_size, dtype=torch.int64)

        def forward() -> Tensor:
            basis.set_noise_key(model, seed=0, step=0)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                return model(tokens, tokens)

        with nullcontext() if every_block else _few_head_blocks(model):
            kept = memory.saved_bytes(model, forward)
            micro_batches = min(config.micro_batches, 2)
            peak = memory.cpu_peak_bytes(model, optimizer, lambda _: forward().backward(), micro_batches)
        parameters = memory.tensor_bytes(model.parameters())
        return Plan(parameters, parameters, memory.optimizer_bytes(optimizer), peak, kept)


@contextmanager
def _few_head_blocks(model: GPT) -> Iterator[None]:
    """Meanwhile the loss head takes the first two blocks of rows and the last, where none is collected."""
    estimator = model.head.estimator if isinstance(model.head, SketchedLinear) else Exact()
    if type(estimator).factors is Estimator.factors:
        yield
        return
    blocks = loss_head._blocks

    def few(rows: int, classes: int) -> list[slice]:
        found = blocks(rows, classes)
        return found if len(found) <= 3 else [*found[:2], found[-1]]

    loss_head._blocks = few
    try:
        yield
    finally:
        loss_head._blocks = blocks


def largest(peak: Callable[[int], int], budget: float, unit: int, limit: int) -> int:
    """The largest multiple of `unit` up to `limit` whose `peak` bytes are at most `budget`; 0 if one unit's are more.

    peak: not falling. Secant steps between the largest size known to fit and the smallest known not to.
    """
    low, low_bytes = 1, peak(unit)
    if low_bytes > budget:
        return 0
    most = limit // unit
    high, high_bytes = most + 1, math.inf
    guess = min(4, most)
    while low < guess < high:
        found = peak(guess * unit)
        slope = (found - low_bytes) / (guess - low)
        if found <= budget:
            low, low_bytes = guess, found
        else:
            high, high_bytes = guess, found
        if math.isfinite(high_bytes):
            slope = (high_bytes - low_bytes) / (high - low)
        ahead = int((budget - low_bytes) / slope) if slope > 0 else most
        guess = min(max(low + ahead, low + 1), high - 1)
    return low * unit


def with_size(
    config: Config, *, block_size: int | None = None, micro_batch_size: int | None = None, n_layer: int | None = None
) -> Config:
    """`config` for another context, micro-batch or depth; where a step has several micro-batches, it keeps two."""
    changed = copy.deepcopy(config)
    several = config.micro_batches > 1
    changed.model.block_size = block_size or changed.model.block_size
    changed.model.n_layer = n_layer or changed.model.n_layer
    changed.micro_batch_size = micro_batch_size or changed.micro_batch_size
    changed.tokens_per_step = 2 * changed.micro_batch_size * changed.model.block_size if several else None
    return changed
