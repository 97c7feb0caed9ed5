"""How far runs are: one line for each, from what lies in their folders.

    finished      with all steps
    diverged      the loss was no longer finite; the same run would do so again
    failed        an error ended it; the table says which
    interrupted   by a signal, after saving, or killed: the same command continues it
    running       a process holds the folder's .lock
    waiting       a cell of the last sweep into the folder that has not begun
    refused       only at a sweep's end: it can't begin, and left nothing
    unreadable    a file is damaged; the table says which

Nothing is changed, and a run is not disturbed: a lock is tried for a moment, and only where no
summary says that the run has ended.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness import sweep
from harness.folder.metrics import read_metrics
from harness.folder.rundir import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    read_config,
    read_summary,
)

_ENDED = ("finished", "diverged", "failed", "interrupted")
_MARKS = (CONFIG_FILE, SUMMARY_FILE, METRICS_FILE, LOCK_FILE)  # of the folder of a run
_REASON = 100  # characters


@dataclass(frozen=True)
class Progress:
    """One run. age: seconds since its last row of metrics. losses: training's and validation's."""

    name: str
    status: str
    step: int | None = None
    steps: int | None = None
    losses: tuple[float | None, float | None] = (None, None)
    age: float | None = None
    reason: str = ""

    def columns(self) -> tuple[str, ...]:
        """As texts, in the order of COLUMNS."""
        step = "" if self.step is None else f"{self.step:,}"
        steps = "" if self.steps is None else f" of {self.steps:,}"
        train, validation = ("" if loss is None else f"{loss:.4f}" for loss in self.losses)
        age = "" if self.age is None else duration(self.age)
        return (self.name, self.status, step + steps, train, validation, age, self.reason)


COLUMNS = ("run", "status", "step", "train/loss", "val/loss", "last row", "")


def duration(seconds: float) -> str:
    """One number and its unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def is_held(folder: Path) -> bool:
    """Whether a process works on the run in `folder`; False where locks can't be tried."""
    lock = folder / LOCK_FILE
    if not lock.exists() or not os.access(lock, os.W_OK):
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def progress(folder: Path, name: str) -> Progress:
    """Of the run in `folder`, named `name` in the table."""
    try:
        return _progress(folder, name)
    except (ValueError, OSError) as error:
        return Progress(name, "unreadable", reason=_line(error))


def _progress(folder: Path, name: str) -> Progress:
    summary = read_summary(folder)
    config: Mapping[str, Any] = {}
    if (folder / CONFIG_FILE).exists():
        config = read_config(folder)
    rows, age = [], None
    if (metrics := folder / METRICS_FILE).exists():
        rows, age = read_metrics(metrics), time.time() - metrics.stat().st_mtime
    last = {key: value for row in rows for key, value in row.items()}
    step = max((n for n in (last.get("step"), summary.get("step")) if n is not None), default=None)
    status, reason = summary.get("status"), str(summary.get("reason", ""))
    if status not in ("finished", "diverged") and is_held(folder):
        status, reason = "running", ""
    elif status not in _ENDED:
        status = "interrupted"  # killed: it could not say so
    return Progress(
        name,
        str(status),
        step,
        config.get("steps"),
        (last.get("train/loss"), last.get("val/loss")),
        age,
        _line(reason),
    )


def _line(error: object) -> str:
    """The beginning, in one line."""
    words = " ".join(str(error).split())
    return words if len(words) <= _REASON else words[: _REASON - 3] + "..."


def of_folders(paths: Iterable[Path]) -> list[Progress]:
    """All runs in or below `paths`, the cells that wait there, and the folders that can't be read.

    Raises ValueError naming a path that does not exist, or a damaged record of a sweep.
    """
    found: dict[Path, Progress] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"runs={path}: no such folder")
        records = []
        for folder, files in _folders(path, found):
            if not files.isdisjoint(_MARKS):
                found.setdefault(folder.resolve(), progress(folder, str(folder)))
            if sweep.RECORD in files:
                records.append(folder)
        for folder in records:
            for name in sweep.cells(folder):
                found.setdefault((folder / name).resolve(), Progress(str(folder / name), "waiting"))
    return list(found.values())


def _folders(top: Path, unread: dict[Path, Progress]) -> Iterator[tuple[Path, set[str]]]:
    """`top` and the folders below it that may be a run's, each with the names of its files. Those
    that can't be listed go into `unread`.
    """

    def refused(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a run beside has removed it
            folder = Path(str(error.filename))
            unread[folder.resolve()] = Progress(str(folder), "unreadable", reason=_line(error))

    for name, folders, files in os.walk(top, onerror=refused):
        hidden = {inner for inner in folders if inner.startswith(".")}
        folders[:] = sorted({*folders} - hidden - {"wandb", CHECKPOINT_FOLDER})
        yield Path(name), set(files)


def of_sweep(folder: Path, cells: Mapping[str, str], failed: Mapping[str, str]) -> list[Progress]:
    """The `cells` (sweep.py) of a sweep into `folder`. failed: what is known of failures, by
    the cell's overrides.
    """
    found = []
    for name, overrides in cells.items():
        if any((folder / name / mark).exists() for mark in _MARKS):
            found.append(progress(folder / name, name))
        elif overrides in failed:
            found.append(Progress(name, "refused", reason=_line(failed[overrides])))
        else:
            found.append(Progress(name, "waiting"))
    return found


def table(rows: Iterable[Progress]) -> str:
    """All of `rows`, and how many there are of each kind."""
    rows = list(rows)
    lines = [COLUMNS, *(row.columns() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if place < 2 or place == len(widths) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    counts = Counter(row.status for row in rows)
    order = (*_ENDED, "running", "waiting", "refused", "unreadable")
    total = ", ".join(f"{counts[status]} {status}" for status in order if counts[status])
    return "\n".join([*text, total or "no runs"])
