"""The last layer and the loss, forward and backward: PyTorch's ways, the fused step of this
project, and that with a sketch.

    python scripts/bench_head.py               # B 4096, N 768, V 50,257, R 64, float32
    python scripts/bench_head.py --rows 64 --width 64 --dtype bfloat16 --rank 8 32 --csv head.csv

    F.linear, F.cross_entropy          whole logits
    F.linear_cross_entropy             PyTorch's own (2.13 and later), reference and chunked
    basis exact, basis R=...           basis.linear_cross_entropy, which all methods here train with

All take the same hidden states (B, N), weight (V, N) and targets and return the mean loss; after
backward dX and dW are there. Alternatives take turns in one process; a ratio is of medians. Kept is
what autograd holds between forward and backward, the weight aside; the peak is what tensors take at
most beyond input, weight and their gradients, counted tensor by tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.linear import SketchedLinear
from bench.bench_layer import DTYPES
from bench.output import csv_option, show
from bench.timing import interleaved, machine
from harness.device import resolve
from harness.memory import LiveBytes, format_bytes, saved_bytes_total, tensor_bytes
from report.tables import Column, Table

Loss = Callable[[Tensor], Tensor]


def heads(layer: nn.Linear, targets: Tensor, ranks: list[int]) -> dict[str, Loss]:
    """Functions of the hidden states that return the loss."""
    found: dict[str, Loss] = {
        "F.linear, F.cross_entropy": lambda x: F.cross_entropy(layer(x).float(), targets)
    }
    if hasattr(F, "linear_cross_entropy"):
        chunked = nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = lambda x: F.linear_cross_entropy(x, layer.weight, targets)
        found["F.linear_cross_entropy, chunked"] = lambda x: F.linear_cross_entropy(
            x, layer.weight, targets, options=chunked
        )
    found["basis exact"] = lambda x: basis.linear_cross_entropy(layer, x, targets)
    for rank in ranks:
        sketched = SketchedLinear.from_linear(layer, basis.BalancedSketch(rank))

        def loss(x: Tensor, sketched: SketchedLinear = sketched) -> Tensor:
            sketched.set_noise_key(0)
            return basis.linear_cross_entropy(sketched, x, targets)

        found[f"basis R={rank}"] = loss
    return found


def measure(
    rows: int,
    width: int,
    classes: int,
    ranks: list[int],
    dtype: str,
    *,
    turns: int,
    device: str = "auto",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A row per alternative for one size and precision."""
    runtime = resolve(device, "float32", compile=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(rows, width, dtype=DTYPES[dtype], device=runtime.device).requires_grad_()
        layer = nn.Linear(width, classes, bias=False, dtype=x.dtype, device=x.device)
        targets = torch.randint(classes, (rows,)).to(runtime.device)
    held = [x, layer.weight]

    def step(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            loss(x).backward()
            x.grad = layer.weight.grad = None

        return run

    alternatives = heads(layer, targets, ranks)
    timings = interleaved(
        {name: step(loss) for name, loss in alternatives.items()},
        turns=turns,
        synchronize=runtime.synchronize,
        progress=progress,
    )
    lines = []
    first = next(iter(timings.values()))
    for name, timing in timings.items():
        with LiveBytes([*held, targets]) as live:
            step(alternatives[name])()
        peak = max(now for _, now in live.series) - 2 * tensor_bytes(held) - tensor_bytes([targets])
        lines.append(
            {
                "head": name,
                "B": rows,
                "N": width,
                "V": classes,
                "dtype": dtype,
                "milliseconds": 1e3 * timing.median,
                "quartiles": f"{1e3 * timing.low:.1f} to {1e3 * timing.high:.1f}",
                "ratio": timing.median / first.median,
                "kept": format_bytes(saved_bytes_total(layer, partial(alternatives[name], x))),
                "peak": format_bytes(max(peak, 0)),
            }
            | machine()
        )
    return lines


def table(lines: list[dict[str, Any]]) -> Table:
    """The lines with headings and units."""
    columns = {
        "head": Column("head and loss"),
        "B": Column("B, rows"),
        "N": Column("N"),
        "V": Column("V, classes"),
        "dtype": Column("dtype"),
        "milliseconds": Column("forward + backward, ms", digits=1),
        "quartiles": Column("quartiles, ms"),
        "ratio": Column("of the first row", digits=2),
        "kept": Column("kept for backward"),
        "peak": Column("peak beyond input, weight, gradients"),
    }
    columns |= {name: Column(name) for name in ("machine", "torch", "commit")}
    return Table("head", "The loss head, forward and backward", columns, lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=4096, help="B, rows of hidden states (default: 4096)"
    )
    parser.add_argument("--width", type=int, default=768, help="N, their width (default: 768)")
    parser.add_argument(
        "--classes", type=int, default=50257, help="V, the vocabulary (default: 50257)"
    )
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[64], help="R, one or more (default: 64)"
    )
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["float32"])
    parser.add_argument(
        "--turns", type=int, default=5, help="timed turns of each alternative (default: 5)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    csv_option(parser)
    options = parser.parse_args(argv)
    if min(options.rows, options.width, options.classes, *options.rank) < 1 or options.turns < 2:
        parser.error("sizes and ranks must be at least 1, --turns at least 2")
    lines: list[dict[str, Any]] = []
    for dtype in options.dtype:
        lines += measure(
            *(options.rows, options.width, options.classes, options.rank, dtype),
            turns=options.turns,
            device=options.device,
        )
    show(table(lines), options.csv)
    return 0
