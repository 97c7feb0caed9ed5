"""A system clock that is set while a run goes on breaks nothing: no time that counts is read from
it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tqdm.std
from tiny import command, losses, run_command, train_here

from data.bar import bar
from harness import command_line
from harness.folder.metrics import read_metrics
from harness.folder.status import progress

DAY = 86_400.0


def jumping() -> Callable[[], float]:
    """time.time, each call a day or two from the one before, forward and back."""
    real, jumps = time.time, itertools.cycle([0.0, DAY, -DAY, 2 * DAY])
    return lambda: real() + next(jumps)


def check(run: Path, straight: Path) -> None:
    """The history is the straight run's, in its order, and durations are those of a short run."""
    assert losses(run) == losses(straight)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    spent = [row["step_seconds"] for row in rows if "step_seconds" in row]
    assert spent
    assert all(0 < seconds < 60 for seconds in spent)
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["wall_seconds"] < 600
    assert progress(run, "run").status == "finished"


def test_a_run_is_begun_and_continued_under_a_clock_that_jumps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (10, 20):
        train_here(data, tmp_path / "straight", f"steps={steps}")
    monkeypatch.setattr(time, "time", jumping())
    monkeypatch.setattr(tqdm.std, "time", time.time)
    for steps in (10, 20):
        train_here(data, tmp_path / "run", f"steps={steps}", "log.progress=true")
    check(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_the_command_under_a_clock_that_jumps(tmp_path: Path) -> None:
    words = ["log.progress=true", "checkpoint.every=20"]
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import itertools, time
            real, jumps = time.time, itertools.cycle([0.0, 86400.0, -86400.0, 172800.0])
            time.time = lambda: real() + next(jumps)
            """
        )
    )
    for name, path in (("straight", {}), ("run", {"PYTHONPATH": str(tmp_path)})):
        for steps in (100, 200):
            where = [f"hydra.run.dir={tmp_path / name}", f"steps={steps}"]
            done = run_command(command(tmp_path, *words, *where), tmp_path, **path)
            assert done.returncode == 0, done.stdout
    check(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_a_bar_goes_on_and_knows_what_is_left(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real, off, shown = time.time, 0.0, io.StringIO()
    monkeypatch.setattr(tqdm.std, "time", lambda: real() + off)
    with bar(total=100, file=shown, mininterval=0.01, disable=False) as steps:
        off = jump
        time.sleep(0.02)
        before = len(shown.getvalue())
        steps.update(50)
        assert len(shown.getvalue()) > before
        assert 0.01 < steps.format_dict["elapsed"] < 10
    assert "50/100 [00:00<00:00" in shown.getvalue()


def test_folders_are_ours_by_who_made_them_not_by_their_time(tmp_path: Path) -> None:
    (older := tmp_path / "older").mkdir()
    command_line._made.clear()  # as if another process had made it
    (ours := tmp_path / "ours").mkdir()
    tomorrow, yesterday = time.time() + DAY, time.time() - DAY
    os.utime(older, (tomorrow, tomorrow))
    os.utime(ours, (yesterday, yesterday))
    older.mkdir(exist_ok=True)
    for folder in (older, ours):
        command_line.remove_if_empty(folder)
    assert older.exists()
    assert not ours.exists()


def test_folders_that_a_run_makes_for_its_checkpoints_are_not_remembered(
    data: Path, tmp_path: Path
) -> None:
    train_here(data, tmp_path / "run", "steps=4", "checkpoint.every=1")
    assert not [name for name in command_line._made if "step" in Path(name).name]
