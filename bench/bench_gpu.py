"""The GPU's tables in one command, with torch and numpy alone: a layer, the loss head, and GPT-2's
whole training step.

    # gpt2, bfloat16, compiled, contexts 1,024 and 8,192
    python -m scripts.bench_gpu --out results/speed/h100
    python -m scripts.bench_gpu --out gpu --parts step --contexts 1024 --no-compile --seconds 300
    # the same on a CPU in seconds, to see that it runs
    python -m scripts.bench_gpu --out cpu --size tiny --device cpu

Written for a machine that is borrowed for minutes: neither Hydra nor any other package of the
harness is imported, each table is written as soon as it has a new row (CSV and Markdown in --out),
and what does not fit into --seconds is left out and named. A step is forward, loss, backward and
AdamW, at 8,192 tokens in windows of the context. Each alternative takes turns with exact
backpropagation from whole logits, as nanoGPT trains, in one process, so its ratio is free of the
clock's drift. All methods are put into every dense layer, and all but the first row form logits and
loss in the fused head.

An alternative that fails, out of memory or at compilation, is a row that says so, and the others
are measured.

Exit codes: 0 everything measured, 1 something failed or was left out for lack of time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import basis
from basis.estimator import Estimator
from bench import bench_head, bench_layer
from bench.step import Step, measure
from bench.step import table as step_table
from harness import activations
from harness.activations import ActivationsOptions
from harness.device import Runtime, resolve
from harness.optim import OptimOptions
from models import GPT, GPTConfig

PARTS = ("step", "layer", "head")
BASELINE = "exact, whole logits"
PLAIN, LEAN = ActivationsOptions(), ActivationsOptions(name="lean")
CHECKPOINT = ActivationsOptions(name="checkpoint")


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A row of the table of steps: the method of every dense layer (None: exact), what else is
    kept, and whether whole logits are formed.
    """

    method: Estimator | None = None
    kept: ActivationsOptions = PLAIN
    plain_loss: bool = False


ALTERNATIVES = {  # in the order in which time is given to them
    "exact, plain": Alternative(),
    "exact, checkpoint": Alternative(kept=CHECKPOINT),
    "basis R=64, plain": Alternative(basis.BalancedSketch(64)),
    "basis R=64, lean": Alternative(basis.BalancedSketch(64), LEAN),
    "exact, lean": Alternative(kept=LEAN),
    "exact, checkpoint, selective": Alternative(
        kept=ActivationsOptions(name="checkpoint", selective=True)
    ),
    "quantized 3.75 bits, plain": Alternative(basis.Quantized(3.75)),
    "transform 4 bits, plain": Alternative(basis.Transform(4.0)),
    "basis R=64, checkpoint": Alternative(basis.BalancedSketch(64), CHECKPOINT),
    "basis R=512, plain": Alternative(basis.BalancedSketch(512)),
    "exact, checkpoint, whole logits": Alternative(kept=CHECKPOINT, plain_loss=True),
}
COMPILED = {  # torch.compile decides what is computed again
    f"exact, memory budget {share:g}": Alternative(
        kept=ActivationsOptions(name="budget", budget=share)
    )
    for share in (0.5, 0.25, 0.75)
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


def make_step(size: Size, context: int, alternative: Alternative, runtime: Runtime) -> Step:
    """The training step of an alternative."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(size.model, block_size=context))
    if alternative.method is not None:
        basis.convert(model, alternative.method, include=["*"])
    activations.apply(model, alternative.kept)
    return Step(
        model,
        alternative.kept,
        OptimOptions(name="adamw", lr=6e-4),
        runtime,
        windows=max(size.tokens // context, 1),
        plain_loss=alternative.plain_loss,
    )


class Clock:
    """Time that is left, what was left out for lack of it, and what failed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.longest = 0.0
        self.left_out: list[str] = []
        self.failed: list[str] = []

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
    """Tables step.csv and step.md, rewritten after each alternative: its row, after one of the
    baseline that was timed in turns with it. Of a baseline that fails there is one row, and the
    alternatives are timed alone.
    """
    rows: list[dict[str, Any]] = []
    alternatives = ALTERNATIVES | (COMPILED if runtime.compile else {})
    for context in contexts:
        where = f"context {context:,}"
        baseline: list[Step] = []

        def timed(steps: dict[str, Step]) -> list[dict[str, Any]]:
            return measure(steps, turns=turns, progress=False)

        def begin(context: int = context, where: str = where, base: list[Step] = baseline) -> None:
            step = make_step(size, context, Alternative(plain_loss=True), runtime)
            timed({f"{BASELINE}, {where}": step})
            base.append(step)

        def work(
            name: str, context: int = context, where: str = where, base: list[Step] = baseline
        ) -> None:
            steps = {f"{name}, {where}": make_step(size, context, alternatives[name], runtime)}
            if base:
                rows.extend(timed({f"{BASELINE}, {where}": base[0]} | steps))
            else:  # nothing to compare with
                rows.extend({**row, "ratio": None} for row in timed(steps))

        for name in (BASELINE, *alternatives):
            title = f"{name}, {where}"
            try:
                clock.run(title, begin if name == BASELINE else partial(work, name))
            except RuntimeError as error:  # out of memory and what a compiler raises are such
                clock.failed.append(title)
                reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
                rows.append({"step": title, "failed": f"{type(error).__name__}: {reason}"})
                torch._dynamo.reset()
            gc.collect()  # what a traceback or a graph still holds of the last model
            if runtime.device.type == "cuda":
                torch.cuda.empty_cache()
            step_table(rows).write(out / "step.csv")
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
    for name in clock.failed:
        print(f"failed: {name}, see {options.out / 'step.md'}", file=sys.stderr)
    return 1 if clock.left_out or clock.failed else 0
