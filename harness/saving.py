"""What a checkpoint of a run holds, and how a run goes on from it.

Batches and sketch noise need no state, they are functions of the step. A checkpoint holds the rest:
weights, optimiser, random state of each process, the losses not yet logged, the best validation
loss, what the monitor last saw, the rank where it adapts, and a mark of metrics.jsonl, by which its
history is found whole again (folder/one_run.py). It also names the run: its id, options, text.

Of several processes all save and restore together; the first writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from basis.noise_key import NOISE_VERSION
from basis.ops.noise import fold
from harness import parallel, world
from harness.folder.checkpoint import Loaded
from harness.run import NonFiniteError, Run


def save(run: Run) -> None:
    """Checkpoint the step at which `run` is, unless that is done.

    Raises NonFiniteError rather than save broken weights, and OSError if the disk refuses.
    """
    if run.saved_step == run.step:
        return
    losses = run.pending_losses()
    norms = torch._foreach_norm([world.local(p.detach()) for p in run.model.parameters()])
    if world.largest(not bool(torch.stack(norms).isfinite().all())):
        raise NonFiniteError(
            run.step,
            f"weights are not finite after the update (method "
            f"{run.config.method.name}, optim.lr={run.config.optim.lr}); "
            f"{run.last_checkpoint()}",
        )
    random = world.each(_random_state(run))
    state = {
        "model": parallel.gathered(run.model.state_dict()),
        "optimizer": parallel.gathered(run.optimizer.state_dict()),
        **random[0],
        "random_of_processes": random[1:],
        "pending_losses": losses,
        "monitor": None if run.monitor is None else run.monitor.state_dict(),
        "val_step": run.val_step,
        "val_loss": run.val_loss,
        "best_val_loss": run.best_val_loss,
        "run_id": run.id,
        "config": run.config.to_dict(),
        "data": run.data_hashes,
        "runtime": run.runtime.describe(),
        "noise": NOISE_VERSION,
        "seconds": run.wall_seconds(),
        "knobs": run.knobs,
        "adaptive_rank": None if run.rank_control is None else run.rank_control.state_dict(),
    }
    # What the best is kept by: the loss of these very weights.
    best_by = run.config.checkpoint.best and run.val_step == run.step

    def write() -> None:
        run.metrics.sync()
        state["metrics"] = run.metrics.mark()
        run.checkpoints.save(
            run.step, state, val_loss=run.val_loss if best_by else None, run_id=run.id
        )

    world.agreed(write)
    run.saved_step = run.step


def restore(run: Run, loaded: Loaded) -> None:
    """Put `run` where `loaded`, a checkpoint of it, was saved."""
    state = loaded.state
    parallel.load_model(run.model, state["model"])
    parallel.load_optimizer(run.optimizer, state["optimizer"])
    _restore_random_state(run, state)
    run.earlier_losses = state["pending_losses"]
    if run.monitor is not None and state.get("monitor"):  # a run may have been without until now
        run.monitor.load_state_dict(state["monitor"])
    run.best_val_loss, run.val_step, run.val_loss = (
        state["best_val_loss"],
        state["val_step"],
        state["val_loss"],
    )
    run.seconds = state["seconds"]
    run.step = run.saved_step = loaded.step


def _random_state(run: Run) -> dict[str, Tensor | None]:
    """PyTorch's random numbers of this process, for dropout."""
    cuda = run.runtime.device.type == "cuda"
    return {
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def _restore_random_state(run: Run, state: Mapping[str, Any]) -> None:
    """Those of this process. With another number of processes than before, those that are new
    draw what nobody drew.
    """
    rank = world.here().rank
    every = [state, *state.get("random_of_processes", [])]
    if rank >= len(every):
        torch.manual_seed(fold("process", run.config.seed, rank, state["rng"].sum().item()))
        return
    torch.set_rng_state(every[rank]["rng"])
    if run.runtime.device.type == "cuda" and every[rank]["rng_cuda"] is not None:
        torch.cuda.set_rng_state(every[rank]["rng_cuda"])
