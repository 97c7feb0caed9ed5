"""Runs that came to an end, read back from their folders and put into groups that differ in their
seed alone.

A group is named by what tells it from the others (labels.py).
A run that diverged came to an end too: it is a result, without final losses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import flat_options
from harness.folder.metrics import read_metrics
from harness.folder.one_run import check_ids
from harness.folder.rundir import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    FREE_OPTIONS,
    METRICS_FILE,
    SUMMARY_FILE,
    read_config,
    read_summary,
)
from report.checked import check_options, check_rows, check_summary
from report.labels import labels


@dataclass(frozen=True)
class RunResult:
    """A run that finished or diverged: its folder, its options by dotted name, its summary and its
    rows of metrics.
    """

    folder: Path
    options: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        return int(self.options["seed"])

    @property
    def id(self) -> str:
        """The id that it has in the tracker too."""
        return str(self.summary["run_id"])

    @property
    def tuning(self) -> bool:
        """Whether it was made to choose a learning rate only, and enters no average."""
        return bool(self.options["purpose"] == "tuning")

    @property
    def diverged_at(self) -> int:
        """The step whose loss or weights were not finite, of a run that diverged.

        Summaries of older versions do not say it: for those, the last step that was logged.
        """
        return int(self.summary.get("diverged_at", self.summary["step"]))

    @property
    def diverged(self) -> bool:
        """Whether its loss or weights stopped being finite numbers."""
        return bool(self.summary["status"] == "diverged")

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of `metric`, where it was logged."""
        pairs = [(row["step"], row[metric]) for row in self.rows if metric in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def last(self, metric: str) -> float:
        """The last logged value of `metric`, NaN if there is none."""
        return float(next((row[metric] for row in reversed(self.rows) if metric in row), math.nan))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in order of seed.

    options: every option in which the groups of a report differ; None where the label names them
    all. usual: the values that most groups share and that no label repeats.
    """

    label: str
    runs: list[RunResult]
    options: str | None = None
    usual: str = ""

    @property
    def method(self) -> str:
        return str(self.runs[0].options["method.name"])

    @property
    def diverged(self) -> list[RunResult]:
        """Those without final losses."""
        return [run for run in self.runs if run.diverged]

    @property
    def rank(self) -> int | None:
        """R, if the method has one and it is the same in all layers."""
        options = self.runs[0].options
        rank: int | None = None if options.get("method.budget") else options.get("method.rank")
        return rank


def find_runs(paths: Iterable[Path]) -> tuple[list[RunResult], list[str]]:
    """All finished and diverged runs in or below `paths`, copies too, and one sentence for each
    folder that can't be used.

    Raises ValueError if a path does not exist.
    """
    runs: list[RunResult] = []
    complaints: list[str] = []
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"runs={path}: no such folder")
        found, unread = _run_folders(path)
        folders |= {folder.resolve(): folder for folder in sorted(found)}
        complaints += [f"{error.filename} is left out: {error.strerror}" for error in unread]
    for folder in folders.values():
        try:
            runs.append(_read(folder))
        except (OSError, ValueError) as error:
            what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            complaints.append(f"{folder} is left out: {what}{' '.join(str(error).split())}")
    return runs, complaints


def _run_folders(path: Path) -> tuple[set[Path], list[OSError]]:
    """Folders in or below `path` that hold something only a run leaves (one that lost its
    configuration is to be named), and what can't be looked into.

    A folder that goes meanwhile is no matter: a run that is being trained replaces its checkpoints.
    """
    found: set[Path] = set()
    unread: list[OSError] = []
    for name, folders, files in os.walk(path, onerror=unread.append):
        here = Path(name)
        if not {CONFIG_FILE, SUMMARY_FILE, METRICS_FILE}.isdisjoint(files):
            found.add(here)
        elif CHECKPOINT_FOLDER in folders:
            inside = next(os.walk(here / CHECKPOINT_FOLDER), ("", [], []))[1]
            found |= {here for checkpoint in inside if checkpoint.startswith("step_")}
        if here in found:  # thousands of files of no interest
            folders[:] = [f for f in folders if f not in (CHECKPOINT_FOLDER, "wandb")]
    return found, [error for error in unread if not isinstance(error, FileNotFoundError)]


def _read(folder: Path) -> RunResult:
    """The run in `folder`. Raises ValueError, naming the file that is damaged, if it has not ended
    or can't be read.
    """
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(f"it has no {CONFIG_FILE}, so what was run is not known")
    summary = read_summary(folder)
    if summary.get("status") not in ("finished", "diverged"):
        reason = summary.get("reason", "the command that started it continues it")
        raise ValueError(f"{summary.get('status', 'without summary.json')}, {reason}")
    check_summary(summary, folder / SUMMARY_FILE)
    check_ids(folder)
    config = read_config(folder)
    # Of these a whole file holds something, whatever version wrote it; defaults in their place
    # would make it another run.
    missing = [
        name for name in ("steps", "seed", "model", "method", "data", "optim") if name not in config
    ]
    if missing:
        raise ValueError(f"{folder / CONFIG_FILE}: damaged, without {', '.join(missing)}")
    options, rows = flat_options(config), read_metrics(folder / METRICS_FILE)
    if not isinstance(options.get("method.name"), str):
        raise ValueError(f"{folder / CONFIG_FILE}: damaged, method.name is not there")
    check_options(options, config, folder / CONFIG_FILE)
    check_rows(rows, folder / METRICS_FILE)
    run = RunResult(folder, options, summary, rows)
    last = max(run.series("val/loss")[0], default=None)
    if not run.diverged and last != summary["step"]:
        ends = (
            "holds no validation loss"
            if last is None
            else f"its last validation loss is of step {last:,}"
        )
        raise ValueError(
            f"{folder / METRICS_FILE}: damaged, {ends}, and the run ended at {summary['step']:,}"
        )
    return run


def copies_by_run(runs: Iterable[RunResult]) -> list[list[RunResult]]:
    """For each run the folders that hold a copy of it, the one that got furthest first.

    Which copy counts is for the caller to find: a copy may be damaged.
    """
    same: dict[str, list[RunResult]] = {}
    for run in runs:
        same.setdefault(repr((_identity(run), run.seed, run.tuning)), []).append(run)
    return [sorted(members, key=lambda run: -run.summary["step"]) for members in same.values()]


# Options in which runs may differ and still be the same experiment: none of them changes a loss.
_SAME_EXPERIMENT = (*FREE_OPTIONS, "seed", "experiment_name", "purpose", "device", "eval.every")
_OF_THE_METHOD = ("method.", "adaptive_rank.")


def loss_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's flat view the options that change a loss, without the seed, in order of name."""
    return dict(sorted((k, v) for k, v in options.items() if not k.startswith(_SAME_EXPERIMENT)))


def _identity(run: RunResult) -> dict[str, Any]:
    """What two runs must share to be seeds of one group: options that change the loss, and the text
    itself.
    """
    return loss_options(run.options) | {"text": run.summary["data"]}


def _key(run: RunResult, *, only: tuple[str, ...] = ("",), without: tuple[str, ...] = ()) -> str:
    """The part of a run's identity under names that start with `only` and not with `without`."""
    found = {
        name: value
        for name, value in _identity(run).items()
        if name.startswith(only) and not name.startswith(without)
    }
    return repr(found)


def setting(run: RunResult) -> str:
    """What two runs must share to be compared at all: everything but the method. Runs of equal
    setting and seed are pairs.
    """
    return _key(run, without=_OF_THE_METHOD)


def contender(run: RunResult) -> str:
    """What runs share that differ in seed and learning rate alone."""
    return _key(run, without=("optim.lr",))


def model_and_text(run: RunResult) -> str:
    """What runs share whose final losses may be compared, however they were reached."""
    return _key(run, only=("model.", "text"))


def group_runs(runs: Sequence[RunResult]) -> list[Group]:
    """Groups of equal options except the seed: exact first, then by method, rank (largest first)
    and the rest.
    """
    by_identity: dict[str, list[RunResult]] = {}
    for run in runs:
        by_identity.setdefault(repr(_identity(run)), []).append(run)
    names = labels([_identity(members[0]) for members in by_identity.values()])
    groups = []
    for name, members in zip(names, by_identity.values(), strict=True):
        options = name.full if name.full != name.short else None
        groups.append(
            Group(name.short, sorted(members, key=lambda run: run.seed), options, name.usual)
        )
    return sorted(groups, key=lambda g: (g.method != "exact", g.method, -(g.rank or 0), g.label))


def differing_options(runs: Sequence[RunResult]) -> list[str]:
    """For each of some runs, the options other than the method's in which they differ: "steps=100
    optim.lr=0.1", or "".

    An option that a run has not, such as SUS's where attention is exact, is not named of it.
    """
    identities = [
        {k: v for k, v in _identity(run).items() if not k.startswith(_OF_THE_METHOD)}
        for run in runs
    ]
    every = sorted({name for identity in identities for name in identity})
    names = [
        name
        for name in every
        if any(other.get(name) != identities[0].get(name) for other in identities)
    ]
    return [
        " ".join(
            f"{name}={identity[name]}" for name in names if name in identity and name != "text"
        )
        for identity in identities
    ]
