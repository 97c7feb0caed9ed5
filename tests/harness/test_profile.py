"""A trace of some steps lies in the run folder, and the numbers of the run are those without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny import losses, train_here

from harness.compose import configuration
from harness.profile import FOLDER, SKIPPED


def test_some_steps_are_recorded_and_no_number_changes(tmp_path: Path) -> None:
    train_here(tmp_path, tmp_path / "plain")
    train_here(tmp_path, tmp_path / "run", "profile.steps=3")
    with gzip.open(tmp_path / "run" / FOLDER / "process_0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    steps = [name for name in names if name.startswith("ProfilerStep#")]
    assert steps == [f"ProfilerStep#{SKIPPED + i}" for i in range(3)]
    for work in ("aten::embedding", "Optimizer.step#SGD.step"):  # forward, update
        assert names.count(work) >= 3
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_run_that_ends_before_leaves_what_was_recorded(tmp_path: Path) -> None:
    train_here(tmp_path, tmp_path / "run", "steps=10", "profile.steps=500")
    assert (tmp_path / "run" / FOLDER / "process_0.json.gz").stat().st_size > 0


@pytest.mark.parametrize("steps", [-1, 1001])
def test_as_many_as_a_viewer_can_show(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"^profile.steps={steps}: must be from 0 to 1,000$"):
        configuration([f"profile.steps={steps}"])
