"""One causal attention, forward and backward, against its length: PyTorch's own, and SUS by
reference and by kept entries.

    # 2 heads of width 64, c 25, n 512 to 16,384; some minutes on one core
    python scripts/bench_sus.py --out results/sus
    python scripts/bench_sus.py --lengths 1024 4096 --heads 12 --width 64 --c 10 --turns 9

| attention | backward |
|---|---|
| exact | of F.scaled_dot_product_attention: flash attention on a CPU, and in half precision |
| sus dense | every entry looked at: the reference (basis/sus/dense.py) |
| sus sparse | probabilities once more, then about c entries of a row (basis/sus/sparse.py) |

Forward is the same for all. Of the sparse backward, drawing the entries is quadratic in n and the
rest linear; `without sampling` is that rest by itself. Alternatives take turns in one process, a
ratio is of medians. q, k, v are normal numbers, attention is nearly uniform, so that a row keeps
about c entries, the most there can be; the sparse path's time hardly depends on it.

The break-even length is where sparse takes the time of exact, on the straight line between the
logarithms of two lengths; beyond the longest one it is extrapolated from the last two and said to
be so.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basis.sus import SusAttention
from basis.sus.blocks import Heads
from basis.sus.masks import Noise
from basis.sus.sparse import entry_gradients, sample
from basis.sus.statistics import kept_per_row
from bench.output import show
from bench.timing import interleaved, made_by
from experiments.sus.figures import draw_times
from harness.device import resolve
from harness.memory import format_bytes, saved_bytes
from harness.provenance import provenance
from models.gpt import CausalAttention
from report.tables import Column, Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEY = 1
MODES = {"sus dense": "dense", "sus sparse": "sparse"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
KINDS = {"whole": "forward and backward", "backward": "backward"}


def whole(module: nn.Module, leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(module(*leaves), leaves, grad)


def backward(output: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """Backward of a forward that has been run, again and again."""
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def rest_of_sparse(
    leaves: Sequence[Tensor], grad: Tensor, output: Tensor, c: float
) -> Callable[[], object]:
    """The part of the sparse backward that is left when the entries are drawn."""
    q, k, v = (x.detach() for x in leaves)
    heads = Heads.of(q, k, v)
    noise = Noise.of(torch.tensor(KEY, device=q.device), heads)
    drawn = [(groups, sample(heads, groups, rows, noise, c)) for groups, rows in heads.chunks()]
    outputs, grads = heads.like_q(output.detach()), heads.like_q(grad)
    return lambda: [
        entry_gradients(heads, groups, outputs, grads, entries) for groups, entries in drawn
    ]


def measure(
    length: int,
    heads: int,
    width: int,
    c: float,
    dtype: str,
    *,
    turns: int,
    device: str = "auto",
    clock: str = "wall",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A row per attention for one length; times in milliseconds."""
    runtime = resolve(device, "float32", compile=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        *leaves, grad = (
            torch.randn(1, heads, length, width).to(runtime.device, DTYPES[dtype]) for _ in range(4)
        )
    for leaf in leaves:
        leaf.requires_grad_()
    modules: dict[str, nn.Module] = {"exact": CausalAttention(0.0)}
    for name, mode in MODES.items():
        sus = SusAttention(CausalAttention(0.0), c, mode)
        sus.set_noise_key(KEY)
        modules[name] = sus
    outputs = {name: module(*leaves) for name, module in modules.items()}
    alternatives: dict[str, Callable[[], object]] = {}
    for name, module in modules.items():
        alternatives[f"{name}, whole"] = whole(module, leaves, grad)
        alternatives[f"{name}, backward"] = backward(outputs[name], leaves, grad)
    alternatives["sus sparse, entries"] = rest_of_sparse(leaves, grad, outputs["exact"], c)
    how: dict[str, Any] = {
        "warm_up": 1,
        "synchronize": runtime.synchronize,
        "clock": CLOCKS[clock],
        "progress": progress,
    }
    timings = interleaved(alternatives, turns=turns, **how)
    rows = []
    for name, module in modules.items():
        row: dict[str, Any] = {"n": length, "attention": name}
        for kind in KINDS:
            timing, exact = timings[f"{name}, {kind}"], timings[f"exact, {kind}"]
            row |= {
                kind: 1e3 * timing.median,
                f"{kind}_low": 1e3 * timing.low,
                f"{kind}_high": 1e3 * timing.high,
            }
            row |= {f"{kind}_quartiles": f"{1e3 * timing.low:.1f} to {1e3 * timing.high:.1f}"}
            row[f"{kind}_ratio"] = timing.median / exact.median
        if name == "sus sparse":
            row["entries"] = 1e3 * timings["sus sparse, entries"].median
        row["kept"] = format_bytes(
            sum(saved_bytes(module, functools.partial(module, *leaves)).values())
        )
        row["kept_entries"] = (length + 1) / 2
        if name in MODES:
            key = torch.tensor(KEY, device=runtime.device)
            _, drawn = kept_per_row(
                leaves[0].detach(), leaves[1].detach(), key, c=c, mode=MODES[name]
            )
            row["kept_entries"] = float(drawn.mean())
        rows.append(row | {"turns": turns})
    return rows


def break_even(rows: Sequence[dict[str, Any]], kind: str) -> tuple[float | None, bool]:
    """The length from which on sparse is as fast as exact, None if there is none in sight; and
    whether it is extrapolated.
    """
    line = sorted(
        (row["n"], row[f"{kind}_ratio"]) for row in rows if row["attention"] == "sus sparse"
    )
    slower = [i for i, (_, ratio) in enumerate(line) if ratio > 1]
    if not slower:
        return float(line[0][0]), False
    last = slower[-1]
    beyond = last == len(line) - 1
    if beyond and len(line) == 1:
        return None, True
    (n, r), (m, s) = line[-2:] if beyond else line[last : last + 2]
    if s >= r:
        return None, True
    return n * math.exp(math.log(m / n) * math.log(r) / math.log(r / s)), beyond


def sentence(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """What `break_even` found, in words."""
    longest, shortest = max(row["n"] for row in rows), min(row["n"] for row in rows)
    found, extrapolated = break_even(rows, kind)
    if found is None:
        return f"{KINDS[kind]}: no break-even up to n = {longest:,}, and none in sight."
    if extrapolated:
        return (
            f"{KINDS[kind]}: no break-even up to n = {longest:,}; at about {found:,.0f} if the"
            " last "
            "two lengths go on as a straight line (extrapolated, not measured)."
        )
    if found == shortest:
        return (
            f"{KINDS[kind]}: sus sparse is as fast as exact or faster at every length measured, "
            f"from n = {shortest:,}."
        )
    return f"{KINDS[kind]}: break-even at n = {found:,.0f}, between two lengths measured."


def slope(rows: Sequence[dict[str, Any]], attention: str, key: str) -> float | None:
    """Exponent of n between the last two lengths."""
    line = sorted((row["n"], row[key]) for row in rows if row["attention"] == attention)[-2:]
    if len(line) < 2:
        return None
    (n, a), (m, b) = line
    return math.log(b / a) / math.log(m / n)


def table(rows: list[dict[str, Any]], notes: list[str]) -> Table:
    """The rows with headings and units."""
    columns = {"n": Column("n, tokens"), "attention": Column("attention")}
    for kind, name in KINDS.items():
        columns |= {
            kind: Column(f"{name}, ms", digits=1),
            f"{kind}_quartiles": Column("quartiles, ms"),
        }
        columns |= {f"{kind}_ratio": Column("of exact", digits=2)}
    columns |= {
        "entries": Column("backward without sampling, ms", digits=1),
        "kept": Column("kept for backward"),
    }
    columns |= {
        "kept_entries": Column("entries followed a row", digits=1),
        "turns": Column("turns"),
    }
    return Table("attention", "One causal attention", columns, rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[512, 1024, 2048, 4096, 8192, 16384],
        help="n, tokens",
    )
    parser.add_argument("--heads", type=int, default=2, help="heads of one sequence (default: 2)")
    parser.add_argument("--width", type=int, default=64, help="d, of a head (default: 64)")
    parser.add_argument(
        "--c",
        type=float,
        default=25.0,
        help="entries of a row that are followed, at most (default: 25)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument(
        "--turns", type=int, default=7, help="timed turns of each alternative (default: 7)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: computing time, for a shared machine; one thread",
    )
    parser.add_argument("--out", type=Path, help="folder for attention.csv, .md and .svg")
    options = parser.parse_args(argv)
    if (
        min(*options.lengths, options.heads, options.width) < 1
        or options.turns < 2
        or not options.c > 0
    ):
        parser.error("sizes must be at least 1, --turns at least 2, --c positive")
    lengths = sorted(set(options.lengths))
    rows: list[dict[str, Any]] = []
    try:
        for length in lengths:
            sizes = (length, options.heads, options.width, options.c, options.dtype)
            rows += measure(*sizes, turns=options.turns, device=options.device, clock=options.clock)
    except ValueError as error:
        print(f"bench_sus: {error}", file=sys.stderr)
        return 1
    growth = [("exact", "backward", "of exact"), ("sus sparse", "backward", "of sus sparse")]
    growth.append(("sus sparse", "entries", "of sus sparse without sampling"))
    slopes = [(name, slope(rows, attention, key)) for attention, key, name in growth]
    clock = {
        "wall": "",
        "cpu": " Times are computing time of the process, not of a clock on the wall.",
    }[options.clock]
    notes = [
        f"Heads: {options.heads}, of width {options.width}; c = {options.c:g}; "
        f"{options.dtype}.{clock}"
    ]
    notes += [sentence(rows, kind)[0].upper() + sentence(rows, kind)[1:] for kind in KINDS]
    if len(lengths) > 1:
        said = ", ".join(f"{value:.2f} {name}" for name, value in slopes)
        notes.append(f"Exponent of n between the last two lengths, backward: {said}.")
    notes.append(made_by(f"python scripts/{provenance()['command']}"))
    show(table(rows, notes), options.out and options.out / "attention.csv")
    if options.out:
        draw_times(rows, options.out / "attention.svg")
    return 0
