"""A step on fake tensors, gone through once: what is alive after each operator.

The step is the harness's own: the model of the configuration with its method and activations,
forward, loss head, backward. Attention is the CPU's flash kernel, whose bytes are those of CUDA's.
The loss head takes its rows as on the configuration's device. Kernels of basis/ops are asked for
the shapes of their results (basis/ops/shapes.py): the rows that a CPU takes at a time, and what
lies in a kernel, are not seen. Experts of a mixture get as many rows each.

*Several processes.* With parallel=fsdp the model is divided as in training, among `world_size`
processes of which only this one exists: PyTorch's fake group takes part in their stead.

What plans make of it: memory_plan.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
from models import LanguageModel, build


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


def kind_of(config: Config) -> str:
    """The kind of device that the configuration's step would run on."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    return here if config.device == "auto" else config.device


Series = list[tuple[Any, int]]  # operators, and the bytes alive after each


@dataclass(frozen=True)
class Walk:
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

    def extended(self, other: Walk, times: float) -> Walk:
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
        return Walk(
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


def walk(config: Config, *, categories: bool = True, every_block: bool = False) -> Walk:
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
        head_sizes.blocks_of(kind_of(config)),
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
        return Walk(
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
