"""Everything a run consists of, put together in the order in which it can be refused.

`set_up` first checks what needs no data (device, method scope, the run directory's old configuration), then prepares the data,
builds model and optimiser, and only then writes into the run directory. It continues from the newest sound checkpoint if
there is one: weights, optimiser, random state, the losses not yet logged, the best validation loss, what the monitor last
saw; batches and sketch noise need no state, they are functions of the step.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

import basis
from basis.noise import fold
from data import Sampler, ValidationWindows, validation_windows
from data.prepare import prepare
from harness import activations, memory, rundir
from harness.build import apply_knobs, build_model, check_method, fill_vocabulary, measure_knobs
from harness.checkpoint import Checkpoints, Loaded
from harness.config import Config, make_method
from harness.device import Runtime, resolve
from harness.identity import run_id, run_labels
from harness.metrics import MetricsLog
from harness.optim import make_optimizer
from harness.tracker import Tracker, make_tracker, require_wandb
from harness.zeroth_order import ZerothOrder
from models import GPT

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the weights are no longer finite numbers."""


@dataclass
class Run:
    """A run between two steps. `step` optimiser steps are done; `pending` holds the losses of those not yet logged."""

    config: Config
    folder: Path
    runtime: Runtime
    sampler: Sampler
    validation: ValidationWindows
    model: GPT
    forward: Callable[[Tensor, Tensor], Tensor]
    sketched: list[str]
    data_hashes: dict[str, str]
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    metrics: MetricsLog
    tracker: Tracker
    lock: FileLock
    id: str
    zeroth_order: ZerothOrder | None = None  # takes the place of backward
    knobs: dict[str, Any] = field(default_factory=dict)  # each layer's own, where a budget was divided by measured errors
    monitor: basis.Monitor | None = None
    step: int = 0
    saved_step: int | None = None
    val_step: int | None = None
    val_loss: float | None = None
    best_val_loss: float = math.inf
    pending: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0  # wall time of earlier segments
    started: float = field(default_factory=time.perf_counter)

    def micro_batch_loss(self, step: int, micro_batch: int) -> Tensor:
        """Forward of one micro-batch with its own noise; the mean loss over its tokens, with graph."""
        basis.set_noise_key(self.model, seed=self.config.seed, step=step, micro_batch=micro_batch)
        inputs, targets = self.sampler.batch(step, micro_batch)
        device = self.runtime.device
        with self.runtime.autocast():
            return self.forward(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True))

    def zeroth_order_gradient(self, micro_batch: int, micro_batches: int) -> Tensor:
        """Add a micro-batch's part to the gradients, without backward; the mean of the two losses that it takes."""
        assert self.zeroth_order is not None
        key = fold("zeroth order", self.config.seed, self.step, micro_batch)
        return self.zeroth_order.add_gradient(
            self.model, lambda: self.micro_batch_loss(self.step, micro_batch), key, 1.0 / micro_batches
        )

    def gradient_quality(self) -> dict[str, float]:
        """Estimated against exact dW in the step about to be taken (its first micro-batch), as metrics `sketch/<layer>/...`.

        The noise is that of the step; weights, gradients and random state stay as they are.
        """
        compiled, self.forward = self.forward, self.model
        try:
            panel = basis.gradient_quality(
                self.model, lambda: self.micro_batch_loss(self.step, 0), masks=self.config.diagnostics.masks
            )
        finally:
            self.forward = compiled
        return {f"sketch/{layer}/{name}": v for layer, quality in panel.items() for name, v in quality.metrics().items()}

    def watching(self, now: bool) -> AbstractContextManager[object]:
        """Around the micro-batches of a step: the monitor, if there is one and the step is to be watched.

        Its random matrices are a function of seed and step, so that a resumed run reads the same, and errors of readings average
        out over steps.
        """
        if self.monitor is None or not now:
            return nullcontext()
        self.monitor.seed = fold("monitor", self.config.seed, self.step)
        return self.monitor

    def readings(self) -> dict[str, float]:
        """What the monitor saw in the step that it was last put around, as metrics `monitor/<layer>/...`."""
        found = {} if self.monitor is None else self.monitor.read()
        return {f"monitor/{layer}/{name}": value for layer, seen in found.items() for name, value in seen.metrics().items()}

    def pending_losses(self) -> list[float]:
        """Losses of the steps since the last logged row. Raises NonFiniteError naming the first step that has none."""
        losses: list[float] = torch.stack(self.pending).tolist() if self.pending else []
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.step - len(losses) + index + 1
                raise NonFiniteError(
                    f"step {step}: the training loss is {loss} (method {self.config.method.name}, "
                    f"optim.lr={self.config.optim.lr}); {self._last_checkpoint()}"
                )
        return losses

    def _last_checkpoint(self) -> str:
        return "no checkpoint yet" if self.saved_step is None else f"the last checkpoint is of step {self.saved_step}"

    def wall_seconds(self) -> float:
        """Seconds since the run began, over all its segments, without the time between them."""
        return self.seconds + time.perf_counter() - self.started

    def save(self) -> None:
        """Checkpoint the present step, unless that is done. Raises NonFiniteError rather than save broken weights."""
        if self.saved_step == self.step:
            return
        losses = self.pending_losses()
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        if not bool(torch.stack(norms).isfinite().all()):
            raise NonFiniteError(
                f"step {self.step}: weights are not finite after the update (method {self.config.method.name}, "
                f"optim.lr={self.config.optim.lr}); {self._last_checkpoint()}"
            )
        self.metrics.sync()
        self.checkpoints.save(
            self.step,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state() if self.runtime.device.type == "cuda" else None,
                "pending_losses": losses,
                "monitor": None if self.monitor is None else self.monitor.state_dict(),
                "val_step": self.val_step,
                "val_loss": self.val_loss,
                "best_val_loss": self.best_val_loss,
                "run_id": self.id,
                "config": self.config.to_dict(),
                "data": self.data_hashes,
                "runtime": self.runtime.describe(),
                "seconds": self.wall_seconds(),
                "knobs": self.knobs,
            },
            # What the best is kept by: the loss of these very weights.
            val_loss=self.val_loss if self.config.checkpoint.best and self.val_step == self.step else None,
        )
        self.saved_step = self.step

    def restore(self, loaded: Loaded) -> None:
        """Continue from a checkpoint of this run."""
        state = loaded.state
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.runtime.device.type == "cuda" and state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"])
        self.pending = [torch.tensor(loss, device=self.runtime.device) for loss in state["pending_losses"]]
        if self.monitor is not None and state.get("monitor"):  # a run may have been without until now
            self.monitor.load_state_dict(state["monitor"])
        self.best_val_loss, self.val_step, self.val_loss = state["best_val_loss"], state["val_step"], state["val_loss"]
        self.seconds = state["seconds"]
        self.step = self.saved_step = loaded.step

    def measure_memory(self) -> dict[str, int]:
        """Bytes of one training step, under the metric names `mem/...`; nothing about the run is changed by it."""
        micro_batches = min(self.config.micro_batches, 2)  # the second one meets the first one's gradients

        def forward() -> Tensor:
            return self.micro_batch_loss(self.step, 0)

        def forward_backward(micro_batch: int) -> None:
            (self.micro_batch_loss(self.step, micro_batch) / micro_batches).backward()

        compiled, self.forward = self.forward, self.model
        with torch.random.fork_rng(), basis.not_learning(self.model), torch.set_grad_enabled(self.zeroth_order is None):
            saved = memory.saved_bytes(self.model, forward)
            peak = 0
            if self.runtime.device.type == "cpu" and self.zeroth_order is None:  # MemTracker refuses two forwards in a row
                peak = memory.cpu_peak_bytes(self.model, self.optimizer, forward_backward, micro_batches)
                self.optimizer.zero_grad(set_to_none=True)
            self.forward = compiled
            total = memory.saved_bytes_total(self.model, forward) if self.runtime.compile else sum(saved.values())
        parameters = memory.tensor_bytes(self.model.parameters())
        measured = {"mem/saved_bytes": total} | {f"mem/saved_bytes/{name}": size for name, size in saved.items()}
        learned = memory.tensor_bytes(t for _, layer in basis.sketched_layers(self.model) for t in layer.state.values())
        measured |= {"mem/parameter_bytes": parameters, "mem/gradient_bytes": parameters, "mem/estimator_bytes": learned}
        return measured | ({"mem/peak_bytes": peak} if peak else {})


