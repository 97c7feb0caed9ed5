"""Plan a run that does not fit this machine: bytes by category and peak for each method and activations, on fake tensors.

    python scripts/plan_memory.py model=gpt2_xl model.block_size=32768 precision=bfloat16 optim=adamw
    python scripts/plan_memory.py model=gpt2 --methods exact basis --activations plain lean checkpoint --memory 24
    python scripts/plan_memory.py model=gpt2 --figure runs/gpt2_bytes     # bytes against context, to 131,072 tokens

Overrides are those of train.py. With --memory (GiB) the longest context at the given micro-batch and the largest micro-batch at
the given context that fit are searched for. What is counted and what is not stands in harness/planning.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from tqdm import tqdm

from harness import planning
from harness.config import Config, load
from harness.files import write_atomic
from harness.memory import format_bytes
from harness.report.figures import SUFFIXES
from harness.report.tables import Column, Table

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_TOKENS = 1 << 20  # in a micro-batch; beyond, a plan takes minutes
FIGURE_CONTEXTS = tuple(1024 << i for i in range(8))


def configurations(overrides: list[str], methods: list[str], kinds: list[str]) -> dict[tuple[str, str], Config]:
    """The typed configuration of each method with each activations; a vocabulary that the data would decide is GPT-2's."""
    found = {}
    with initialize_config_dir(config_dir=str(REPOSITORY / "conf"), version_base="1.3"):
        for method in methods:
            for kind in kinds:
                scope = [] if method == "exact" else ["method.include=['*']"]
                config = load(compose("config", overrides=[f"method={method}", f"activations={kind}", *scope, *overrides]))
                config.model.vocab_size = config.model.vocab_size or 50257
                found[method, kind] = config
    return found


def row(method: str, kind: str, config: Config, budget: float | None) -> dict[str, Any]:
    """One line of the table; `budget` in bytes."""
    plan = planning.plan(config)
    line: dict[str, Any] = {"method": method, "kind": kind}
    line |= {name: format_bytes(size) for name, size in plan.kept.items() if size}
    line |= {
        "kept": format_bytes(sum(plan.kept.values())),
        "fixed": format_bytes(plan.parameters + plan.gradients + plan.optimizer),
        "beyond": format_bytes(plan.beyond),
        "peak": format_bytes(plan.peak),
    }
    if budget is not None:
        line["context"] = planning.largest(
            lambda length: planning.plan(planning.with_size(config, block_size=length), categories=False).peak,
            budget,
            unit=256,
            limit=MOST_TOKENS // config.micro_batch_size,
        )
        line["batch"] = planning.largest(
            lambda size: planning.plan(planning.with_size(config, micro_batch_size=size), categories=False).peak,
            budget,
            unit=1,
            limit=MOST_TOKENS // config.model.block_size,
        )
    return line


def table(lines: list[dict[str, Any]], config: Config, budget: float | None) -> Table:
    """The lines with headings; categories in the order in which they are counted."""
    known = ("method", "kind", "kept", "fixed", "beyond", "peak", "context", "batch")
    categories = list(dict.fromkeys(name for line in lines for name in line if name not in known))
    columns = {"method": Column("method"), "kind": Column("activations")}
    columns |= {name: Column(name) for name in categories}
    columns |= {
        "kept": Column("kept in all"),
        "fixed": Column("parameters, gradients, optimiser"),
        "beyond": Column("peak beyond these"),
        "peak": Column("peak"),
        "context": Column("longest context"),
        "batch": Column("largest micro-batch"),
    }
    size = f"{config.micro_batch_size} x {config.model.block_size:,} tokens, {config.precision}, {config.optim.name}"
    notes = [f"Micro-batch of {size}. Categories: kept between forward and backward. Fake tensors: nothing was allocated."]
    if budget is not None:
        notes.append(
            f"Context (in steps of 256) and micro-batch: the largest with a peak of at most {format_bytes(budget)}, the other as "
            f"given; not looked for beyond {MOST_TOKENS:,} tokens in all."
        )
    return Table("plan", "Memory of a training step", columns, lines, notes)


def draw(configs: dict[tuple[str, str], Config], stem: Path) -> list[Path]:
    """Peak beyond parameters, gradients and optimiser against context, a line per method and activations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for (method, kind), config in tqdm(configs.items(), desc="lines", leave=False):
        sizes = [planning.plan(planning.with_size(config, block_size=length)).beyond for length in FIGURE_CONTEXTS]
        axes.loglog(FIGURE_CONTEXTS, [size / 2**30 for size in sizes], marker="o", label=f"{method}, {kind}")
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("peak beyond parameters, gradients, optimiser (GiB)")
    axes.set_xticks(FIGURE_CONTEXTS, [f"{length // 1024}k" for length in FIGURE_CONTEXTS])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    paths = [stem.with_suffix(f".{suffix}") for suffix in SUFFIXES]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--methods", nargs="+", default=["exact", "basis"], help="default: exact basis (all dense layers)")
    parser.add_argument(
        "--activations", nargs="+", default=["plain", "lean", "checkpoint"], help="default: plain lean checkpoint"
    )
    parser.add_argument("--memory", type=float, help="GiB that a step may take")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    parser.add_argument("--figure", type=Path, help="also draw bytes against context, to this path with .png and .svg")
    options = parser.parse_intermixed_args(argv)
    if options.memory is not None and options.memory <= 0:
        parser.error("--memory must be positive")
    budget = None if options.memory is None else options.memory * 2**30
    try:
        configs = configurations(options.overrides, options.methods, options.activations)
        lines = [row(method, kind, config, budget) for (method, kind), config in tqdm(configs.items(), leave=False)]
    except ValueError as error:
        print(f"plan_memory: {error}", file=sys.stderr)
        return 1
    result = table(lines, next(iter(configs.values())), budget)
    print(result.markdown())
    if options.csv:
        write_atomic(options.csv, result.csv())
    if options.figure:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        print("Written:", *draw(configs, options.figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
