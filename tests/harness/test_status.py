"""What the table of runs says of folders as training, a kill, a disk or a second process leave
them.
"""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import REPOSITORY

from harness import command_line, sweep
from harness.folder import rundir, status
from scripts.status import main


def run_folder(
    folder: Path, summary: dict[str, Any] | None, rows: list[dict[str, Any]] | None = None
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("steps: 2000\n")
    if rows is None:
        rows = [{"step": 990, "train/loss": 2.5}, {"step": 1000, "val/loss": 3.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


CASES: list[tuple[dict[str, Any] | None, str, int, str]] = [
    ({"status": "finished", "step": 2000}, "finished", 2000, ""),
    (
        {"status": "diverged", "reason": "step 7: loss is nan", "step": 7},
        "diverged",
        1000,
        "step 7",
    ),
    ({"status": "failed", "reason": "out of memory"}, "failed", 1000, "out of memory"),
    ({"status": "interrupted", "step": 1004}, "interrupted", 1004, ""),
    ({"status": "running"}, "interrupted", 1000, ""),  # killed: nobody holds it
    (None, "interrupted", 1000, ""),
]


@pytest.mark.parametrize(("summary", "expected", "step", "reason"), CASES)
def test_a_run_is_what_its_folder_says(
    summary: dict[str, Any] | None, expected: str, step: int, reason: str, tmp_path: Path
) -> None:
    found = status.progress(run_folder(tmp_path / "run", summary), "name")
    assert (found.name, found.status, found.step, found.steps) == ("name", expected, step, 2000)
    assert found.losses == (2.5, 3.25)
    assert found.reason.startswith(reason)
    assert found.age is not None
    assert 0 <= found.age < 60


@pytest.mark.parametrize("said", ["running", "interrupted", "failed", None])
def test_a_folder_that_is_held_is_running(said: str | None, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", said and {"status": said, "reason": "before"})
    lock = FileLock(folder / ".lock")
    with lock:
        found = status.progress(folder, "name")
        assert (found.status, found.reason) == ("running", "")
    assert status.progress(folder, "name").status != "running"
    with FileLock(folder / ".lock", timeout=0):
        pass  # to look has not left it held


def test_to_look_writes_nothing(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", {"status": "running"})
    before = sorted(tmp_path.rglob("*"))
    assert main([f"runs={tmp_path}"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("summary.json", "{"), ("config.yaml", "steps: &a [*a]"), ("metrics.jsonl", "x\n{}\n")],
)
def test_a_damaged_file_is_named_and_the_others_are_shown(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "sound", {"status": "finished", "step": 2000})
    damaged_run = run_folder(tmp_path / "damaged", {"status": "finished", "step": 2000})
    (damaged_run / name).write_text(content)
    # wandb's copy of the options and what is hidden are no runs
    run_folder(tmp_path / "sound" / "wandb" / "run" / "files", None)
    run_folder(tmp_path / ".hidden", None)
    assert main([str(tmp_path)]) == 0
    header, damaged, sound, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "status", "step", "train/loss", "val/loss", "last", "row"]
    assert damaged.split()[:2] == [str(tmp_path / "damaged"), "unreadable"]
    assert name in damaged
    assert sound.split()[:7] == [
        str(tmp_path / "sound"), "finished", "2,000", "of", "2,000", "2.5000", "3.2500"
    ]  # fmt: skip
    assert total == "1 finished, 1 unreadable"


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    assert f"runs={tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err


def test_a_folder_that_may_not_be_listed_is_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of another user, say. One that a run beside has removed is none."""
    run_folder(tmp_path / "sound", {"status": "finished", "step": 2000})
    private, gone = tmp_path / "private", tmp_path / "gone"
    private.mkdir()
    gone.mkdir()
    listed = os.scandir

    def scandir(path: str) -> Any:
        if Path(path) in (private, gone):
            number = errno.EACCES if Path(path) == private else errno.ENOENT
            raise OSError(number, os.strerror(number), path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert main([str(tmp_path)]) == 0
    _, *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [str(private), "unreadable"], [str(tmp_path / "sound"), "finished"]
    ]  # fmt: skip
    assert "Permission denied" in lines[0]
    assert total == "1 finished, 1 unreadable"


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["no runs"]


def test_duration() -> None:
    shown = [status.duration(seconds) for seconds in (-1.0, 59.4, 90.0, 7200.0, 200_000.0)]
    assert shown == ["0 s", "59 s", "2 min", "2 h", "2 d"]


def record_of_sweep(folder: Path, *words: str) -> None:
    """What Hydra leaves at the start of `train.py -m`."""
    with initialize_config_dir(config_dir=str(REPOSITORY / "conf"), version_base="1.3"):
        single = [word for word in words if "," not in word]
        values = compose("config", overrides=single, return_hydra_config=True)
    values.hydra.overrides.task = list(words)
    folder.mkdir(exist_ok=True)
    OmegaConf.save(values, folder / sweep.RECORD)


def test_cells_have_the_names_that_hydra_gives_their_folders(tmp_path: Path) -> None:
    words = (
        "experiment=paper",
        "seed=2,0",
        "log.every=7",
        "+data.note='a=b, c'",
        "steps=range(1,3)",
    )
    record_of_sweep(tmp_path, *words)
    cells = sweep.cells(tmp_path)
    assert len(cells) == 6 * 2 * 2  # the rows of the paper come from its experiment
    with initialize_config_dir(config_dir=str(REPOSITORY / "conf"), version_base="1.3"):
        for name, overrides in list(cells.items())[::7]:
            cell = re.split(r" (?=[+\w.]+=)", overrides)
            values = compose("config", overrides=cell, return_hydra_config=True)
            assert name == rundir.run_name(values.hydra.job.override_dirname)


def test_cells_that_have_not_begun_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_of_sweep(tmp_path, "method=basis", "method.rank=0,2,4")
    refused, begun, waits = cells = sweep.cells(tmp_path)
    run_folder(tmp_path / begun, {"status": "finished", "step": 2000})
    (tmp_path / waits).mkdir()  # Hydra makes it before the run looks at anything
    found = status.of_sweep(
        tmp_path, cells, {"method=basis method.rank=0": "method.rank=0: must be"}
    )
    assert [(row.name, row.status) for row in found] == [
        (refused, "refused"), (begun, "finished"), (waits, "waiting")
    ]  # fmt: skip
    assert found[0].reason == "method.rank=0: must be"
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 finished, 2 waiting"


def test_two_sweeps_into_one_folder_end_with_a_table_of_their_own_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "jobs", sweep.Jobs())
    record_of_sweep(tmp_path, "seed=0,1")
    values = OmegaConf.load(tmp_path / sweep.RECORD)
    values.hydra.sweep.dir = str(tmp_path)
    sweep.ReportFailedJobs().on_multirun_start(values)
    mine = sweep.cells(tmp_path)
    run_folder(tmp_path / next(iter(mine)), {"status": "finished", "step": 2000})
    record_of_sweep(tmp_path, "seed=1,2,3")  # begun after the first, which goes on
    command_line._end_of_sweep(sweep.jobs, tmp_path)
    _, *rows, total = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(mine)
    assert total == "1 finished, 1 waiting"


def test_other_names_than_ours_are_not_guessed(tmp_path: Path) -> None:
    record_of_sweep(tmp_path, "seed=0,1")
    record = tmp_path / sweep.RECORD
    record.write_text(record.read_text().replace(sweep.SUBDIR, "${hydra:job.num}"))
    assert sweep.cells(tmp_path) == {}
    assert sweep.cells(tmp_path / "nowhere") == {}
