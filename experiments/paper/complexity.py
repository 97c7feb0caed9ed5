"""Table 1 of the paper, measured: how bytes, FLOPs and seconds of a training step grow with B, L
and R.

The paper gives orders, O(L B N) against O(L R N) for the "network activation memory" and O(B N M)
against O(R N M) for dW, and measures neither. Here the paper's model is varied along one axis at a
time, from B = 1,024 rows (16 windows of 64 tokens), L = 2 blocks and R = 32, with exact
backpropagation and with all dense layers and the head sketched:

- *kept by dense layers* (what the paper counts, and the hashing of the rows, 12 bytes a row once
  for all layers, which it leaves out) and *kept besides* (what it does not count: attention,
  LayerNorm, GELU, the loss head), bytes for the backward of one step, counted on fake tensors,
  which allocate nothing, so any size can be asked for;
- *FLOPs of dW*, of the blocks and of the head: FLOPs of matrix products of forward and backward
  together, less those of a step in which these weights are frozen. The sketch of dY is counted
  where it is a product with the sign matrix (2 R B M, in the head), not where it is additions; the
  paper's O(R N M) leaves it out altogether;
- *step time*: forward and backward on the device, median of a second of repetitions.

Slopes are those of a least-squares line through the logarithms: 1 means proportional, 0
independent. Growth that begins only where a term outweighs the constants shows as a slope in
between; that is what a user sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import basis
from bench.timing import made_by
from data.storage import write_atomic
from harness.device import resolve
from harness.memory import saved_bytes
from harness.provenance import provenance
from models import GPT, GPTConfig
from report.figures import pyplot, save
from report.tables import Column, Table

BASE = {"B": 1024, "L": 2, "R": 32}
AXES = {"B": (256, 512, 1024, 2048, 4096), "L": (1, 2, 4, 8), "R": (4, 16, 64, 256)}
LARGEST_TIMED = (
    1024  # rows; beyond, a step of the paper's vocabulary takes seconds and a gigabyte on a CPU
)
WINDOW = 64

# Exponents in the paper's Table 1, by quantity, method and axis.
PAPER = {
    ("kept_dense", "exact"): {"B": 1, "L": 1},
    ("kept_dense", "basis"): {"B": 0, "L": 1, "R": 1},
    ("dw_blocks", "exact"): {"B": 1, "L": 1},
    ("dw_blocks", "basis"): {"B": 0, "L": 1, "R": 1},
    ("dw_head", "exact"): {"B": 1, "L": 0},
    ("dw_head", "basis"): {"B": 0, "L": 0, "R": 1},
}
QUANTITIES = {
    "kept_dense": "kept by dense layers (bytes)",
    "kept_besides": "kept besides (bytes)",
    "dw_blocks": "FLOPs of dW, blocks",
    "dw_head": "FLOPs of dW, head",
    "flops": "FLOPs of the step",
    "milliseconds": "step time (ms)",
}


@dataclass(frozen=True)
class Point:
    """One size: method ("exact" or "basis"), B rows, L blocks, R."""

    method: str
    B: int
    L: int
    R: int

    def model(self) -> GPT:
        """The paper's model with L blocks, sketched if the method says so."""
        model = GPT(GPTConfig(vocab_size=50257, block_size=WINDOW, n_layer=self.L))
        if self.method == "basis":
            basis.convert(model, basis.BalancedSketch(self.R, shrinkage=0.01), exact_if_kept=False)
        return model


def points() -> list[Point]:
    """All sizes along the three axes; exact backpropagation has no R."""
    chosen = []
    for axis, values in AXES.items():
        for value in values:
            sizes = BASE | {axis: value}
            chosen += [
                Point(method, **sizes)
                for method in ("exact", "basis")
                if (method, axis) != ("exact", "R")
            ]
    return list(dict.fromkeys(chosen))


