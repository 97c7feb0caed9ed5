"""Plan a run that does not fit this machine: bytes by category and peak for each method and
activations, on fake tensors.

    python scripts/plan_memory.py model=gpt2_xl model.block_size=32768 \\
        precision=bfloat16 optim=adamw
    python scripts/plan_memory.py model=gpt2 --methods exact basis \\
        --activations plain lean checkpoint --memory 24 80
    # one of 64 processes
    python scripts/plan_memory.py model=gpt2_xl parallel=fsdp world_size=64
    # bytes against context
    python scripts/plan_memory.py model=gpt2 --memory 24 80 --figure runs/gpt2_bytes

Overrides are those of train.py. With --memory (GiB) the longest context at the given micro-batch
and the largest micro-batch at the given context that fit are searched for; the figure shows the
former and bytes against context up to 131,072 tokens. What is counted and what is not stands in
bench/memory_plan.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import memory_plan as planning
from bench.output import csv_option, show
from data.tokenizers import GPT2Tokenizer
from harness.compose import configuration
from harness.config import Config
from harness.memory import CATEGORIES, format_bytes
from models.hf_config import most_tokens
from report.figures import pyplot, save
from report.tables import Column, Table

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_TOKENS = 1 << 22  # in a micro-batch
FIGURE_CONTEXTS = tuple(1024 << i for i in range(8))


def configurations(
    overrides: list[str], methods: list[str], kinds: list[str]
) -> dict[tuple[str, str], Config]:
    """The typed configuration of each method with each activations; without model.vocab_size the
    vocabulary is the tokenizer's.

    methods: a name and, behind blanks, options of it, as in "transform budget=1/24". Raises
    ValueError for options that can't be, and where only the text would tell the vocabulary.
    """
    if lost := [word for word in (*methods, *kinds) if "=" in word.split()[0]]:
        raise ValueError(
            f"{lost[0]} stands where a method or activations would; give overrides before the "
            "options"
        )
    found = {}
    for method in methods:
        name, *options = method.split()
        scope = [] if name == "exact" else ["method.include=['*']"]
        words = [f"method={name}", *scope, *(f"method.{option}" for option in options)]
        for kind in kinds:
            config = configuration([*words, f"activations={kind}", *overrides], weights=False)
            if config.model.vocab_size is None and config.data.tokenizer != "gpt2":
                raise ValueError(
                    f"model.vocab_size=null: with data.tokenizer={config.data.tokenizer} it "
                    "depends on the text, and the largest part of what is kept on it; give a "
                    "number, such as 65 for Tiny Shakespeare"
                )
            found[method, kind] = config.resolved(GPT2Tokenizer.vocab_size)
    return found


def most_context(config: Config) -> int:
    """The longest context that is looked at, in tokens."""
    most = MOST_TOKENS // config.micro_batch_size
    known = most_tokens(config.model) if config.model.family == "hf" else None
    return most if known is None else min(most, known)


def row(
    method: str, kind: str, config: Config, budgets: list[float], peak: Callable[[int], int]
) -> dict[str, Any]:
    """One line of the table. budgets: GiB; peak: bytes by context."""
    plan = planning.plan(config)
    line: dict[str, Any] = {"method": method, "kind": kind}
    line |= {name: format_bytes(size) for name, size in plan.kept.items() if size}
    line |= {
        "kept": format_bytes(sum(plan.kept.values())),
        "fixed": format_bytes(plan.parameters + plan.gradients + plan.optimizer),
        "beyond": format_bytes(plan.beyond),
        "peak": format_bytes(plan.peak),
    }
    most = MOST_TOKENS // config.model.block_size
    by_batch = planning.peaks(config, "micro_batch_size", most)
    limit = most_context(config)
    unit = min(256, limit)
    for budget in budgets:
        line[f"context_{budget:g}"] = planning.largest(peak, budget * 2**30, unit=unit, limit=limit)
        line[f"batch_{budget:g}"] = planning.largest(by_batch, budget * 2**30, unit=1, limit=most)
    return line


def table(lines: list[dict[str, Any]], config: Config, budgets: list[float]) -> Table:
    """The lines with headings; categories in the order in which they are counted."""
    columns = {"method": Column("method"), "kind": Column("activations")}
    columns |= {name: Column(name) for name in CATEGORIES if any(name in line for line in lines)}
    columns |= {
        "kept": Column("kept in all"),
        "fixed": Column("parameters, gradients, optimiser"),
        "beyond": Column("peak beyond these"),
        "peak": Column("peak"),
    }
    for budget in budgets:
        columns[f"context_{budget:g}"] = Column(f"longest context in {budget:g} GiB")
        columns[f"batch_{budget:g}"] = Column(f"largest micro-batch in {budget:g} GiB")
    tokens = f"{config.micro_batch_size} x {config.model.block_size:,} tokens"
    size = f"{tokens}, vocabulary {config.model.vocab_size:,}"
    size += f", {config.precision}, {config.optim.name}"
    notes = [
        f"Micro-batch of {size}. Categories: kept between forward and backward. Fake tensors: "
        "nothing was allocated."
    ]
    if budgets:
        notes.append(
            "Context (in steps of 256) and micro-batch: the largest whose peak fits, the other as "
            f"given; not looked for beyond {MOST_TOKENS:,} tokens in all, nor beyond what the "
            "model can take. 0: not even the smallest fits."
        )
    return Table("plan", "Memory of a training step", columns, lines, notes)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def draw(
    lines: list[dict[str, Any]],
    peaks: dict[tuple[str, str], Callable[[int], int]],
    budgets: list[float],
    path: Path,
    longest: int,
) -> Path:
    """Peak against context, a line per method and activations; with budgets, beside it the longest
    context that fits each.
    """
    with pyplot() as plt:
        panels = 2 if budgets else 1
        figure, grid = plt.subplots(
            1, panels, figsize=(7 if panels == 1 else 12.5, 5), layout="constrained", squeeze=False
        )
        axes = grid[0, 0]
        kinds = list(dict.fromkeys(kind for _, kind in peaks))
        methods = list(dict.fromkeys(method for method, _ in peaks))
        ends = []
        contexts = [n for n in FIGURE_CONTEXTS if n <= longest] or [longest]
        for (method, kind), peak in tqdm(peaks.items(), desc="lines", leave=False):
            sizes = [peak(length) / 2**30 for length in contexts]
            colour = f"C{methods.index(method)}"
            style = ("-", "--", ":", "-.")[kinds.index(kind) % 4]
            axes.loglog(contexts, sizes, linestyle=style, color=colour, linewidth=1.8)
            ends.append((sizes[-1], f"{method}, {kind}  {sizes[-1]:.0f} GiB", colour))
        lowest = 0.0
        for size, label, colour in sorted(
            ends
        ):  # labels at the lines' ends, moved up where they would lie on each other
            lowest = max(size, lowest * 1.13)
            axes.text(contexts[-1] * 1.08, lowest, label, color=colour, va="center", fontsize=9)
        for budget in budgets:
            axes.axhline(budget, color="grey", linewidth=0.8)
            axes.text(
                contexts[0],
                budget * 1.02,
                f"{budget:g} GiB",
                color="grey",
                va="bottom",
                fontsize=9,
            )
        axes.set_xlim(
            contexts[0] * 0.9, contexts[-1] * (9 if budgets else 5)
        )  # room for the labels
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("peak of a step (GiB)")
        axes.set_xticks(contexts, [_short(length) for length in contexts], minor=False)
        axes.minorticks_off()
        powers = [2**i for i in range(11) if axes.get_ylim()[0] <= 2**i <= axes.get_ylim()[1]]
        axes.set_yticks(powers, [str(power) for power in powers])
        axes.grid(alpha=0.3)
        if budgets:
            bars = grid[0, 1]
            names = [f"{line['method']}, {line['kind']}" for line in lines]
            height = 0.8 / len(budgets)
            for number, budget in enumerate(budgets):
                lengths = [line[f"context_{budget:g}"] for line in lines]
                places = [i + (number - (len(budgets) - 1) / 2) * height for i in range(len(lines))]
                colours = [f"C{methods.index(line['method'])}" for line in lines]
                bars.barh(
                    places,
                    lengths,
                    height * 0.92,
                    color=colours,
                    alpha=0.45 + 0.5 * number / max(len(budgets) - 1, 1),
                )
                for place, length in zip(places, lengths, strict=True):
                    bars.text(
                        max(length, 1),
                        place,
                        f"  {length:,} in {budget:g} GiB",
                        va="center",
                        fontsize=9,
                    )
            bars.set_yticks(range(len(names)), names)
            bars.invert_yaxis()
            bars.set_xlim(
                0,
                1.4 * max(max(line[f"context_{budget:g}"] for line in lines) for budget in budgets)
                + 1,
            )
            bars.set_xlabel("longest context that fits (tokens)")
            bars.xaxis.set_major_formatter("{x:,.0f}")
            bars.locator_params(axis="x", nbins=5)
            bars.spines[["top", "right"]].set_visible(False)
        save(figure, path)
        plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["exact", "basis"],
        help='"name option=value ..." each; default: exact basis (all dense layers)',
    )
    parser.add_argument(
        "--activations",
        nargs="+",
        default=["plain", "lean", "checkpoint"],
        help="default: plain lean checkpoint",
    )
    parser.add_argument(
        "--memory",
        type=float,
        nargs="+",
        default=[],
        help="GiB that a step may take; several are several answers",
    )
    csv_option(parser)
    parser.add_argument(
        "--figure",
        type=Path,
        help="also draw bytes against context, to this path with .svg",
    )
    options = parser.parse_intermixed_args(argv)
    if any(budget <= 0 for budget in options.memory):
        parser.error("--memory must be positive")
    try:
        configs = configurations(options.overrides, options.methods, options.activations)
        peaks = {
            key: planning.peaks(config, "block_size", most_context(config))
            for key, config in configs.items()
        }
        lines = [
            row(method, kind, config, options.memory, peaks[method, kind])
            for (method, kind), config in tqdm(configs.items(), leave=False)
        ]
    except ValueError as error:
        print(f"plan_memory: {error}", file=sys.stderr)
        return 1
    show(table(lines, next(iter(configs.values())), options.memory), options.csv)
    if options.figure:
        path = options.figure.with_suffix(".svg")
        longest = most_context(next(iter(configs.values())))
        print("Written:", draw(lines, peaks, options.memory, path, longest))
    return 0
