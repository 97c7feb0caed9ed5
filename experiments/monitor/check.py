"""Are the monitor's readings true? A small GPT is trained exactly, and beside each reading stands
the true value.

    python scripts/monitor_check.py  # char_small on Shakespeare's works, 300 steps: minutes
    python scripts/monitor_check.py data=text data.path=book.txt data.tokenizer=char \\
        steps=500 --probes 16 --every 25

Every so many steps one monitor per number of probes (basis/diagnostics/monitor.py) is put around
the training step itself. All dense layers, the head with them, are read three times: activation
energy |X|_F^2, gradient norm |dW|_F, stable rank |X|_F^2 / |X|_2^2. The true values come from a
further forward and backward on the same batch, with X and dW whole and singular values of X.
Relative error: (estimate - truth) / truth. The monitor draws new random matrices in every step.

With p probes the deviation of energies, and of squared gradient norms, is sqrt(2 / p) where X (dW)
has a single direction, and less by 1 / sqrt(stable rank) where it has more; for the norm itself it
is half of that. The stable rank of p random mixtures is at most p, so it is too low where the true
one is not far below p.

Overrides are those of train.py; of the method, exact alone: with any other, dW is what is to be
estimated. Written to --out: readings.csv (every reading), monitor and monitor_layers (.csv, .md),
monitor.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from basis.diagnostics.monitor import Monitor
from basis.ops.noise import fold
from bench.timing import machine
from data.storage import write_atomic
from harness import compose
from harness.build import build_model, check_method, training_text
from harness.config import Config
from harness.device import resolve
from harness.memory import format_bytes, tensor_bytes
from harness.optim import learning_rate, make_optimizer
from report.figures import canvas
from report.tables import Column, Table

REPOSITORY = Path(__file__).resolve().parents[2]
QUANTITIES = {
    "activation_energy": "activation energy",
    "gradient_norm": "gradient norm",
    "stable_rank": "stable rank",
}


def configuration(overrides: list[str]) -> Config:
    """char_small on Shakespeare, 300 steps, changed by `overrides`. Raises ValueError for what
    can't be checked.
    """
    chosen = ["experiment=char_small", "method=exact", "steps=300"]
    if not any(word.startswith("data=") for word in overrides):
        chosen += ["data=shakespeare", "data.tokenizer=char", "data.order=random"]
    chosen = [
        word
        for word in chosen
        if word.split("=")[0] not in {other.split("=")[0] for other in overrides}
    ]
    config = compose.configuration([*chosen, *overrides])
    if config.method.name != "exact":
        raise ValueError(f"method={config.method.name}: true gradients are those of method=exact")
    if config.micro_batches > 1:
        raise ValueError(
            f"tokens_per_step={config.tokens_per_step}: a step is checked that is one micro-batch; "
            "leave it null"
        )
    if config.model.tie_head:
        raise ValueError(
            "model.tie_head=true: the head's gradient is added to the embedding's; check an untied "
            "head"
        )
    return config


def true_values(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, dict[str, float]]:
    """The three quantities of every dense layer, by layer, from whole inputs and gradients of one
    forward and backward.

    loss: runs `model`. Nothing is changed, the random state included.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach().flatten(0, -2).double()

        return hook

    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.random.fork_rng():
            gradients = torch.autograd.grad(loss(), [layer.weight for layer in layers.values()])
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for (name, x), gradient in zip(
        ((name, inputs[name]) for name in layers), gradients, strict=True
    ):
        energy = float(x.square().sum())
        found[name] = {
            "activation_energy": energy,
            "gradient_norm": float(gradient.double().norm()),
            "stable_rank": energy / float(torch.linalg.matrix_norm(x, 2)) ** 2,
        }
    return found


