"""A run small enough to be trained in a test: a one-layer GPT on characters of a made-up text."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from composed import composed
from omegaconf import DictConfig, OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]

MODEL = [
    "model.vocab_size=null",
    "model.block_size=16",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
]
QUICK = [
    "steps=20",
    "eval.every=10",
    "eval.batches=2",
    "eval.batch_size=4",
    "checkpoint.every=10",
    "log.every=4",
]


def overrides(folder: Path) -> list[str]:
    """Overrides for a tiny run on a text that is written into `folder`; prepared tokens go there
    too.
    """
    text = folder / "text.txt"
    if not text.exists():
        words = [
            "to",
            "be",
            "or",
            "not",
            "that",
            "is",
            "the",
            "question",
            "whether",
            "nobler",
            "in",
            "mind",
        ]
        source = random.Random(0)
        text.write_text("\n".join(" ".join(source.choices(words, k=8)) for _ in range(800)))
    data = [
        "data=text",
        f"data.path={text}",
        "data.tokenizer=char",
        f"data.cache_dir={folder / 'cache'}",
    ]
    return [*data, *MODEL, *QUICK, "tracker.mode=disabled"]


def values_of(folder: Path, *more: str) -> DictConfig:
    """The configuration of a tiny run."""
    return composed(*overrides(folder), *more)


def train_here(folder: Path, run_dir: Path, *more: str) -> None:
    """The work of train.py in this process."""
    import train

    train.execute(values_of(folder, *more), run_dir)


def evaluate_here(*words: str) -> None:
    """The work of eval.py in this process."""
    evaluate = importlib.import_module("eval").evaluate
    evaluate(composed(*words, name="eval"))


def rewrite_config(run_dir: Path, values: dict[str, Any]) -> None:
    """Another configuration in the folder of a run, as an older version wrote it, say."""
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))


def command(folder: Path, *more: str, script: str = "train.py") -> list[str]:
    """The command line of a tiny run."""
    options = [
        argument for argument in more if argument == "-m"
    ]  # argparse wants them before the overrides
    return [
        sys.executable,
        str(REPOSITORY / script),
        *options,
        *overrides(folder),
        *(a for a in more if a not in options),
    ]


def run_command(
    arguments: list[str], cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr together in `.stdout`."""
    return subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def losses(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics without what a clock or the operating system says."""
    from harness.folder.metrics import read_metrics

    timed = ("step_seconds", "tokens_per_second", "mem/rss_bytes")
    return [
        {k: v for k, v in row.items() if k not in timed}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]
