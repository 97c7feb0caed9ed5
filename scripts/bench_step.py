"""A whole training step: time, tokens per second, kept bytes and peak for each method and activations, in turns.

    python scripts/bench_step.py                                   # 4 blocks, 768 wide, 4 x 1,024 tokens, vocabulary 50,257, R 64
    python scripts/bench_step.py model=gpt2 micro_batch_size=8 precision=bfloat16 compile=true --turns 20 --csv step.csv
    python scripts/bench_step.py --methods exact basis --activations plain lean checkpoint --turns 5

Overrides are those of train.py, on top of the size above; the methods besides exact sketch all dense layers and the head. A step
is forward, the same loss head for all, backward and the optimiser. Alternatives take turns in one process, a ratio is of medians.
The peak is counted tensor by tensor on a CPU, measured on CUDA. With --nanogpt also the same model with plain layers, whole
logits and F.cross_entropy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import basis
from harness import activations, memory
from harness.benchmark import interleaved, machine
from harness.build import build_model
from harness.config import Config
from harness.device import Runtime, resolve
from harness.files import write_atomic
from harness.memory import format_bytes
from harness.optim import make_optimizer
from harness.report.tables import Column, Table
from models import GPT
from scripts.plan_memory import configurations

SIZE = ["model=gpt2", "model.n_layer=4", "micro_batch_size=4", "optim=sgd"]
NANOGPT = "nanogpt"


class Step:
    """One alternative: its model and optimiser, and a step that can be called again and again."""

    def __init__(self, config: Config, runtime: Runtime, *, plain_loss: bool = False) -> None:
        self.config, self.runtime = config, runtime
        with torch.random.fork_rng():
            self.model, _ = build_model(config)
            shape = (config.micro_batch_size, config.model.block_size + 1)
            tokens = torch.randint(config.model.vocab_size or 1, shape).to(runtime.device)
        self.model.to(runtime.device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.optimizer = make_optimizer(self.model, config.optim)
        loss: Callable[..., Tensor] = _unfused(self.model) if plain_loss else self.model
        self.loss = loss
        self.compiled = activations.compiled(self.model, config.activations) if runtime.compile and not plain_loss else loss
        self.count = 0

    def forward(self, run: Callable[..., Tensor] | None = None) -> Tensor:
        """The loss, with graph."""
        basis.set_noise_key(self.model, seed=0, step=self.count)
        with self.runtime.autocast():
            return (run or self.compiled)(self.inputs, self.targets)

    def __call__(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1

    def peak(self) -> int | None:
        """Most bytes beyond parameters, gradients and optimiser state."""
        fixed = 2 * memory.tensor_bytes(self.model.parameters()) + memory.optimizer_bytes(self.optimizer)
        if self.runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            gradients = memory.tensor_bytes(self.model.parameters())
            return torch.cuda.max_memory_allocated() - before - gradients
        if self.runtime.compile:
            return None
        run = self.loss
        peak = memory.cpu_peak_bytes(self.model, self.optimizer, lambda _: self.forward(run).backward())
        self.optimizer.zero_grad(set_to_none=True)
        return peak - fixed


def _unfused(model: GPT) -> Callable[..., Tensor]:
    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())

    return loss


def measure(configs: dict[str, Config], *, turns: int, progress: bool = True) -> list[dict[str, Any]]:
    """A row per configuration; the first one is what the others are compared with."""
    first = next(iter(configs.values()))
    runtime = resolve(first.device, first.precision, first.compile)
    steps = {name: Step(config, runtime, plain_loss=name == NANOGPT) for name, config in configs.items()}
    timings = interleaved(steps, turns=turns, synchronize=runtime.synchronize, progress=progress)
    rows = []
    baseline = timings[next(iter(configs))].median
    for name, timing in timings.items():
        step = steps[name]
        kept = memory.saved_bytes_compiled(step.model, step.forward)
        step.optimizer.zero_grad(set_to_none=True)
        peak = step.peak()
        tokens = step.inputs.numel()
        rows.append(
            {
                "step": name,
                "tokens": tokens,
                "milliseconds": 1e3 * timing.median,
                "quartiles": f"{1e3 * timing.low:.0f} to {1e3 * timing.high:.0f}",
                "ratio": timing.median / baseline,
                "rate": round(tokens / timing.median),
                "kept": format_bytes(kept),
                "peak": None if peak is None else format_bytes(peak),
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
        "quartiles": Column("quartiles, ms"),
        "ratio": Column("of the first row", digits=2),
        "rate": Column("tokens/s"),
        "kept": Column("kept for backward"),
        "peak": Column("peak beyond parameters, gradients, optimiser"),
    }
    columns |= {name: Column(name) for name in ("precision", "compile", "machine", "torch", "commit")}
    return Table("step", "A training step", columns, rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--methods", nargs="+", default=["exact", "basis"])
    parser.add_argument("--activations", nargs="+", default=["plain", "lean"])
    parser.add_argument("--rank", type=int, default=64, help="R of the methods that have one (default: 64)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each alternative (default: 5)")
    parser.add_argument("--nanogpt", action="store_true", help="also plain layers, whole logits and F.cross_entropy")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    options = parser.parse_intermixed_args(argv)
    if options.turns < 2 or options.rank < 1:
        parser.error("--turns must be at least 2, --rank at least 1")
    try:
        configs: dict[str, Config] = {}
        for method in options.methods:
            rank = [f"method.rank={options.rank}"] if method == "basis" else []
            found = configurations([*SIZE, *rank, *options.overrides], [method], options.activations)
            configs |= {f"{name}, {kind}": config for (name, kind), config in found.items()}
        if options.nanogpt:
            configs[NANOGPT] = configurations([*SIZE, *options.overrides], ["exact"], ["plain"])["exact", "plain"]
        rows = measure(configs, turns=options.turns)
    except ValueError as error:
        print(f"bench_step: {error}", file=sys.stderr)
        return 1
    result = table(rows)
    print(result.markdown())
    if options.csv:
        write_atomic(options.csv, result.csv())
    return 0


if __name__ == "__main__":
    sys.exit(main())