def measure(
    config: Config, probes: Sequence[int], every: int, progress: bool = True
) -> tuple[list[dict[str, Any]], list[int]]:
    """A reading per step looked at, layer and number of probes; and, by look, the bytes that all
    monitors hold between steps.
    """
    runtime = resolve(config.device, config.precision, compile=False)
    check_method(config)
    config, _, sampler = training_text(config, progress=progress)
    with torch.random.fork_rng():
        model, _ = build_model(config)
        model.to(runtime.device)
        optimizer = make_optimizer(model, config.optim)
        monitors = {p: Monitor(model, probes=p) for p in probes}
        rows: list[dict[str, Any]] = []
        held: list[int] = []
        for step in tqdm(
            range(config.steps), unit="step", leave=False, disable=None if progress else True
        ):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step, config.steps)

            def loss(step: int = step) -> Tensor:
                return runtime.forward(model, *sampler.batch(step, 0))

            look = step % every == 0 or step == config.steps - 1
            truth = true_values(model, loss) if look else {}
            with contextlib.ExitStack() as around:
                for monitor in monitors.values() if look else ():
                    monitor.seed = fold("monitor", config.seed, step)
                    around.enter_context(monitor)
                loss().backward()
            if config.optim.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not look:
                continue
            for p, monitor in monitors.items():
                for layer, reading in monitor.read().items():
                    row: dict[str, Any] = {"step": step, "layer": layer, "probes": p}
                    for quantity in QUANTITIES:
                        row |= {
                            quantity: getattr(reading, quantity),
                            f"true_{quantity}": truth[layer][quantity],
                        }
                    rows.append(row)
            held.append(
                tensor_bytes(
                    t for monitor in monitors.values() for t in monitor.state_dict().values()
                )
            )
    return rows, held


