"""One dense layer, forward and backward: exact, BASIS at several R, and the limit that no estimator
of dW can beat.

    python scripts/bench_layer.py  # B 4096, N 768, M 3072, R 64 and 512, float32 and bfloat16
    python scripts/bench_layer.py --rows 8192 --in 1024 --out 4096 \\
        --rank 16 64 256 --dtype bfloat16 --csv layer.csv

The limit is forward and dX without any dW (a frozen weight); no layer has a bias. Alternatives take
turns in one process; a ratio is of medians. Kept is what autograd holds between forward and
backward, the weight aside. The hashing of BASIS, 8 bytes a row, is drawn once a step for all layers
of a model: its bytes are counted here, its time is not. bfloat16 is the layer's own precision here,
not autocast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import basis
from basis.estimator import Estimator
from basis.linear import SketchedLinear
from bench.output import csv_option, show
from bench.timing import interleaved, machine
from harness.device import resolve
from harness.memory import format_bytes, saved_bytes_total
from report.tables import Column, Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def step(layer: nn.Linear, x: Tensor, grad_y: Tensor, *, compile: bool) -> Callable[[], None]:
    """Forward and backward of one layer, gradients dropped."""
    forward = torch.compile(layer) if compile else layer

    if isinstance(layer, SketchedLinear):
        # As a layer of a model: the hashing is drawn once a step for all of them, so not here.
        basis.set_noise_key(nn.ModuleList([layer, nn.Linear(1, 1)]), seed=0, step=0)

    def run() -> None:
        forward(x).backward(grad_y)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return run


def measure(
    rows: int,
    width: int,
    out: int,
    ranks: list[int],
    dtype: str,
    *,
    turns: int,
    device: str = "auto",
    compile: bool = False,
    progress: bool = True,
    others: Mapping[str, Estimator] | None = None,
) -> list[dict[str, Any]]:
    """A row per alternative for one size and precision. others: more methods than BASIS, by the
    names of their rows.
    """
    runtime = resolve(device, "float32", compile=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(rows, width, dtype=DTYPES[dtype], device=runtime.device).requires_grad_()
        grad_y = torch.randn(rows, out, dtype=DTYPES[dtype], device=runtime.device)
        plain, frozen = (
            nn.Linear(width, out, bias=False, dtype=x.dtype, device=x.device) for _ in range(2)
        )
    frozen.requires_grad_(False)
    layers: dict[str, nn.Linear] = {"exact": plain, "limit": frozen}
    methods = {f"basis R={rank}": basis.BalancedSketch(rank) for rank in ranks}
    for name, method in (methods | dict(others or {})).items():
        layers[name] = SketchedLinear.from_linear(plain, method)
    steps = {name: step(layer, x, grad_y, compile=compile) for name, layer in layers.items()}
    timings = interleaved(steps, turns=turns, synchronize=runtime.synchronize, progress=progress)
    lines = []
    for name, timing in timings.items():
        lines.append(
            {
                "layer": name,
                "B": rows,
                "N": width,
                "M": out,
                "dtype": dtype,
                "milliseconds": 1e3 * timing.median,
                "quartiles": f"{1e3 * timing.low:.1f} to {1e3 * timing.high:.1f}",
                "of_exact": timing.median / timings["exact"].median,
                "of_limit": timing.median / timings["limit"].median,
                "kept": format_bytes(saved_bytes_total(layers[name], partial(layers[name], x))),
                "compile": "yes" if compile else "no",
            }
            | machine()
        )
    return lines


def table(lines: list[dict[str, Any]]) -> Table:
    """The lines with headings and units."""
    columns = {
        "layer": Column("layer"),
        "B": Column("B, rows"),
        "N": Column("N"),
        "M": Column("M"),
        "dtype": Column("dtype"),
    }
    columns |= {
        "milliseconds": Column("forward + backward, ms", digits=1),
        "quartiles": Column("quartiles, ms"),
    }
    columns |= {
        "of_exact": Column("of exact", digits=2),
        "of_limit": Column("of limit", digits=2),
        "kept": Column("kept"),
        "failed": Column("failed"),
    }
    columns |= {name: Column(name) for name in ("compile", "machine", "torch", "commit")}
    return Table("layer", "One dense layer, forward and backward", columns, lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=4096, help="B, rows of the input (default: 4096)"
    )
    parser.add_argument(
        "--in", dest="width", type=int, default=768, help="N, in_features (default: 768)"
    )
    parser.add_argument("--out", type=int, default=3072, help="M, out_features (default: 3072)")
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[64, 512], help="R, one or more (default: 64 512)"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=sorted(DTYPES), default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--turns", type=int, default=20, help="timed turns of each alternative (default: 20)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile every alternative")
    csv_option(parser)
    options = parser.parse_args(argv)
    if min(options.rows, options.width, options.out, *options.rank) < 1 or options.turns < 2:
        parser.error("sizes and ranks must be at least 1, --turns at least 2")
    lines: list[dict[str, Any]] = []
    for dtype in options.dtype:
        lines += measure(
            *(options.rows, options.width, options.out, options.rank, dtype),
            turns=options.turns,
            device=options.device,
            compile=options.compile,
        )
    show(table(lines), options.csv)
    return 0