def count(point: Point) -> dict[str, float]:
    """Bytes and FLOPs of one step, on fake tensors."""
    with torch.device("meta"):
        model = point.model()  # initialised there, since drawing looks at values
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        tokens = torch.zeros(point.B // WINDOW, WINDOW, dtype=torch.int64)
        basis.set_noise_key(model, seed=0, step=0)  # as in training: layers share a hashing
        saved = saved_bytes(model, lambda: model(tokens, tokens))
        dense = saved["linear inputs"] + saved["sketches"]
        flops = _flops(model, tokens)
        model.head.weight.requires_grad_(False)
        without_head = _flops(model, tokens)
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(False)
        return {
            "kept_dense": dense,
            "kept_besides": sum(saved.values()) - dense,
            "flops": flops,
            "dw_blocks": without_head - _flops(model, tokens),
            "dw_head": flops - without_head,
        }


def _flops(model: GPT, tokens: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def milliseconds(point: Point) -> float:
    """Median time of forward and backward on this machine's device."""
    runtime = resolve("auto", "float32", compile=False)
    with torch.random.fork_rng():
        model = point.model().to(runtime.device)
        tokens = torch.randint(50257, (point.B // WINDOW, WINDOW), device=runtime.device)

    def step() -> None:
        basis.set_noise_key(model, seed=0, step=0)
        model(tokens, tokens).backward()
        model.zero_grad(set_to_none=True)
        runtime.synchronize()

    step()
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return float(1e3 * timer.blocked_autorange(min_run_time=1.0).median)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure(
    sizes: Iterable[Point], *, timed: bool = True, progress: bool = True
) -> list[dict[str, Any]]:
    """A row per size: its B, L, R, method and all quantities."""
    rows = []
    for point in tqdm(
        list(sizes), desc="sizes", unit="size", leave=False, disable=None if progress else True
    ):
        row: dict[str, Any] = {"method": point.method, "B": point.B, "L": point.L}
        row |= {"R": point.R} if point.method == "basis" else {}
        row |= count(point)
        if timed and point.B <= LARGEST_TIMED:
            row["milliseconds"] = milliseconds(point)
        rows.append(row)
    return rows


def series(
    rows: Sequence[dict[str, Any]], method: str, axis: str, quantity: str
) -> tuple[list[float], list[float]]:
    """Sizes along `axis`, the others at their base value, and the quantity there."""
    others = {name: value for name, value in BASE.items() if name != axis}
    line = [
        row
        for row in rows
        if row["method"] == method
        and quantity in row
        and axis in row
        and all(row.get(name, value) == value for name, value in others.items())
    ]
    line.sort(key=lambda row: row[axis])
    return [row[axis] for row in line], [row[quantity] for row in line]


def slopes(rows: Sequence[dict[str, Any]]) -> Table:
    """The fitted exponents beside the paper's."""
    lines = []
    for quantity, name in QUANTITIES.items():
        for method in ("exact", "basis"):
            line: dict[str, Any] = {"quantity": name, "method": method}
            for axis in AXES:
                if (method, axis) == ("exact", "R"):
                    continue
                x, y = series(rows, method, axis, quantity)
                line[axis] = slope(x, y) if len(x) > 1 and min(y) > 0 else None
                line[f"paper_{axis}"] = PAPER.get((quantity, method), {}).get(axis)
            lines.append(line)
    columns = {"quantity": Column("quantity"), "method": Column("method")}
    for axis in AXES:
        columns |= {
            axis: Column(f"slope in {axis}", digits=2),
            f"paper_{axis}": Column(f"paper, {axis}"),
        }
    notes = [
        f"Slopes on log-log axes, from B = {BASE['B']:,} rows, L = {BASE['L']} blocks, R = "
        f"{BASE['R']} along one axis at a time (B {_span('B')}, L {_span('L')}, R {_span('R')}; "
        f"times to B = {LARGEST_TIMED:,}); the paper's model, all dense layers and the head "
        "sketched. Empty: the paper says nothing. FLOPs are those of matrix products, the sketch "
        "of dY among them where it is one (2 R B M in the head), which the paper's order leaves "
        "out. What dense layers keep with BASIS grows with B by the hashing that they share, 12 "
        "bytes a row once for all layers. The head keeps no input in either method: it forms its "
        "gradient with the loss, or the factors of it, and that is most of what is kept besides."
    ]
    return Table("complexity", "Table 1 of the paper, measured", columns, lines, notes)


def _span(axis: str) -> str:
    return f"{AXES[axis][0]:,} to {AXES[axis][-1]:,}"


def sizes_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Every size that was measured."""
    columns = {
        "method": Column("method"),
        "B": Column("B, rows"),
        "L": Column("L, blocks"),
        "R": Column("R"),
    }
    columns |= {name: Column(heading, digits=1) for name, heading in QUANTITIES.items()}
    return Table("complexity_sizes", "Sizes measured", columns, list(rows))


def report(out: Path, *, command: str) -> tuple[Table, list[Path]]:
    """Measure everything and write complexity.md, .csv, .json, .svg and complexity_sizes.csv:
    the slopes, and the paths.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = measure(points())
    fitted, sizes = slopes(rows), sizes_table(rows)
    fitted.notes.append(made_by(command))
    fitted.write(out / "complexity.csv")
    write_atomic(out / "complexity_sizes.csv", sizes.csv())
    everything = provenance() | {"slopes": fitted.json(), "sizes": sizes.json()}
    write_atomic(out / "complexity.json", json.dumps(everything, indent=1) + "\n")
    texts = [
        out / name
        for name in ("complexity.md", "complexity.csv", "complexity_sizes.csv", "complexity.json")
    ]
    return fitted, [*texts, draw(rows, out / "complexity.svg")]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Bytes (above) and FLOPs of dW in the blocks (below) against B, L and R on log-log axes."""
    with pyplot() as plt:
        figure, grid = plt.subplots(
            2, len(AXES), figsize=(12, 7), layout="constrained", sharex="col"
        )
        styles = {
            "exact": {"color": "black", "linestyle": "--"},
            "basis": {"color": "tab:blue", "linestyle": "-"},
        }
        for column, axis in enumerate(AXES):
            for method, style in styles.items():
                for quantity, marker in (("kept_dense", "o"), ("kept_besides", "x")):
                    x, y = series(rows, method, axis, quantity)
                    if x:
                        label = f"{method}, {QUANTITIES[quantity].removesuffix(' (bytes)')}"
                        grid[0][column].loglog(x, y, marker=marker, label=label, **style)
                x, y = series(rows, method, axis, "dw_blocks")
                if x:
                    grid[1][column].loglog(x, y, marker="o", label=method, **style)
            grid[1][column].set_xlabel(
                {"B": "B (rows)", "L": "L (blocks)", "R": "R (rows kept)"}[axis]
            )
            for axes in (grid[0][column], grid[1][column]):
                axes.grid(alpha=0.3)
                axes.set_xticks(AXES[axis], [f"{value:,}" for value in AXES[axis]])
                axes.minorticks_off()
        grid[0][0].set_ylabel("bytes kept for backward")
        grid[1][0].set_ylabel("FLOPs of dW, blocks")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        save(figure, path)
        plt.close(figure)
    return path
