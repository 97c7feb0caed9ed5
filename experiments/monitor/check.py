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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from basis.diagnostics.monitor import Monitor
from basis.ops.noise import fold
from data.storage import write_atomic
from experiments.monitor.tables import QUANTITIES, draw, readings_csv, tables
from harness import compose
from harness.build import build_model, check_method, training_text
from harness.config import Config
from harness.device import resolve
from harness.memory import tensor_bytes
from harness.optim import learning_rate, make_optimizer


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
