"""What several processes compute, in processes of their own, for tests that compare it with one."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

import basis
from basis.estimator import Estimator
from basis.noise_key import assign_keys, base_key
from harness import activations, world
from harness.activations import ActivationsOptions
from harness.device import Runtime
from harness.parallel import Parallel, gathered, load_model, load_optimizer
from harness.run import validation_loss
from models import GPT, GPTConfig

METHODS: dict[str, Estimator | None] = {
    "exact": None,
    "basis": basis.BalancedSketch(8),
    "transform": basis.Transform(bits=4.0, every=2),
    "quantized": basis.Quantized(4),
}
VOCABULARY, CONTEXT, WINDOWS = 64, 16, 2
MICRO_BATCHES = 4  # of a step, over all processes


def model_of(method: str, kept: ActivationsOptions) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=VOCABULARY, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=32)
    )
    estimator = METHODS[method]
    if estimator is not None:
        basis.convert(model, estimator, exact_if_kept=False)
    activations.apply(model, kept)
    return model


def text(step: int) -> Tensor:
    """Windows of all micro-batches of a step, int64 (MICRO_BATCHES, WINDOWS, CONTEXT + 1)."""
    source = torch.Generator().manual_seed(step)
    shape = (MICRO_BATCHES, WINDOWS, CONTEXT + 1)
    return torch.randint(VOCABULARY, shape, generator=source)


def trained(
    kind: str, method: str, *, kept: str = "plain", compile: bool = False, steps: int = 3
) -> dict[str, Any]:
    """A few steps of a small model on the processes that there are: losses, norms, the gradients of
    the first step, and what is left at the end, whole; seen by this process.
    """
    here, options = world.here(), ActivationsOptions(name=kept)
    model = model_of(method, options)
    runtime = Runtime(torch.device("cpu"), "float32", compile)
    parallel = Parallel(kind, model, runtime, options)
    # eps: the bias of keys has no gradient but rounding, which Adam would blow up.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, fused=True)
    forward = parallel.forward()
    losses, norms, gradients = [], [], {}
    mine = MICRO_BATCHES // here.size
    for step in range(steps):
        for micro_batch in range(mine):
            number = micro_batch * here.size + here.rank
            base = torch.full((), base_key(seed=0, step=step, micro_batch=number))
            assign_keys(model, base, step=step, micro_batch=micro_batch)
            windows = text(step)[number]
            with parallel.micro_batch(last=micro_batch == mine - 1):
                loss = forward(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
                (loss / mine).backward()
            if micro_batch == 0:
                parallel.share_learned(step)
            losses.append(loss.detach())
        if step == 0:
            gradients = {
                name: world.whole(p.grad).clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        norms.append(float(world.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))))
        optimizer.step()
        optimizer.zero_grad()
    held = [(w[:, :-1], w[:, 1:]) for w in text(99)[:3]]  # one fewer than two processes would share
    whole = gathered(model.state_dict())
    return {
        "losses": world.mean(torch.stack(losses).view(steps, mine).mean(1)).tolist(),
        "norms": norms,
        "gradients": gradients,
        "learned": {name: t.clone() for name, t in model.named_buffers()},
        "evaluated": validation_loss(model, held, runtime, forward),
        "bytes": sum(world.local(p).nbytes for p in model.parameters()),
        "state": {name: t if t is None else t.clone() for name, t in whole.items()},
        "continued": _continued(model, optimizer),
    }


def _continued(model: GPT, optimizer: torch.optim.Optimizer) -> bool:
    """Whether loading what was gathered gives what was there, in this process's part too."""
    before = [world.local(p).clone() for p in model.parameters()]
    averages = [world.local(s["exp_avg"]).clone() for s in optimizer.state.values()]
    states = [gathered(model.state_dict()), gathered(optimizer.state_dict())]
    states = copy.deepcopy(states)  # as a file would
    if world.connected():  # process 0 has the values, as a checkpoint would hand them to all
        dist.broadcast_object_list(states, src=0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(s["exp_avg"] for s in optimizer.state.values())]:
            world.local(tensor).zero_()
    load_model(model, states[0])
    load_optimizer(optimizer, states[1])
    after = [world.local(p) for p in model.parameters()]
    averages_after = [world.local(s["exp_avg"]) for s in optimizer.state.values()]
    return all(
        torch.equal(a, b)
        for a, b in zip([*before, *averages], [*after, *averages_after], strict=True)
    )


def noise(draws: int) -> dict[str, Tensor]:
    """Estimates of one layer's dW, a row for each draw: "alone", by this process's noise, and
    "joint", what ddp makes of all; and the exact one. All processes have the same text.
    """
    model = model_of("exact", ActivationsOptions())
    name = "blocks.1.mlp.fc"
    windows = text(0)[0]

    def gradient(forward: Callable[..., Tensor]) -> Tensor:
        forward(windows[:, :-1], windows[:, 1:]).backward()
        found = model.get_submodule(name).weight.grad
        assert isinstance(found, Tensor)
        copy = found.flatten().clone()
        model.zero_grad(set_to_none=True)
        return copy

    exact = gradient(model)
    basis.convert(
        model, basis.BalancedSketch(8, invariant_scalars=False), include=[name], exact_if_kept=False
    )
    parallel = Parallel("ddp", model, Runtime(torch.device("cpu"), "float32", False), _PLAIN)
    forward, rows = parallel.forward(), {"alone": [], "joint": []}
    for draw in range(draws):
        for mode, last in (("alone", False), ("joint", True)):
            key = base_key(seed=1, step=draw, micro_batch=world.here().rank)
            assign_keys(model, torch.full((), key), step=draw)
            with parallel.micro_batch(last=last):
                rows[mode].append(gradient(forward))
    return {"exact": exact} | {mode: torch.stack(found) for mode, found in rows.items()}


_PLAIN = ActivationsOptions()


def on_processes(
    size: int, folder: Path, jobs: dict[str, tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Run `jobs` (a function of this module and its arguments, by name) one after another in `size`
    processes: for each process what they returned, by name.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(_work, args=(size, port, folder, jobs), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _work(rank: int, size: int, port: int, folder: Path, jobs: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world.connect(world.here(), cuda=False)
    found = {name: globals()[function](**given) for name, (function, given) in jobs.items()}
    torch.save(found, folder / f"{rank}.pt")
    world.part()
