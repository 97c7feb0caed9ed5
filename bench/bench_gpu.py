"""The GPU's tables in one command, with torch and numpy alone: GPT-2's whole training step, dense
layers, and the loss head.

    # gpt2, bfloat16, compiled, contexts 1,024 and 8,192
    python -m scripts.bench_gpu --out results/speed/h100
    python -m scripts.bench_gpu --out gpu --parts step --contexts 1024 --no-compile --seconds 300
    # the same on a CPU in seconds, to see that it runs
    python -m scripts.bench_gpu --out cpu --size tiny --device cpu

Written for a machine that is borrowed for minutes: neither Hydra nor any other package of the
harness is imported, each table is written as soon as it has a new row (CSV and Markdown in --out),
and what does not fit into --seconds is left out and named. What matters most comes first: steps at
the first context, in the order of bench/alternatives.py, then layers, the head, and steps at the
other contexts.

A step is forward, loss, backward and AdamW, at 16,384 tokens in windows of the context. Each
alternative takes turns with exact backpropagation from whole logits, as nanoGPT trains, in one
process, so its ratio is free of the clock's drift. All methods are put into every dense layer if
the row does not say otherwise, and all rows that do not say "whole logits" form logits and loss in
the fused head.

An alternative that fails, out of memory or at compilation, is a row that says so, and the others
are measured. Where matplotlib is installed, frontier.svg shows time against peak
(bench/frontier.py).

Exit codes: 0 everything measured, 1 something failed or was left out for lack of time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
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
from bench.alternatives import ALTERNATIVES, Alternative
from bench.step import Step, measure
from bench.step import table as step_table
from harness import activations
from harness.device import Runtime, resolve
from harness.optim import OptimOptions
from models import GPT, GPTConfig

PARTS = ("step", "layer", "head")
BASELINE = "exact, whole logits"


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured: the model (its block_size is the context), tokens of a step, classes of the
    head, and B, N, M of each layer.
    """

    model: GPTConfig
    tokens: int
    classes: int
    layers: tuple[tuple[int, int, int], ...]
    ranks: tuple[int, ...]


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
        16384,
        50257,
        ((16384, 2048, 8192), (65536, 4096, 16384), (8192, 768, 3072)),
        (64, 512),
    ),
    "tiny": Size(
        GPTConfig(97, n_layer=1, n_head=2, n_embd=32), 64, 97, ((64, 32, 128), (32, 64, 64)), (8,)
    ),
}
METHODS: dict[str, Estimator] = {
    "transform 4 bits": basis.Transform(4.0),
    "quantized 3.75 bits": basis.Quantized(3.75),
}
"""Of layers, beside BASIS."""


def make_step(size: Size, context: int, alternative: Alternative, runtime: Runtime) -> Step:
    """The training step of an alternative."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(size.model, block_size=context))
    if alternative.method is not None:
        basis.convert(model, alternative.method, include=alternative.include, exact_if_kept=False)
    activations.apply(model, alternative.kept)
    model.to(runtime.device)
    return Step(
        model,
        alternative.kept,
        OptimOptions(name="adamw", lr=6e-4),
        runtime,
        windows=max(size.tokens // context, 1),
        plain_loss=alternative.plain_loss,
        around=alternative.around(model, size.tokens),
    )


class Clock:
    """Time that is left, what was left out for lack of it, and what failed."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.end = time.perf_counter() + seconds
        self.device = device
        self.longest = 0.0
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def run(self, name: str, work: Callable[[], None]) -> str | None:
        """Do `work`, unless what is left is less than the longest piece so far took. Returns why it
        failed, None if it did not.
        """
        start = time.perf_counter()
        if start + self.longest > self.end:
            self.left_out.append(name)
            return None
        why = None
        try:
            work()
        except RuntimeError as error:  # out of memory and what a compiler raises are such
            reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
            why = f"{type(error).__name__}: {reason}"
            self.failed.append(name)
            torch._dynamo.reset()
        gc.collect()  # what a traceback or a graph still holds of the last model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.longest = max(self.longest, time.perf_counter() - start)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return why


