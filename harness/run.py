"""A run between two steps: the loss of a micro-batch, and what is measured beside it.

Of several processes (parallel.py) each has a `Run`. What is called here is called in all of them,
at the same steps; the first writes, and what is shown is what it sees, but losses, which are means
over all processes.

How it comes to be stands in set_up.py, the loop in train.py, how it is saved and continued in
saving.py.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import basis
from basis.convert import not_learning
from basis.diagnostics.kept import first_readers
from basis.diagnostics.monitor import Monitor
from basis.noise_key import assign_keys, base_key
from basis.ops.noise import fold
from data import Sampler, ValidationWindows
from harness import attention, memory, world
from harness.build import layer_inputs
from harness.config import Config
from harness.device import Runtime
from harness.folder.checkpoint import Checkpoints
from harness.folder.metrics import MetricsLog
from harness.parallel import Parallel
from harness.rank_control import RankControl
from harness.tracker import Tracker
from harness.zeroth_order import ZerothOrder
from models import LanguageModel

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss of `step`, or the weights after it, are no longer finite numbers."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")
        self.step = step


@dataclass
class Run:
    """A run between two steps. `step` optimiser steps are done; `pending` holds the losses of those
    not yet logged, as this process saw them; before these come `earlier_losses`, of a checkpoint.
    """

    config: Config
    folder: Path
    runtime: Runtime
    sampler: Sampler
    validation: ValidationWindows
    model: LanguageModel
    parallel: Parallel
    forward: Callable[..., Tensor]
    sketched: list[str]
    data_hashes: dict[str, str]
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    metrics: MetricsLog
    tracker: Tracker
    id: str
    knobs: dict[str, Any] = field(
        default_factory=dict
    )  # each layer's own, where a budget was divided by measured errors
    rank_control: RankControl | None = None
    monitor: Monitor | None = None
    step: int = 0
    saved_step: int | None = None
    val_step: int | None = None
    val_loss: float | None = None
    best_val_loss: float = math.inf
    pending: list[Tensor] = field(default_factory=list)
    earlier_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # wall time of earlier segments
    started: float = field(default_factory=time.perf_counter)

    @property
    def zeroth_order(self) -> ZerothOrder | None:
        """What replaces backward, if the method does."""
        return self.config.method.zeroth_order

    def micro_batch_loss(self, step: int, micro_batch: int) -> Tensor:
        """Forward of one micro-batch under its own noise: its mean loss in nats, with graph."""
        # Numbered over all processes, as its text is; each process's first one is for learning.
        number = micro_batch * self.sampler.world_size + self.sampler.rank
        key = base_key(seed=self.config.seed, step=step, micro_batch=number)
        base = torch.full((), key, dtype=torch.int64, device=self.runtime.device)
        assign_keys(self.model, base, step=step, micro_batch=micro_batch)
        return self.runtime.forward(self.forward, *self.sampler.batch(step, micro_batch))

    def zeroth_order_gradient(self, micro_batch: int, micro_batches: int) -> Tensor:
        """Add a micro-batch's part to the gradients, without backward; the mean of the two losses
        that it takes.
        """
        assert self.zeroth_order is not None
        key = fold("zeroth order", self.config.seed, self.step, micro_batch)
        return self.zeroth_order.add_gradient(
            self.model,
            lambda: self.micro_batch_loss(self.step, micro_batch),
            key,
            1.0 / micro_batches,
        )

    def gradient_quality(self) -> dict[str, float]:
        """Estimated against exact dW in the step about to be taken (its first micro-batch), as
        metrics `sketch/<layer>/...`.

        The noise is that of the step; weights, gradients and random state stay as they are.
        """
        with self._not_compiled():
            panel = basis.gradient_quality(
                self.model,
                lambda: self.micro_batch_loss(self.step, 0),
                masks=self.config.diagnostics.masks,
            )
        return {
            f"sketch/{layer}/{name}": v
            for layer, quality in panel.items()
            for name, v in quality.metrics().items()
        }

    def kept_entries(self) -> dict[str, float]:
        """Entries that SUS attention keeps in the step about to be taken (its first micro-batch),
        as metrics `sus/<layer>/...`.

        One more forward; weights, what methods have learned and random state stay as they are.
        """
        if self.config.attention.name != "sus":
            return {}
        with self._not_compiled():  # and without gradients, so no method learns
            return attention.kept_metrics(self.model, lambda: self.micro_batch_loss(self.step, 0))

    @contextmanager
    def _not_compiled(self) -> Iterator[None]:
        """Within, `forward` is the model itself: hooks and exchanged estimators are not seen by a
        graph made before.
        """
        compiled, self.forward = self.forward, self.model
        try:
            yield
        finally:
            self.forward = compiled

    def adapt_rank(self) -> dict[str, float]:
        """After a step: the look at the rank, where one is due, as metrics `rank/...`, with
        `mem/...` if the rank has changed.
        """
        if self.rank_control is None or not self.rank_control.due(self.step):
            return {}
        error, changed = self.rank_control.check(
            self.model, self.runtime, self.config.seed, self.step
        )
        metrics = {"rank/error": error} | self.rank_control.metrics()
        if changed:
            if self.monitor is not None:  # it holds the old layers, and what they had learned
                ranges, self.monitor = self.monitor.state_dict(), Monitor(self.model)
                self.monitor.load_state_dict(ranges)
            if (
                self.runtime.compile
            ):  # all anew, as in a run resumed here: old graphs have no say in the new ones
                torch.compiler.reset()
                self.forward = self.parallel.forward()
            metrics |= self.measure_memory()
        if self.runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the peak that is logged is training's
        return metrics

    def watching(self, now: bool) -> AbstractContextManager[object]:
        """Around the micro-batches of a step: the monitor, if there is one and the step is to be
        watched.

        Its random matrices are a function of seed and step, so that a resumed run reads the same,
        and errors of readings average out over steps.
        """
        if self.monitor is None or not now:
            return nullcontext()
        self.monitor.seed = fold("monitor", self.config.seed, self.step)
        return self.monitor

    def readings(self) -> dict[str, float]:
        """What the monitor saw in the step that it was last put around, as metrics
        `monitor/<layer>/...`.
        """
        found = {} if self.monitor is None else self.monitor.read()
        return {
            f"monitor/{layer}/{name}": value
            for layer, seen in found.items()
            for name, value in seen.metrics().items()
        }

    def pending_losses(self) -> list[float]:
        """Losses of the steps since the last logged row, means over processes. Raises
        NonFiniteError naming the first step that has none.
        """
        losses = list(self.earlier_losses)
        if self.pending:
            losses += world.mean(torch.stack(self.pending)).tolist()
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.step - len(losses) + index + 1
                raise NonFiniteError(
                    step,
                    f"the training loss is {loss} (method {self.config.method.name}, "
                    f"optim.lr={self.config.optim.lr}); {self.last_checkpoint()}",
                )
        return losses

    def forget_losses(self) -> None:
        """Losses so far are logged."""
        self.pending.clear()
        self.earlier_losses = []

    def last_checkpoint(self) -> str:
        """The step of the newest one, in words."""
        return (
            "no checkpoint yet"
            if self.saved_step is None
            else f"the last checkpoint is of step {self.saved_step}"
        )

    def wall_seconds(self) -> float:
        """Seconds since the run began, over all its segments, without the time between them."""
        return self.seconds + time.perf_counter() - self.started

    def measure_memory(self) -> dict[str, int]:
        """Bytes of one training step, under the metric names `mem/...`; nothing about the run is
        changed by it.
        """
        micro_batches = min(
            self.config.micro_batches, 2
        )  # the second one meets the first one's gradients

        def forward() -> Tensor:
            return self.micro_batch_loss(self.step, 0)

        def forward_backward(micro_batch: int) -> None:
            (self.micro_batch_loss(self.step, micro_batch) / micro_batches).backward()

        compiled, self.forward = self.forward, self.model
        with (
            torch.random.fork_rng(),
            self.parallel.aside(),
            not_learning(self.model),
            torch.set_grad_enabled(self.zeroth_order is None),
        ):
            saved = memory.saved_bytes(self.model, forward)
            # The head, fused with its loss, keeps no input.
            readers = first_readers(self.model, forward, skip=[self.model.head])
            peak = 0
            if (
                self.runtime.device.type == "cpu" and self.zeroth_order is None
            ):  # MemTracker refuses two forwards in a row
                peak = memory.cpu_peak_bytes(
                    self.model, self.optimizer, forward_backward, micro_batches
                )
                self.optimizer.zero_grad(set_to_none=True)
            self.forward = compiled
            total = (
                memory.saved_bytes_total(self.model, forward)
                if self.runtime.compile
                else sum(saved.values())
            )
        parameters = memory.tensor_bytes(self.model.parameters())
        measured = {"mem/saved_bytes": total} | {
            f"mem/saved_bytes/{name}": size for name, size in saved.items()
        }
        layers = [layer for _, layer in basis.sketched_layers(self.model)]
        learned = memory.tensor_bytes(t for layer in layers for t in layer.state.values())
        width = {name: layer.in_features for name, layer in basis.sketched_layers(self.model)}
        read = sum(rows * width[name] for name, (first, rows) in readers.items() if name == first)
        measured |= {
            "mem/parameter_bytes": parameters,
            "mem/gradient_bytes": parameters,
            "mem/estimator_bytes": learned,
        }
        measured["mem/input_bytes"] = read * layer_inputs(self.config)["dtype"].itemsize
        return measured | ({"mem/peak_bytes": peak} if peak else {})


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    runtime: Runtime,
    forward: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> float:
    """Mean cross-entropy in nats per token over `batches` of (inputs, targets), each int64 (b, T).

    `forward` replaces calling `model` (a compiled form of it). The model's training mode is
    restored. Several processes divide the batches; the loss is that of one, bit for bit where
    theirs are.
    """
    computed = model if forward is None else forward
    training, here, every = model.training, world.here(), list(batches)
    losses = torch.zeros(len(every), dtype=torch.float64, device=runtime.device)
    model.eval()
    for first in range(0, len(every), here.size):
        index = first + here.rank
        # fsdp's processes run together: one without a batch of its own takes the last one too.
        loss = runtime.forward(computed, *every[min(index, len(every) - 1)])
        if index < len(every):
            losses[index] = loss
    model.train(training)
    for module in world.sharded_modules(model):
        module.reshard()  # type: ignore[operator]  # what fsdp keeps whole for a backward
    return world.summed(losses).mean().item()
