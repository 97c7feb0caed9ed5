"""The runs of train.py that a GPU session makes, and the tables of what they found.

Tables are CSV by the standard library alone: where matplotlib is, `python eval.py runs=<folder>`
makes the report of the same folder.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = ("exact", "r64", "r32", "r16", "r8", "r1")
FILES = ("config.yaml", "metrics.jsonl", "summary.json")
TINY = ["model.block_size=16", "model.n_layer=1", "model.n_embd=16", "model.n_head=2"]
SHORT = ["eval.every=10", "eval.batches=1", "log.every=5"]


def paper_runs(
    work: Path, *, device: str, data: list[str], steps: int | None, seeds: int, tiny: bool
) -> dict[str, list[str]]:
    """Command lines of the paper's rows by name, seed by seed, so that a seed is complete first.

    A checkpoint is written at the end or when a run is stopped. Steps are small: a CUDA graph
    serves them better than torch.compile, which would take longer than the run.
    """
    size = [f"steps={steps or (20 if tiny else 50_000)}"]
    size += SHORT if tiny else ["log.every=1000", "eval.every=1000"]
    return {
        f"{row}-{seed}": [
            "experiment=paper",
            f"row={row}",
            f"seed={seed}",
            *data,
            *size,
            f"device={device}",
            "compile=false",
            "checkpoint.every=0",
            "tracker.mode=disabled",
            f"hydra.run.dir={work}/paper/{row}-{seed}",
        ]
        for seed in range(seeds)
        for row in (ROWS if not tiny else ("exact", "r1"))
    }


def gpt2_runs(
    work: Path,
    methods: Sequence[str],
    *,
    device: str,
    data: list[str],
    tiny: bool,
) -> dict[str, list[str]]:
    """Command lines of GPT-2 by method. `methods`: options of each, in one string. They differ in
    nothing else; the rate is constant after its rise, so that all can be compared at any step. The
    time decides how many there are.
    """
    size = [*TINY, *SHORT, "steps=40", "optim.warmup_steps=5", "micro_batch_size=2"]
    if not tiny:
        size = ["steps=1000000", "micro_batch_size=16", "precision=bfloat16"]
        size += ["log.every=10", "eval.every=50"]
    return {
        label(method): [
            "model=gpt2",
            *data,
            "data.order=random",
            "optim=adamw",
            "optim.lr=6e-4",
            "optim.schedule=constant",
            *size,
            *method.split(),
            f"device={device}",
            "checkpoint.every=0",
            "checkpoint.best=false",
            "tracker.mode=disabled",
            f"hydra.run.dir={work}/gpt2/{label(method)}",
        ]
        for method in methods
    }


def label(method: str) -> str:
    """A file name for options: their values, those of method and activations first of all."""
    values = [word.partition("=")[2] for word in method.split()]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(values)).strip("-")


def write_runs(folder: Path, names: Sequence[str], out: Path) -> str:
    """Copy the small files of runs in `folder` to `out` and tabulate them there: runs.csv, the last
    of each; curves.csv, validation losses by step. Returns a sentence.
    """
    out.mkdir(parents=True, exist_ok=True)
    last: list[dict[str, Any]] = []
    curves: dict[int, dict[str, Any]] = {}
    for name in names:
        run = folder / name
        if not (run / "metrics.jsonl").exists():
            continue
        (out / name).mkdir(exist_ok=True)
        for file in FILES:
            if (run / file).exists():
                shutil.copyfile(run / file, out / name / file)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        values = {key: value for row in rows for key, value in row.items()}
        ended = json.loads((run / "summary.json").read_text())["status"]
        times = sorted(row["step_seconds"] for row in rows if "step_seconds" in row)
        last.append(
            {
                "run": name,
                "status": ended,
                "step": values.get("step"),
                "milliseconds": 1e3 * times[len(times) // 2] if times else None,
                "val/loss": values.get("val/loss"),
                "train/loss": values.get("train/loss"),
                "mem/peak_bytes": values.get("mem/peak_bytes"),
                "mem/saved_bytes": values.get("mem/saved_bytes"),
            }
        )
        for row in rows:
            if "val/loss" in row:
                curves.setdefault(row["step"], {"step": row["step"]})[name] = row["val/loss"]
    if not last:
        return "no run has begun"
    _write(out / "runs.csv", last, list(last[0]))
    _write(out / "curves.csv", [curves[step] for step in sorted(curves)], ["step", *names])
    done = sum(row["status"] == "finished" for row in last)
    steps = [row["step"] for row in last]
    return f"{len(last)} of {len(names)} runs, {done} finished, steps {min(steps)} to {max(steps)}"


def _write(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
