"""The GPU's tables in one command, with torch and numpy alone: a layer, the loss head, and GPT-2's
whole training step.

    # gpt2, bfloat16, compiled, contexts 1,024 and 8,192
    python -m scripts.bench_gpu --out results/speed/h100
    python -m scripts.bench_gpu --out gpu --parts step --contexts 1024 --no-compile --seconds 300
    # the same on a CPU in seconds, to see that it runs
    python -m scripts.bench_gpu --out cpu --size tiny --device cpu

Written for a machine that is borrowed for minutes: neither Hydra nor any other package of the
harness is imported, each table is written as soon as it has a new row (CSV and Markdown in --out),
and what does not fit into --seconds is left out and named. A step is forward, the fused loss head,
backward and AdamW, at 8,192 tokens in windows of the context. Each alternative takes turns with
exact, plain in one process, so its ratio is free of the clock's drift; all of them sketch every
dense layer.

Exit codes: 0 everything measured, 1 something left out for lack of time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import basis
from bench import bench_head, bench_layer
from bench.step import Step, measure
from bench.step import table as step_table
from harness import activations
from harness.activations import ActivationsOptions
from harness.device import Runtime, resolve
from harness.optim import OptimOptions
from models import GPT, GPTConfig

PARTS = ("step", "layer", "head")
ALTERNATIVES: dict[
    str, tuple[int | None, ActivationsOptions]
] = {  # R, None for exact; what else is kept
    "basis R=64, lean": (64, ActivationsOptions(name="lean")),
    "basis R=64, plain": (64, ActivationsOptions()),
    "exact, checkpoint": (None, ActivationsOptions(name="checkpoint")),
    "exact, lean": (None, ActivationsOptions(name="lean")),
    "basis R=512, plain": (512, ActivationsOptions()),
    "basis R=64, checkpoint": (64, ActivationsOptions(name="checkpoint")),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured: the model (its block_size is the context), tokens of a step, and B, N, M, V
    of layer and head.
    """

    model: GPTConfig
    tokens: int
    rows: int
    classes: int


SIZES = {
    "gpt2": Size(
        GPTConfig(
            50304,
            n_layer=12,
            n_head=12,
            n_embd=768,
            layer_norm_eps=1e-5,
            tie_head=True,
            init="gpt2",
        ),
        8192,
        8192,
        50257,
    ),
    "tiny": Size(GPTConfig(97, n_layer=1, n_head=2, n_embd=32), 64, 64, 97),
}


def make_step(size: Size, context: int, name: str, runtime: Runtime) -> Step:
    """The training step of an alternative ("exact, plain" or one of ALTERNATIVES)."""
    rank, kept = ALTERNATIVES.get(name, (None, ActivationsOptions()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(size.model, block_size=context))
    if rank is not None:
        basis.convert(model, basis.BalancedSketch(rank), include=["*"])
    activations.apply(model, kept)
    return Step(
        model,
        kept,
        OptimOptions(name="adamw", lr=6e-4),
        runtime,
        windows=max(size.tokens // context, 1),
    )


class Clock:
    """Time that is left, and what was left out for lack of it."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.longest = 0.0
        self.left_out: list[str] = []

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`, unless what is left is less than the longest piece so far took."""
        start = time.perf_counter()
        if start + self.longest > self.end:
            self.left_out.append(name)
            return
        work()
        self.longest = max(self.longest, time.perf_counter() - start)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def measure_steps(
    size: Size, contexts: list[int], runtime: Runtime, clock: Clock, *, turns: int, out: Path
) -> None:
    """Tables step.csv and step.md, a pair of rows more for each alternative."""
    rows: list[dict[str, Any]] = []
    for context in contexts:
        exact: list[Step] = []

        def pair(name: str, context: int = context, exact: list[Step] = exact) -> None:
            if not exact:
                exact.append(make_step(size, context, "exact, plain", runtime))
            steps = {"exact, plain": exact[0], name: make_step(size, context, name, runtime)}
            labelled = {f"{title}, context {context:,}": step for title, step in steps.items()}
            rows.extend(measure(labelled, turns=turns, progress=False))
            step_table(rows).write(out / "step.csv")

        for name in ALTERNATIVES:
            clock.run(f"step, context {context:,}, {name}", partial(pair, name))
        torch._dynamo.reset()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=sorted(SIZES), default="gpt2")
    parser.add_argument("--contexts", type=int, nargs="+", help="default: 1024 8192; of tiny: 64")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="eager steps and layers; a CPU is always eager here",
    )
    parser.add_argument(
        "--turns", type=int, default=20, help="timed turns of each alternative (default: 20)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=540,
        help="no new piece is begun that would end later (default: 540)",
    )
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    contexts = options.contexts or ([64] if options.size == "tiny" else [1024, 8192])
    if min(contexts) < 1 or options.turns < 2:
        parser.error("--contexts must be at least 1, --turns at least 2")
    try:
        compile = options.device != "cpu" and not options.no_compile
        runtime = resolve(options.device, options.precision, compile)
    except ValueError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 1
    clock = Clock(options.seconds)
    width, turns = size.model.n_embd, options.turns

    def layer() -> None:
        sizes = (
            size.rows,
            width,
            4 * width,
            [64, 512] if size.rows > 512 else [8],
            options.precision,
        )
        lines = bench_layer.measure(
            *sizes, turns=turns, device=options.device, compile=compile, progress=False
        )
        bench_layer.table(lines).write(options.out / "layer.csv")

    def head() -> None:
        sizes = (size.rows, width, size.classes, [64], options.precision)
        lines = bench_head.measure(*sizes, turns=turns, device=options.device, progress=False)
        bench_head.table(lines).write(options.out / "head.csv")

    for part in options.parts:
        if part == "step":
            measure_steps(size, contexts, runtime, clock, turns=turns, out=options.out)
        else:
            clock.run(part, layer if part == "layer" else head)
    for name in clock.left_out:
        print(f"left out for lack of time: {name}", file=sys.stderr)
    return 1 if clock.left_out else 0