def telling_settings(config: Config) -> dict[str, object]:
    """What tells runs of one method apart in a sweep: the estimator's options that have no default, R first among them, the
    budget that takes the place of its knob, and attention.

    Switches and choices that are not at their default are told too; numbers with a default (shrinkage, eps) are not, nor what
    follows from other options (rows).
    """
    estimator: Any = make_method(config.method)
    telling: dict[str, object] = {}
    for option in dataclasses.fields(estimator):
        if "follows" in option.metadata:
            continue
        value = getattr(config.method, option.name)
        if config.method.budget is not None and option.name == estimator.knob:
            telling["budget"] = config.method.budget
            continue
        if option.default is dataclasses.MISSING or (value != option.default and not isinstance(value, float)):
            telling["R" if option.name == "rank" else option.name] = value
    if config.method.allocation != "uniform":
        telling["allocation"] = config.method.allocation
    return telling | config.attention.telling()


def _measured_knobs(model: GPT, config: Config, sampler: Sampler, runtime: Runtime) -> dict[str, Any]:
    """method.allocation=variance in a new run: see `measure_knobs`. PyTorch's random state stays as it was."""

    def loss(step: int) -> Tensor:
        basis.set_noise_key(model, seed=config.seed, step=step, micro_batch=0)
        inputs, targets = sampler.batch(step, 0)
        with runtime.autocast():
            result: Tensor = model(inputs.to(runtime.device), targets.to(runtime.device))
        return result

    with torch.random.fork_rng():
        return measure_knobs(model, config, loss)