def errors(rows: Sequence[dict[str, Any]], quantity: str) -> list[float]:
    """Relative errors of a quantity, with sign."""
    return [
        row[quantity] / row[f"true_{quantity}"] - 1.0 for row in rows if row[f"true_{quantity}"]
    ]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def tables(rows: list[dict[str, Any]], held: list[int], probes: Sequence[int]) -> list[Table]:
    """Errors by quantity and number of probes, over all layers; and by layer, for the middle number
    of probes.
    """
    looks = len({row["step"] for row in rows})
    lines = []
    for quantity, words in QUANTITIES.items():
        for p in probes:
            found = errors([row for row in rows if row["probes"] == p], quantity)
            low, median, high = quartiles(found)
            size = statistics.median(abs(error) for error in found)
            lines.append(
                {
                    "quantity": words,
                    "probes": p,
                    "median": median,
                    "low": low,
                    "high": high,
                    "size": size,
                    "count": len(found),
                }
                | machine()
            )
    columns = {
        "quantity": Column("quantity"),
        "probes": Column("probes"),
        "median": Column("relative error, median", sign=True),
    }
    columns |= {
        "low": Column("lower quartile", sign=True),
        "high": Column("upper quartile", sign=True),
    }
    columns |= {"size": Column("median of its absolute value"), "count": Column("readings")}
    columns |= {name: Column(name) for name in ("machine", "torch", "commit")}
    notes = [
        f"Held between steps by all monitors together: {format_bytes(held[0])} after the first "
        f"look, {format_bytes(held[-1])} after the last of {looks}."
    ]
    overall = Table(
        "monitor", "The monitor against true values, all dense layers", columns, lines, notes
    )

    middle = sorted(probes)[len(probes) // 2]
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [row for row in rows if row["layer"] == layer and row["probes"] == middle]
        line: dict[str, Any] = {"layer": layer}
        for quantity in QUANTITIES:
            low, median, high = quartiles(errors(of_layer, quantity))
            line[f"true_{quantity}"] = float(
                f"{statistics.median(row[f'true_{quantity}'] for row in of_layer):.3g}"
            )
            line |= {quantity: median, f"{quantity}_low": low, f"{quantity}_high": high}
        lines.append(line)
    columns = {"layer": Column("layer")}
    for quantity, words in QUANTITIES.items():
        columns |= {
            f"true_{quantity}": Column(
                f"true {words}, median", digits=4 if quantity == "gradient_norm" else 1
            ),
            quantity: Column("relative error, median", sign=True, digits=2),
            f"{quantity}_low": Column("lower quartile", sign=True, digits=2),
            f"{quantity}_high": Column("upper quartile", sign=True, digits=2),
        }
    return [
        overall,
        Table("monitor_layers", f"By layer, {middle} probes, {looks} looks", columns, lines),
    ]


def draw(rows: list[dict[str, Any]], probes: Sequence[int], path: Path) -> None:
    """Above, estimate against truth, a colour per layer, for the middle number of probes; below,
    errors by layer: medians and quartiles.
    """
    import matplotlib

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    colours = [
        matplotlib.colormaps["viridis"](i / max(len(layers) - 1, 1)) for i in range(len(layers))
    ]
    middle = sorted(probes)[len(probes) // 2]
    with canvas(path, len(QUANTITIES), 0, lines=2) as (_, axes):
        for column, (quantity, words) in enumerate(QUANTITIES.items()):
            above, below = axes[column], axes[len(QUANTITIES) + column]
            for layer, colour in zip(layers, colours, strict=True):
                shown = [row for row in rows if row["layer"] == layer and row["probes"] == middle]
                truth, estimate = (
                    [row[prefix + quantity] for row in shown] for prefix in ("true_", "")
                )
                above.plot(truth, estimate, ".", color=colour, markersize=3)
            ends = [f(row[f"true_{quantity}"] for row in rows) for f in (min, max)]
            above.plot(ends, ends, color="black", linewidth=0.8)
            above.set_xscale("log")
            above.set_yscale("log")
            above.set_title(f"{words}, {middle} probes", fontsize="small")
            above.set_xlabel("true")
            above.set_ylabel("from sketches")
            for number, p in enumerate(sorted(probes)):
                places = [i + 0.25 * (number - (len(probes) - 1) / 2) for i in range(len(layers))]
                found = [
                    quartiles(
                        errors(
                            [r for r in rows if r["layer"] == layer and r["probes"] == p], quantity
                        )
                    )
                    for layer in layers
                ]
                bars = [[m - low for low, m, _ in found], [high - m for _, m, high in found]]
                medians = [m for _, m, _ in found]
                below.errorbar(
                    places,
                    medians,
                    bars,
                    fmt="o",
                    markersize=2.5,
                    linewidth=1,
                    color=f"C{number}",
                    label=f"{p} probes",
                )
            below.axhline(0, color="black", linewidth=0.8)
            below.set_xticks(
                range(len(layers)),
                [layer.removeprefix("blocks.") for layer in layers],
                rotation=90,
                fontsize=7,
            )
            below.set_ylabel("relative error: median, quartiles")
            for panel in (above, below):
                panel.grid(alpha=0.3)
        axes[len(QUANTITIES)].legend(fontsize="x-small", frameon=False)


def readings_csv(rows: list[dict[str, Any]]) -> str:
    """Every reading beside its true value, to six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    return text.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument(
        "--probes",
        type=int,
        nargs="+",
        default=[4, 16, 64],
        help="one or more numbers (default: 4 16 64)",
    )
    parser.add_argument("--every", type=int, default=10, help="steps between looks (default: 10)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/monitor_check"),
        help="folder (default: runs/monitor_check)",
    )
    options = parser.parse_intermixed_args(argv)
    if min(options.probes) < 1 or options.every < 1:
        parser.error("--probes and --every must be at least 1")
    try:
        config = configuration(options.overrides)
        if config.steps <= options.every:
            raise ValueError(
                f"steps={config.steps}: must be more than --every {options.every}, for two "
                "looks at "
                "least"
            )
        rows, held = measure(config, options.probes, options.every)
    except ValueError as error:
        print(f"monitor_check: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "readings.csv", readings_csv(rows))
    for table in tables(rows, held, options.probes):
        print(f"{table.title}\n\n{table.markdown()}")
        table.write(options.out / f"{table.name}.csv")
    draw(rows, options.probes, options.out / "monitor.svg")
    return 0
