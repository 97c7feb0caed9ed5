"""The options that the two commands on EMA sketches have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.ema.task import Adaptive


def add_arguments(
    parser: argparse.ArgumentParser, *, steps: int, look: int, adaptive: Adaptive
) -> None:
    """The options that both commands have."""
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ... so many (default: 5)")
    parser.add_argument("--steps", type=int, default=steps, help=f"(default: {steps})")
    parser.add_argument(
        "--look",
        type=int,
        default=look,
        help=f"steps between looks at score and dW (default: {look})",
    )
    parser.add_argument(
        "--share",
        default="1/4",
        help="of the bytes of each layer's input that a method keeps (default: 1/4)",
    )
    parser.add_argument(
        "--adapt-every",
        type=int,
        default=adaptive.every,
        help=f"steps between checks of the rank (default: {adaptive.every})",
    )
    parser.add_argument(
        "--low",
        type=float,
        default=adaptive.low,
        help=f"error below which it falls (default: {adaptive.low})",
    )
    parser.add_argument(
        "--high",
        type=float,
        default=adaptive.high,
        help=f"error above which it rises (default: {adaptive.high})",
    )
    parser.add_argument("--out", type=Path, help="folder (default: one of this name below runs/)")


def adaptive_of(options: argparse.Namespace) -> Adaptive:
    """What the options say about the rank. Raises ValueError naming them."""
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: must be at least 1")
    if options.adapt_every < 1:
        raise ValueError(f"--adapt-every {options.adapt_every}: must be at least 1")
    if not 0.0 <= options.low < options.high:
        raise ValueError(f"--low {options.low}, --high {options.high}: must be 0 <= low < high")
    return Adaptive(options.adapt_every, options.low, options.high)