@dataclasses.dataclass
class Bench:
    """One call of the program: what is measured and how, and the rows so far."""

    size: Size
    runtime: Runtime
    clock: Clock
    turns: int
    out: Path
    chosen: list[str]
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def measure_steps(self, context: int) -> None:
        """Rows of step.csv and step.md, rewritten after each alternative: its row, after one of the
        baseline that was timed in turns with it. Of a baseline that fails there is one row, and the
        alternatives are timed alone.
        """
        where = f"context {context:,}"
        baseline: dict[str, Step] = {}

        def timed(steps: dict[str, Step]) -> list[dict[str, Any]]:
            return measure(steps, turns=self.turns, progress=False)

        def begin() -> None:
            whole = Alternative(plain_loss=True)
            step = {f"{BASELINE}, {where}": make_step(self.size, context, whole, self.runtime)}
            timed(step)
            baseline.update(step)

        def work(name: str) -> None:
            made = make_step(self.size, context, ALTERNATIVES[name], self.runtime)
            rows = timed(baseline | {f"{name}, {where}": made})
            # without a baseline there is nothing to compare with
            self.steps += rows if baseline else [row | {"ratio": None} for row in rows]

        for name in (BASELINE, *self.chosen):
            title = f"{name}, {where}"
            why = self.clock.run(title, begin if name == BASELINE else partial(work, name))
            if why is not None:
                self.steps.append({"step": title, "failed": why})
            step_table(self.steps).write(self.out / "step.csv")
        torch._dynamo.reset()

    def measure_layers(self) -> None:
        """Rows of layer.csv and layer.md: for each size BASIS, then each other method, in turns
        with exact and the limit.
        """
        for layer in self.size.layers:
            kinds: list[tuple[list[int], dict[str, Estimator]]] = [(list(self.size.ranks), {})]
            kinds += [([], {name: method}) for name, method in METHODS.items()]
            for ranks, others in kinds:

                def work(
                    layer: tuple[int, int, int] = layer,
                    ranks: list[int] = ranks,
                    others: dict[str, Estimator] = others,
                ) -> None:
                    self.lines += bench_layer.measure(
                        *(*layer, ranks, self.runtime.precision),
                        turns=self.turns,
                        device=self.runtime.device.type,
                        compile=self.runtime.compile,
                        progress=False,
                        others=others,
                    )

                name = next(iter(others), "basis")
                rows, width, out = layer
                why = self.clock.run(f"layer {rows:,} x {width:,} x {out:,}, {name}", work)
                if why is not None:
                    sizes = {"B": rows, "N": width, "M": out, "dtype": self.runtime.precision}
                    self.lines.append({"layer": name, "failed": why} | sizes)
                bench_layer.table(self.lines).write(self.out / "layer.csv")

    def measure_head(self) -> None:
        """The table head.csv and head.md."""

        def work() -> None:
            width = self.size.model.n_embd
            sizes = (self.size.tokens, width, self.size.classes, [64], self.runtime.precision)
            device = self.runtime.device.type
            lines = bench_head.measure(*sizes, turns=self.turns, device=device, progress=False)
            bench_head.table(lines).write(self.out / "head.csv")

        self.clock.run("head", work)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=sorted(SIZES), default="gpt2")
    parser.add_argument("--contexts", type=int, nargs="+", help="default: 1024 8192; of tiny: 64")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help=f"steps: some of {'; '.join(ALTERNATIVES)}"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compiled steps and layers (default: on cuda)",
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
    contexts = options.contexts or ([64] if options.size == "tiny" else [1024, 8192])
    if min(contexts) < 1 or options.turns < 2:
        parser.error("--contexts must be at least 1, --turns at least 2")
    compile = options.device != "cpu" if options.compile is None else options.compile
    names = options.rows or [n for n, row in ALTERNATIVES.items() if compile or not row.compiled]
    for name in names:
        if name not in ALTERNATIVES:
            parser.error(f"--rows {name!r}: must be among {'; '.join(ALTERNATIVES)}")
        if ALTERNATIVES[name].compiled and not compile:
            parser.error(f"--rows {name!r}: torch.compile does this; give --compile")
    try:
        runtime = resolve(options.device, options.precision, compile)
    except ValueError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 1
    clock = Clock(options.seconds, runtime.device)
    bench = Bench(SIZES[options.size], runtime, clock, options.turns, options.out, names)
    if "step" in options.parts:
        bench.measure_steps(contexts[0])
    if "layer" in options.parts:
        bench.measure_layers()
    if "head" in options.parts:
        bench.measure_head()
    if "step" in options.parts:
        for context in contexts[1:]:
            bench.measure_steps(context)
        if importlib.util.find_spec("matplotlib") and any(r.get("peak_bytes") for r in bench.steps):
            from bench.frontier import draw

            draw(options.out / "step.csv")
    for name in clock.left_out:
        print(f"left out for lack of time: {name}", file=sys.stderr)
    for name in clock.failed:
        print(f"failed: {name}, see the tables in {options.out}", file=sys.stderr)
    return 1 if clock.left_out or clock.failed else 0
