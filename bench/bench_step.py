"""A whole training step: time, tokens per second, kept bytes and peak for each method and
activations, in turns.

    python scripts/bench_step.py  # 4 blocks, 768 wide, 4 x 1,024 tokens, vocabulary 50,257, R 64
    python scripts/bench_step.py model=gpt2 micro_batch_size=8 precision=bfloat16 \\
        compile=true --turns 20 --csv step.csv
    python scripts/bench_step.py --methods exact "basis rank=32" "transform budget=1/8" \\
        --activations plain lean checkpoint

Overrides are those of train.py, on top of the size above; the methods besides exact sketch all
dense layers and the head. A step is forward, the same loss head for all, backward and the
optimiser. Alternatives take turns in one process, a ratio is of medians. The peak is counted tensor
by tensor on a CPU, measured on CUDA. With --nanogpt also the same model with plain layers, whole
logits and F.cross_entropy.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from bench.output import csv_option, show
from bench.plan_memory import configurations
from bench.step import Step, measure, table
from harness.build import build_model
from harness.config import Config
from harness.device import Runtime, resolve

SIZE = ["model=gpt2", "model.n_layer=4", "micro_batch_size=4", "optim=sgd"]
NANOGPT = "nanogpt"


def make_step(config: Config, runtime: Runtime, *, plain_loss: bool) -> Step:
    """The step of a configuration."""
    with torch.random.fork_rng():
        model, _ = build_model(config)
    return Step(
        model,
        config.activations,
        config.optim,
        runtime,
        windows=config.micro_batch_size,
        plain_loss=plain_loss,
    )


def step_options(config: Config) -> dict[str, Any]:
    """The options of the method and of the activations' kind, by dotted name."""
    return {
        name: value
        for name, value in config.flat().items()
        if name.startswith("method.") or name == "activations.name"
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["exact", "basis"],
        help='"name option=value ..." each; default: exact basis',
    )
    parser.add_argument("--activations", nargs="+", default=["plain", "lean"])
    parser.add_argument(
        "--rank", type=int, default=64, help="R of the methods that have one (default: 64)"
    )
    parser.add_argument(
        "--turns", type=int, default=5, help="timed turns of each alternative (default: 5)"
    )
    parser.add_argument(
        "--nanogpt", action="store_true", help="also plain layers, whole logits and F.cross_entropy"
    )
    csv_option(parser)
    options = parser.parse_intermixed_args(argv)
    if options.turns < 2 or options.rank < 1:
        parser.error("--turns must be at least 2, --rank at least 1")
    try:
        configs: dict[str, Config] = {}
        for method in options.methods:
            rank = (
                [f"method.rank={options.rank}"]
                if method.split()[0] == "basis" and "rank=" not in method
                else []
            )
            found = configurations(
                [*SIZE, *rank, *options.overrides], [method], options.activations
            )
            configs |= {f"{name}, {kind}": config for (name, kind), config in found.items()}
        if options.nanogpt:
            configs[NANOGPT] = configurations([*SIZE, *options.overrides], ["exact"], ["plain"])[
                "exact", "plain"
            ]
        first = next(iter(configs.values()))
        runtime = resolve(first.device, first.precision, first.compile)
        steps = {
            name: make_step(config, runtime, plain_loss=name == NANOGPT)
            for name, config in configs.items()
        }
        rows = measure(steps, turns=options.turns)
        for row in rows:
            # By this column eval.py finds the runs that take this step; none takes nanoGPT's.
            if row["step"] != NANOGPT:
                row["config"] = json.dumps(step_options(configs[row["step"]]))
    except ValueError as error:
        print(f"bench_step: {error}", file=sys.stderr)
        return 1
    show(table(rows), options.csv)
    return 0