def set_up(config: Config, folder: Path) -> Run:
    """The run of `config` in `folder`, new or continued. Raises ValueError for what the user can mend, before writing."""
    runtime = resolve(config.device, config.precision, config.compile, deterministic=config.deterministic)
    if config.activations.name == "budget" and not runtime.compile:
        raise ValueError("activations=budget: a budget is kept by torch.compile; give compile=true")
    if config.diagnostics.monitor and runtime.compile:
        raise ValueError("diagnostics.monitor=true: hooks on layers are not seen by a compiled model; give compile=false")
    require_wandb(config.tracker.mode)
    check_method(config)
    rundir.check_same_run(folder, config)
    given = config.to_dict()

    prepared = prepare(config.data, progress=config.log.progress)
    config.model = fill_vocabulary(config.model, prepared.train)
    sampler = Sampler(
        prepared.train,
        block_size=config.model.block_size,
        batch_size=config.micro_batch_size,
        order=config.data.order,
        seed=config.seed,
        micro_batches=config.micro_batches,
    )
    validation = validation_windows(
        prepared.val, block_size=config.model.block_size, batch_size=config.eval.batch_size, batches=config.eval.batches
    )
    model, sketched = build_model(config)
    model.to(runtime.device)
    optimizer = make_optimizer(model, config.optim)
    checkpoints = Checkpoints(folder / rundir.CHECKPOINT_FOLDER, keep=config.checkpoint.keep)
    loaded = checkpoints.load_latest()
    data_hashes = {"train": prepared.train.sha256, "validation": validation.hash}
    if loaded and loaded.state["data"] != data_hashes:
        raise ValueError(
            f"data.path={config.data.path}: the prepared tokens are not those that the run in {folder} was started with; "
            "bring the same text back, give another hydra.run.dir, or delete the folder"
        )
    if loaded and loaded.state["runtime"] != runtime.describe():
        before, now = loaded.state["runtime"], runtime.describe()
        changes = "; ".join(
            f"{option}: {before[option]} -> {now[option]}" for option in now if before[option] != now[option]
        )
        raise ValueError(f"{folder} holds a run that computes elsewhere ({changes}); losses would not continue bit for bit")

    knobs: dict[str, Any] = {}
    if config.method.allocation == "variance":
        knobs = loaded.state["knobs"] if loaded else _measured_knobs(model, config, sampler, runtime)
        apply_knobs(model, config, knobs)

    folder.mkdir(parents=True, exist_ok=True)
    fresh = not any(folder.iterdir())
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)  # the system lets go of it when the process ends, however it ends
    except Timeout:
        raise ValueError(f"{folder}: another process is working on this run") from None
    rundir.write_config(folder, given)
    identity = run_id(folder)
    metrics = MetricsLog(folder / rundir.METRICS_FILE)
    metrics.truncate_after(loaded.step if loaded else -1)
    labels = run_labels(
        method=config.method.name,
        settings=telling_settings(config),
        seed=config.seed,
        experiment=config.experiment_name,
    )
    try:
        tracker = make_tracker(
            config.tracker,
            run_dir=folder,
            run_id=identity,
            config=config.to_dict(),
            group=labels.group,
            job_type=labels.job_type,
            tags=labels.tags,
            name=labels.name,
        )
    except ValueError:  # no key, no entry: known only when asked, and then nothing should stay of a run that did not begin
        metrics.close()
        lock.release()
        if fresh:  # the contents alone: the folder may be the user's, or the working directory
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    if runtime.compile:
        torch.compiler.reset()  # graphs of a sweep's earlier runs count against the limit of recompilations
    forward: Callable[[Tensor, Tensor], Tensor] = (
        activations.compiled(model, config.activations) if runtime.compile else model
    )
    method = make_method(config.method)
    run = Run(
        config=config,
        folder=folder,
        runtime=runtime,
        sampler=sampler,
        validation=validation,
        model=model,
        forward=forward,
        sketched=sketched,
        data_hashes=data_hashes,
        optimizer=optimizer,
        checkpoints=checkpoints,
        metrics=metrics,
        tracker=tracker,
        lock=lock,
        id=identity,
        zeroth_order=method if isinstance(method, ZerothOrder) else None,
        knobs=knobs,
        monitor=basis.Monitor(model) if config.diagnostics.monitor else None,
    )
    if loaded:
        run.restore(loaded)
        log.info("continuing from step %d (%s)", run.step, loaded.path)
    return run
