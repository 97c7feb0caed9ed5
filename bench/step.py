"""A whole training step as the benchmarks time it: forward, the loss head, backward and the
optimiser, on random tokens.

One set-up for time and memory, for every method and activations, and for configurations
(scripts/bench_step.py) as well as for a machine that has torch alone (scripts/bench_gpu.py). The
peak is counted tensor by tensor on a CPU (not under compile, which makes no operators that could be
counted), measured on CUDA.

Some estimators look every so many steps at where their inputs lie, and at each of the first ones. A
step's time here is the mean of a long run: ordinary steps and those that look are timed apart, and
weighted by how often each comes. The peak is that of a step that looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import basis
from basis.linear import SketchedLinear
from bench.timing import interleaved, machine
from harness import activations, memory
from harness.activations import ActivationsOptions
from harness.device import Runtime
from harness.memory import format_bytes
from harness.optim import OptimOptions, make_optimizer
from models import LanguageModel
from report.tables import Column, Table

_LATE = range(1000, 2000)
"""Steps of a run that is long under way."""


class Step:
    """One alternative: its model and optimiser, and a step that can be called again and again."""

    def __init__(
        self,
        model: LanguageModel,
        kept: ActivationsOptions,
        optim: OptimOptions,
        runtime: Runtime,
        *,
        windows: int,
        plain_loss: bool = False,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """model: with method and activations in place. windows: of block_size tokens, in a step.
        plain_loss: whole logits. around: makes the context in which each forward runs.
        """
        self.runtime = runtime
        self.around = around
        with torch.random.fork_rng():
            tokens = torch.randint(
                model.head.out_features, (windows, model.config.block_size + 1)
            ).to(runtime.device)
        self.model = model.to(runtime.device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.optimizer = make_optimizer(self.model, optim)
        loss: Callable[..., Tensor] = _unfused(self.model) if plain_loss else self.model
        self.loss = loss
        self.compiled = loss
        if runtime.compile:
            self.compiled = activations.compiled(_with_own_graphs(loss), kept)
        self.count = 0
        self.share = sum(map(self.looks, _LATE)) / len(_LATE)
        self.looking = self.share == 1.0

    def looks(self, step: int) -> bool:
        """Whether a layer's estimator learns at this step."""
        layers = (module for module in self.model.modules() if isinstance(module, SketchedLinear))
        learners = (layer.estimator for layer in layers if layer.state)
        return any(estimator.learns_at(step) for estimator in learners)

    def seek(self, *, looking: bool) -> None:
        """From here on all steps are like this, as far as there are any; past the first ones, which
        look more often.
        """
        self.looking = looking if 0.0 < self.share < 1.0 else self.share == 1.0
        self.count = max(self.count, _LATE.start)

    def forward(self, run: Callable[..., Tensor] | None = None) -> Tensor:
        """The loss, with graph."""
        while self.count >= _LATE.start and self.looks(self.count) != self.looking:
            self.count += 1
        basis.set_noise_key(self.model, seed=0, step=self.count)
        with self.around():
            return self.runtime.forward(run or self.compiled, self.inputs, self.targets)

    def __call__(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1

    def peak(self) -> int | None:
        """Most bytes beyond parameters, gradients and optimiser state."""
        fixed = 2 * memory.tensor_bytes(self.model.parameters()) + memory.optimizer_bytes(
            self.optimizer
        )
        if self.runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            gradients = memory.tensor_bytes(self.model.parameters())
            return torch.cuda.max_memory_allocated() - before - gradients
        if self.runtime.compile:
            return None
        run = self.loss
        peak = memory.cpu_peak_bytes(
            self.model, self.optimizer, lambda _: self.forward(run).backward()
        )
        self.optimizer.zero_grad(set_to_none=True)
        return peak - fixed


def _with_own_graphs(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` as a function that has no graph yet.

    Graphs belong to a function's code, and torch.compile does not see that another alternative of
    the same code was compiled with other settings, a memory budget say: it would take its graph.
    """

    def run(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss(inputs, targets)

    run.__code__ = run.__code__.replace()  # a copy
    return run


def _unfused(model: LanguageModel) -> Callable[..., Tensor]:
    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())

    return loss


def measure(
    steps: Mapping[str, Step], *, turns: int, progress: bool = True
) -> list[dict[str, Any]]:
    """A row per step; the first one is what the others are compared with."""
    runtime = next(iter(steps.values())).runtime
    for step in steps.values():
        step()  # the first look
        step.seek(looking=False)
    timings = interleaved(steps, turns=turns, synchronize=runtime.synchronize, progress=progress)
    sometimes = {name: step for name, step in steps.items() if 0.0 < step.share < 1.0}
    for step in sometimes.values():
        step.seek(looking=True)
    few = max(turns // 3, 2)
    looks = interleaved(
        sometimes, turns=few, warm_up=1, synchronize=runtime.synchronize, progress=progress
    )
    rows = []
    baseline = next(iter(timings.values())).median
    for name, timing in timings.items():
        step = steps[name]
        mean = timing.median + (
            step.share * (looks[name].median - timing.median) if name in looks else 0.0
        )
        kept = memory.saved_bytes_total(step.model, step.forward)
        step.optimizer.zero_grad(set_to_none=True)
        peak = step.peak()
        tokens = step.inputs.numel()
        rows.append(
            {
                "step": name,
                "tokens": tokens,
                "milliseconds": 1e3 * mean,
                "quartiles": f"{1e3 * timing.low:.0f} to {1e3 * timing.high:.0f}",
                "look": 1e3 * looks[name].median if name in looks else None,
                "share": step.share,
                "ratio": mean / baseline,
                "rate": round(tokens / mean),
                "kept": format_bytes(kept),
                "peak": None if peak is None else format_bytes(peak),
                "peak_bytes": peak,
                "precision": runtime.precision,
                "compile": "yes" if runtime.compile else "no",
            }
            | machine()
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows with headings and units."""
    columns = {
        "step": Column("method, activations"),
        "tokens": Column("tokens a step"),
        "milliseconds": Column("step, ms", digits=0),
        "quartiles": Column("quartiles without looks, ms"),
        "look": Column("a step that looks, ms", digits=0),
        "share": Column("share of steps that look", digits=2),
        "ratio": Column("of the first row", digits=2),
        "rate": Column("tokens/s"),
        "kept": Column("kept for backward"),
        "peak": Column("peak beyond parameters, gradients, optimiser"),
    }
    columns["failed"] = Column("failed")
    columns |= {
        name: Column(name) for name in ("precision", "compile", "machine", "torch", "commit")
    }
    columns["peak_bytes"] = Column("peak, bytes", data=True)
    columns["config"] = Column("options of method and activations", data=True)
    return Table("step", "A training step", columns, rows)
