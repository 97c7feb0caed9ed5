"""What two processes find out about sketched layers whose weights are spread over them, as DTensor
(fully_shard, tensor parallel) has it. Gradients come whole, to compare them with one process's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes
from lookalikes import Conv1D, Mixture
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import basis
from basis.convert import left_alone

ROWS = 32
SKETCH = basis.BalancedSketch(8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), Conv1D(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(self.b(torch.tanh(self.a(x))))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Mixture(), nn.Linear(8, 4))


def rows(rank: int, step: int = 0) -> Tensor:
    noise = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(10 * step + rank))
    return noise * torch.linspace(0.1, 2.0 + rank, 8)


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in (model[0], model[1]):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        for name, p in model.named_parameters()
    }


def on_both(found: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over both processes' rows, as one process has it."""
    first, second = found(0), found(1)
    return {name: (first[name] + second[name]) / 2 for name in first}


def converted_after(mesh: DeviceMesh, rank: int) -> None:
    """fully_shard, then convert: the hooks still find their modules; noise as in one process."""
    model = sharded(build(), mesh)
    held = dict(model.named_modules())
    plain = gradients(model, rows(rank))
    changed = basis.convert(model, SKETCH, exact_if_kept=False)
    assert len(changed) == 6
    assert all(model.get_submodule(name) is held[name] for name in changed)
    basis.set_noise_key(model, seed=0, step=0, process=rank)

    def single(process: int) -> dict[str, Tensor]:
        other = build()
        basis.convert(other, SKETCH, exact_if_kept=False)
        basis.set_noise_key(other, seed=0, step=0, process=process)
        return gradients(other, rows(process))

    torch.testing.assert_close(gradients(model, rows(rank)), on_both(single))
    basis.convert(model, basis.Exact())  # again
    torch.testing.assert_close(gradients(model, rows(rank)), plain)
    assert basis.revert(model) == changed
    assert [type(m) for m in model.modules()][1:] == [type(held[n]) for n in held][1:]
    torch.testing.assert_close(gradients(model, rows(rank)), plain)


def reverted_after(mesh: DeviceMesh, rank: int) -> None:
    model = build()
    basis.convert(model, SKETCH)
    sharded(model, mesh)
    gradients(model, rows(rank))
    basis.revert(model)
    assert type(model[0].a) is nn.Linear
    assert type(model[0].c) is Conv1D
    torch.testing.assert_close(
        gradients(model, rows(rank)), on_both(lambda r: gradients(build(), rows(r)))
    )


def refused(mesh: DeviceMesh, rank: int) -> None:
    model = build()
    basis.convert(model, SKETCH, include=["2"])
    for layer in (model[0].a, model[2]):
        fully_shard(layer, mesh=mesh)
    left = {entry.name: entry.why for entry in left_alone(model, SKETCH)}
    assert left["0.a"] == "was given to fully_shard itself; convert first"
    with pytest.raises(ValueError, match="revert: 2: it was given to fully_shard itself"):
        basis.revert(model)


def tensor_parallel(mesh: DeviceMesh, rank: int) -> None:
    """A method that keeps all gives the plain gradients; a sketch gives exact outputs and dX."""
    x = rows(0)
    plain = gradients(build(), x)
    out = build()(x)
    for method in (basis.Exact(), SKETCH):
        model = build()
        basis.convert(model, method, exact_if_kept=False)
        parallelize_module(model[0], mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})
        found = gradients(model, x)
        torch.testing.assert_close(model(x), out)
        biases = {name for name in plain if name.endswith("bias")}
        same = plain.keys() if method == basis.Exact() else biases
        torch.testing.assert_close({n: found[n] for n in same}, {n: plain[n] for n in same})
        assert all(g.shape == plain[n].shape for n, g in found.items())
    model = build()
    basis.convert(model, basis.Transform(bits=2.0))
    parallelize_module(model[0], mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})
    with pytest.raises(ValueError, match="Transform learns from whole inputs"):
        model(x)


def checkpoints(mesh: DeviceMesh, rank: int, folder: Path) -> None:
    """What is learned is the same everywhere, and comes back from a checkpoint of PyTorch's."""

    def learner() -> nn.Module:
        model = build()
        basis.convert(model, basis.Transform(bits=1.0, every=1))
        return sharded(model, mesh)

    model = learner()
    for step in range(2):
        basis.set_noise_key(model, seed=0, step=step, process=rank)
        gradients(model, rows(rank, step))
    learned = {name: b.clone() for name, b in model.named_buffers() if "estimator_" in name}
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, learned)
    torch.testing.assert_close(*everywhere, rtol=0, atol=0)
    assert len({name.rpartition(".")[0] for name in learned}) == 7
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "learned")
    fresh = learner()
    state = {"model": get_model_state_dict(fresh)}
    dcp.load(state, checkpoint_id=folder / "learned")
    set_model_state_dict(fresh, state["model"])
    found = {name: b for name, b in fresh.named_buffers() if "estimator_" in name}
    torch.testing.assert_close(found, learned, rtol=0, atol=0)
    # A plain checkpoint has no such entries, and PyTorch wants to be told that this is meant.
    plain = sharded(build(), mesh)
    dcp.save({"model": get_model_state_dict(plain)}, checkpoint_id=folder / "plain")
    state = {"model": get_model_state_dict(fresh)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=folder / "plain", planner=planner)
    set_model_state_dict(fresh, state["model"])
    for (name, p), q in zip(fresh.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.full_tensor(), msg=name)


def on_two_processes(port: int, folder: Path) -> None:
    processes.spawn(_work, args=(port, folder), nprocs=2)


def _work(rank: int, port: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for check in (converted_after, reverted_after, refused, tensor_parallel):
            check(mesh, rank)
        checkpoints(mesh, rank, folder)
    finally:
        dist.destroy_process_group()
