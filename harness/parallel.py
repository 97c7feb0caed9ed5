"""One model on several processes: `parallel=none`, `ddp` or `fsdp`.

    torchrun --nproc-per-node=8 train.py model=gpt2 parallel=fsdp

| parallel | a process holds | what travels in a step |
|---|---|---|
| none | everything; there is one process | |
| ddp | parameters, gradients, optimiser, whole | gradients, once |
| fsdp | its share of these, and one block at a time whole | parameters twice, gradients once |

Both are PyTorch's: DistributedDataParallel and `fully_shard` (FSDP2), the latter put around each
block and around the rest of the model, where embeddings and head stay whole from forward to
backward. null is ddp for several processes and none for one.

*What stays the same.* A step has tokens_per_step tokens over all processes. Number its
micro-batches m * world_size + rank: number g sees the text, and draws the sketch noise, of
micro-batch g of a single process. So N processes compute what one computes that accumulates N times
as many micro-batches, to rounding. What differs is dropout, and steps in which a method learns.

*Methods that learn* do so in a step's first micro-batch. Under ddp each process compresses that one
by what it learned from its own rows, where a single process would use what it learned from the
first. After its backward all take over what process 0 has learned (`share_learned`): the same
everywhere, to the last bit. Under fsdp that happens as soon as it is learned (basis/state.py), but
not in compiled blocks. It costs the bytes of what is learned, in steps that learn.

*Invariant Scalars* are of the process's own rows and gradients. The mean over processes is of
estimates, each scaled for itself, as over micro-batches.

*Accumulation.* Gradients travel with the last micro-batch. fsdp holds whole gradients until then.

*Compiled*, each block is by itself, so that gradients travel while earlier blocks are computed.

*Checkpoints* are those of a single process, whole: process 0 gathers the parts, tensor by tensor,
and writes one file. It costs process 0 the memory of parameters and optimiser on the host, and
buys that any number of processes, eval.py and sample.py can read it. PyTorch's sharded format (DCP)
was not taken: its index is a pickle, which runs code when it is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from basis import sketched_layers
from harness import activations, world
from harness.activations import ActivationsOptions
from harness.device import Runtime
from models import LanguageModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel

KINDS = ("none", "ddp", "fsdp")


class Parallel:
    """How `model` runs on the processes that there are. Made before its optimiser: with fsdp its
    parameters are then those of this process.
    """

    def __init__(
        self,
        kind: str,
        model: LanguageModel,
        runtime: Runtime,
        options: ActivationsOptions,
        mesh: DeviceMesh | None = None,
    ) -> None:
        assert kind in KINDS
        self.kind, self.model, self._runtime, self._options = kind, model, runtime, options
        self._ddp: DistributedDataParallel | None = None
        if runtime.compile and kind != "none":
            activations.compile_blocks(model, options)
        if kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            # Buffers are what methods have learned: `share_learned` sees to them. PyTorch 2.13 has
            # another name for it and warns of the old one.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers"
            sync: dict[str, Any] = {name if name in known else "broadcast_buffers": False}
            self._ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **sync)
        elif kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            mesh = mesh or every_process(runtime.device.type)
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

    def forward(self) -> Callable[..., Tensor]:
        """The model as a step calls it; compiled if the runtime says so."""
        if self.kind == "none":
            return (
                activations.compiled(self.model, self._options)
                if self._runtime.compile
                else self.model
            )
        whole: Callable[..., Tensor] = self.model if self._ddp is None else self._ddp
        return activations.by_blocks(whole, self._options) if self._runtime.compile else whole

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients travel with the last one."""
        if self._ddp is not None and not last:
            with self._ddp.no_sync():
                yield
            return
        if self.kind == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        try:
            yield
        finally:
            if self.kind == "fsdp":
                self.model.set_requires_gradient_sync(True)  # type: ignore[operator]

    def aside(self) -> AbstractContextManager[object]:
        """Around forwards, and backwards whose gradients are dropped, that are no part of a step.

        ddp: each process for itself. fsdp: all together, and gradients travel, since zero_grad
        does not reach those that wait to.
        """
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def share_learned(self, step: int) -> None:
        """After the first backward of `step`: what layers have learned in it becomes process 0's in
        all processes.
        """
        if self.kind == "none":
            return
        for _, layer in sketched_layers(self.model):
            if layer.state and layer.estimator.learns_at(step - layer.first_step):
                with torch.no_grad():
                    world.broadcast(list(layer.state.values()))


def every_process(device: str) -> DeviceMesh:
    """All processes that are connected, in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (torch.distributed.get_world_size(),))


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict with whole tensors, on the host where they were spread. All processes have to
    ask; only process 0 gets the values.
    """
    first = world.here().first

    def gather(value: Any) -> Any:
        if world.spread(value):
            found = world.whole(value)
            return found.cpu() if first else None
        if type(value) is dict:
            return {name: gather(item) for name, item in value.items()}
        return value

    return {name: gather(value) for name, value in state.items()}


def _like(known: Tensor, value: Tensor) -> Tensor:
    """`value` (whole) spread as `known` is. Each process has the whole and takes its part."""
    if not world.spread(known) or known.shape != value.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(known, DTensor)
    value = value.to(known.device)
    return distribute_tensor(value, known.device_mesh, known.placements, src_data_rank=None)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict(state)`, of whole tensors."""
    known = model.state_dict()
    model.load_state_dict(
        {name: _like(known.get(name, value), value) for name, value in state.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict(state)`, of whole tensors. Which kernels take a step stays."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {
            name: _like(parameters[index], value) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    kernels = ("fused", "foreach")
    groups = [
        group | {name: known[name] for name in kernels}
        for group, known in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "state": spread, "param_groups": groups})
