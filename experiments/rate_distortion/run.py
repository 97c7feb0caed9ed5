"""How near to the limit is what a method keeps of X? Distortion against the Gaussian
rate-distortion bound, layer by layer.

    python scripts/rate_distortion.py runs/char_small --out results/rate_distortion
    python scripts/rate_distortion.py runs/gpt2 --methods transform quantized \\
        --budgets 1/24 1/8 --layers "blocks.3.*"

The model of a run is given training text again, and the inputs X (B, N) of its dense layers are
kept by each method at each budget (share of X's float32 bytes), as in training: methods that learn
look at `--looks` micro-batches first, then others are measured.

    bits a number      8 x all bytes kept / (B N): codes, scales, mean, key
    distortion         |X - X^|^2 / |X - mean|^2, X^ being what the method would use in X's place;
                       its mean over micro-batches
    bound              the least that any code reaches at as many bits if rows are Gaussian with the
                       spectrum of this layer's inputs (all micro-batches together), by reverse
                       water-filling (Cover and Thomas, 10.3.3), in blocks of any number of rows
    ratio              distortion / bound

Rows of X aren't Gaussian; of all with this spectrum Gaussian ones are the hardest to code, so that
less than the bound isn't impossible. The bound is for the least squared error, and a method without
bias pays for that: X^ with E[X^] = X has more energy than X, by all of its error, where the best
code has less, so a distortion above 1 is no fault in itself. What counts in training is
results/arena. What lives between steps (tracked directions) is not in the bits; the table names it.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basis.diagnostics.budget import fit_budget, kept_bytes, parse_share, state_bytes
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS
from basis.estimators.transform import rate_distortion_bound
from bench.timing import machine
from data import Sampler
from experiments.rate_distortion import figures
from harness.compose import configuration
from harness.folder.checkpoint import CheckpointError
from harness.memory import format_bytes
from harness.trained import load_trained
from models import LanguageModel
from report.tables import Column, Table

METHODS = (
    "transform directions=1.0",
    "transform directions=0.34",
    "quantized",
    "subspace",
    "low_rank",
    "basis",
)
BUDGETS = ("1/48", "1/24", "1/16", "1/12", "1/8", "1/6", "1/4")


@dataclass(frozen=True)
class Point:
    """A method at a budget in a layer. bits: a number of X. distortion, bound: relative to the
    variance. state: bytes.
    """

    layer: str
    method: str
    budget: str
    bits: float
    distortion: float
    bound: float
    state: int

    @property
    def ratio(self) -> float:
        return self.distortion / self.bound


def inputs(model: LanguageModel, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """X (B, N) of each of the layers `names` for `tokens`."""
    found: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = given[0].detach().flatten(0, -2)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


def pooled_spectrum(batches: Sequence[Tensor]) -> Tensor:
    """Eigenvalues of the covariance of the rows of all `batches`, float64.

    Of one micro-batch alone, whose rows are not many more than its columns, the small ones would be
    too small by chance.
    """
    centered = torch.cat([x - x.mean(0) for x in batches]).double()
    return torch.linalg.eigvalsh(centered.t() @ centered / len(centered)).clamp_min(0.0)


def reconstruction(
    estimator: Estimator, x: Tensor, key: Tensor, state: dict[str, Tensor]
) -> Tensor:
    """X^ (B, N): what the method uses in X's place, L Z + 1 mean^T (scales that depend on dY
    aside).
    """
    kept = estimator.compress(x, key, state)
    factors = estimator.factors(kept, len(x))
    if factors is None:
        return estimator.weight_grad(kept, torch.eye(len(x)))
    found = (
        factors.left
        if factors.right is None
        else factors.left @ factors.right.to(factors.left.dtype)
    )
    return found if factors.mean is None else found + factors.mean


def measure_layer(
    name: str,
    looks: Sequence[Tensor],
    others: Sequence[Tensor],
    estimators: dict[tuple[str, str], Estimator],
) -> Iterator[Point]:
    """A point for each (method, budget) that can keep to it."""
    rows, width = others[0].shape
    spectrum = pooled_spectrum([*looks, *others])
    total = float(spectrum.sum())
    for (method, budget), plain in estimators.items():
        try:
            estimator = fit_budget(plain, parse_share(budget), rows, width)
        except ValueError:
            continue  # out of this method's reach
        state = estimator.initial_state(width, torch.device("cpu"))
        for step, x in enumerate(looks):
            state = (
                {**state, **estimator.learn(state, x, torch.tensor(step))}
                if estimator.learns_at(step)
                else state
            )
        bits = 8.0 * kept_bytes(estimator, rows, width) / rows
        distortions = []
        for step, x in enumerate(others):
            error = x - reconstruction(estimator, x, torch.tensor(1000 + step), state)
            distortions.append(
                float(error.double().square().sum())
                / float((x - x.mean(0)).double().square().sum())
            )
        bound = float(rate_distortion_bound(spectrum, bits)) / total
        yield Point(
            name,
            method,
            budget,
            bits / width,
            statistics.fmean(distortions),
            bound,
            state_bytes(estimator, width),
        )


def estimator_of(method: str) -> Estimator:
    """The estimator of a method's name and options of it, as in "basis center=true".

    Raises ValueError if there is no such method or option.
    """
    name, *options = method.split()
    if name not in ESTIMATORS:
        raise ValueError(f"method={name}: must be one of {', '.join(ESTIMATORS)}")
    words = [f"method={name}", *(f"method.{option}" for option in options)]
    return configuration(words).method.estimator


def tables(points: Sequence[Point], note: str) -> tuple[Table, Table]:
    """All points; and a row per method and budget, over the layers."""
    columns = {"layer": Column("layer"), "method": Column("method"), "budget": Column("budget")}
    numbers = {
        "bits": Column("bits a number", digits=3),
        "distortion": Column("distortion", digits=7),
        "bound": Column("bound", digits=7),
        "ratio": Column("ratio", digits=2),
    }
    place = {name: Column(name) for name in ("machine", "torch", "commit")}
    rows = [
        vars(p)
        | {"ratio": p.ratio, "state": format_bytes(p.state) if p.state else None}
        | machine()
        for p in points
    ]
    every = Table(
        "rate_distortion",
        "Distortion by layer",
        columns | numbers | {"state": Column("state")} | place,
        rows,
        [note],
    )
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, point.budget), []).append(point)
    rows = []
    for (method, budget), here in groups.items():
        ratios = sorted(p.ratio for p in here)
        row: dict[str, Any] = {"method": method, "budget": budget, "layers": len(here)}
        row |= {name: statistics.median(getattr(p, name) for p in here) for name in numbers}
        row |= {
            "least": ratios[0],
            "most": ratios[-1],
            "state": format_bytes(sum(p.state for p in here)) or None,
        }
        rows.append(row)
    columns = {
        "method": Column("method"),
        "budget": Column("budget"),
        "layers": Column("layers"),
    } | numbers
    columns |= {
        "least": Column("least ratio", digits=2),
        "most": Column("largest ratio", digits=2),
        "state": Column("state"),
    }
    summary = Table("summary", "Distortion, medians over layers", columns, rows, [note])
    return summary, every


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), help='"name option=value ..." each'
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=list(BUDGETS),
        help=f"shares of X; default: {' '.join(BUDGETS)}",
    )
    parser.add_argument(
        "--layers", default="blocks.*", help="pattern of layer names (default: blocks.*)"
    )
    parser.add_argument(
        "--windows", type=int, default=12, help="windows of a micro-batch (default: 12)"
    )
    parser.add_argument(
        "--looks", type=int, default=40, help="micro-batches that methods learn from (default: 40)"
    )
    parser.add_argument(
        "--batches", type=int, default=4, help="micro-batches that are measured (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the windows (default: 0)")
    parser.add_argument("--out", type=Path, help="folder of tables and figure")
    options = parser.parse_args(argv)
    if min(options.windows, options.looks, options.batches) < 1:
        parser.error("--windows, --looks and --batches must be at least 1")
    try:
        estimators = {
            (m, b): estimator_of(m)
            for m in options.methods
            for b in options.budgets
            if parse_share(b)
        }
        trained = load_trained(options.run)
        model, block = trained.model, trained.model.config.block_size
        names = [
            n
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and fnmatch.fnmatch(n, options.layers)
        ]
        if not names:
            raise ValueError(
                f"--layers {options.layers}: no dense layer of that name; there are "
                "blocks.0.mlp.fc "
                "and so on"
            )
        sampler = Sampler(
            trained.prepared.train,
            block_size=block,
            batch_size=options.windows,
            order="random",
            seed=options.seed,
        )
    except (ValueError, CheckpointError, OSError) as error:
        print(f"rate_distortion: {error}", file=sys.stderr)
        return 1
    seen = [
        inputs(model, sampler.batch(step)[0], names)
        for step in range(options.looks + options.batches)
    ]
    points = list[Point]()
    for name in names:
        looks, others = (
            [batch[name] for batch in part]
            for part in (seen[: options.looks], seen[options.looks :])
        )
        points += measure_layer(name, looks, others, estimators)
    if not points:
        print(
            "rate_distortion: no method keeps to any of the budgets; give larger --budgets or "
            "--windows",
            file=sys.stderr,
        )
        return 1
    rows = options.windows * block
    note = (
        f"{len(names)} layers of a model of {trained.step:,} steps, {rows} rows a micro-batch, "
        f"{options.batches} micro-batches. Bits: all that is kept for backward. State: bytes "
        "between steps, on top. Bound: Gaussian rows of the layer's spectrum at the same bits."
    )
    found = {(point.method, point.budget) for point in points}
    if beyond := [
        f"{method} {budget}" for method, budget in estimators if (method, budget) not in found
    ]:
        note += f" Out of reach: {', '.join(beyond)}."
    summary, every = tables(points, note)
    print(summary.markdown())
    if options.out:
        for table in (summary, every):
            table.write(options.out / f"{table.name}.csv")
        figures.draw(points, options.out / "rate_distortion.svg")
    return 0
