"""What the harness costs: train.py against a bare PyTorch loop of the same model, method, data and
optimiser.

    python scripts/bench_loop.py method=basis method.rank=32 --steps 200 --rounds 3

Alternates fresh processes, harness then bare, and prints the median seconds per step of each and
their ratio per round, with the first fifth of the steps left out. The bare loop is what a careful
person writes by hand: batches read in order from the token file, forward, backward, optimiser step,
and nothing logged. The harness's time is with its logging, without evaluation.

    python scripts/bench_loop.py device=cuda method=basis method.rank=32 --steps 2000

On CUDA, where a step is launch-bound or cuda_graph=true, the bare loop is a hand-written CUDA graph
of the step, with the text on the device: what it takes is the device's time, and the rest is the
harness's.
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
STRETCH = 20
"""Steps of which the mean is taken: train.py's log.every."""


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
    from harness.folder.metrics import read_metrics

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
        str(REPOSITORY / "scripts" / "bench_loop.py"),
        *overrides,
        "--bare",
        "--steps",
        str(steps),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    means = [
        statistics.fmean(seconds[i : i + STRETCH])
        for i in range(steps // 5, steps - STRETCH + 1, STRETCH)
    ]
    return statistics.median(means)


def bare_loop(overrides: list[str], steps: int) -> list[float]:
    """Seconds of each step of a hand-written loop."""
    import torch

    from basis.noise_key import assign_keys, base_key
    from harness.build import build_model, training_text
    from harness.compose import configuration
    from harness.device import resolve
    from harness.optim import make_optimizer
    from harness.step import CudaGraphs

    config = configuration(overrides)
    runtime = resolve(
        config.device,
        config.precision,
        config.compile,
        cuda_graph=config.cuda_graph,
        small=config.captured_by_default,
    )
    cuda = runtime.device.type == "cuda"
    plain = config.micro_batches == 1 and config.precision == "float32" and not runtime.compile
    if not plain or config.optim.grad_clip is not None or config.optim.schedule != "constant":
        raise ValueError(
            "bench_loop: the bare loop knows one micro-batch, float32, compile=false, constant "
            "rate, no clipping"
        )
    config, prepared, _ = training_text(config, progress=True)
    tokens = prepared.train
    model, _ = build_model(config)
    model.to(runtime.device)
    optimizer = make_optimizer(model, config.optim)
    length, width = config.model.block_size + 1, config.micro_batch_size
    text = torch.from_numpy(tokens.read(0, length * width * steps)).view(steps, width, length)
    text = text.to(runtime.device)
    window, key = text[0].clone(), torch.zeros((), dtype=torch.int64, device=runtime.device)

    def take(step: int) -> None:
        assign_keys(model, key, step=step)
        model(window[:, :-1].contiguous(), window[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    warm_up, replay = 3, None
    graphs = CudaGraphs(runtime.device) if runtime.cuda_graph else None
    seconds = []
    runtime.synchronize()
    for step in range(steps):
        start = time.perf_counter()
        window.copy_(text[step])
        key.fill_(base_key(seed=config.seed, step=step))
        if graphs is None:
            take(step)
        elif step < warm_up:
            graphs.aside(lambda step=step: take(step))  # type: ignore[misc]
        else:
            if replay is None:
                for group in optimizer.param_groups:
                    group["capturable"] = True  # AdamW asks for it
                replay, _ = graphs.record(lambda step=step: take(step))  # type: ignore[misc]
            replay()
        if cuda and step % STRETCH == 0:
            runtime.synchronize()  # as often as train.py does
        seconds.append(time.perf_counter() - start)
    return seconds
