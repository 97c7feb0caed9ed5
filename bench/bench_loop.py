"""What the harness costs: train.py against a bare PyTorch loop of the same model, method, data and
optimiser.

    python scripts/bench_loop.py method=basis method.rank=32 --steps 200 --rounds 3

Alternates fresh processes, harness then bare, and prints the median seconds per step of each and
their ratio per round, with the first fifth of the steps left out. The bare loop is what a careful
person writes by hand: batches read in order from the token file, forward, backward, optimiser step,
and nothing logged. The harness's time is with its logging, without evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--bare", action="store_true", help=argparse.SUPPRESS
    )  # the child process of one round
    options = parser.parse_args(argv)
    if options.steps < 100 or options.rounds < 1:
        parser.error("--steps must be at least 100, --rounds at least 1")
    if options.bare:
        print(json.dumps(bare_loop(options.overrides, options.steps)))
        return 0
    ratios = []
    print(f"{'round':>5} {'train.py':>12} {'bare loop':>12} {'ratio':>7}")
    for number in range(options.rounds):
        ours, bare = (
            harness_run(options.overrides, options.steps),
            bare_run(options.overrides, options.steps),
        )
        ratios.append(ours / bare)
        print(
            f"{number + 1:>5} {1000 * ours:>9.2f} ms {1000 * bare:>9.2f} ms {ratios[-1]:>7.3f}",
            flush=True,
        )
    print(
        f"median ratio {statistics.median(ratios):.3f} (smallest {min(ratios):.3f}, largest "
        f"{max(ratios):.3f})"
    )
    return 0


def harness_run(overrides: list[str], steps: int) -> float:
    """Median over the rows of metrics of train.py's seconds per step."""
    from harness.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        run_options = [
            f"steps={steps}",
            "eval.every=0",
            "checkpoint.every=0",
            "tracker.mode=disabled",
            f"hydra.run.dir={folder}/run",
        ]
        command = [sys.executable, str(REPOSITORY / "train.py"), *overrides, *run_options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [
            row
            for row in read_metrics(Path(folder) / "run" / "metrics.jsonl")
            if "step_seconds" in row
        ]
    return statistics.median(row["step_seconds"] for row in rows if row["step"] > steps // 5)


def bare_run(overrides: list[str], steps: int) -> float:
    """Median seconds per step of `bare_loop` in a process of its own, over stretches as long as
    train.py's rows.
    """
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        *overrides,
        "--bare",
        "--steps",
        str(steps),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    stretch = 20
    means = [
        statistics.fmean(seconds[i : i + stretch])
        for i in range(steps // 5, steps - stretch + 1, stretch)
    ]
    return statistics.median(means)


def bare_loop(overrides: list[str], steps: int) -> list[float]:
    """Seconds of each step of a hand-written loop."""
    import torch

    import basis
    from harness.build import build_model, training_text
    from harness.config import configuration
    from harness.optim import make_optimizer

    config = configuration(overrides)
    plain = (
        config.micro_batches == 1,
        config.precision == "float32",
        not config.compile,
        config.device != "cuda",
    )
    if not all(plain) or config.optim.grad_clip is not None or config.optim.schedule != "constant":
        raise ValueError(
            "bench_loop: the bare loop knows one micro-batch, float32, eager, constant rate, no "
            "clipping, on the CPU"
        )
    config, prepared, _ = training_text(config, progress=True)
    tokens = prepared.train
    model, _ = build_model(config)
    optimizer = make_optimizer(model, config.optim)
    length, width = config.model.block_size + 1, config.micro_batch_size
    text = torch.from_numpy(tokens.read(0, length * width * steps)).view(steps, width, length)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        basis.set_noise_key(model, seed=config.seed, step=step)
        loss = model(text[step, :, :-1], text[step, :, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds
