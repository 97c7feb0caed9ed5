"""eval.py and what it is given: one bad folder is named and the others are reported; options are
refused before the work; a report is whole or not there.
"""

import copy
import errno
import itertools
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_checks import filled
from tiny import evaluate_here, train_here

from experiments.sections import studies
from harness.folder.checkpoint import CheckpointError, Checkpoints
from report import write
from report.checked import fits
from report.results import find_runs
from report.tables import Column, Table


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train_here(data, folder / "sound", "steps=10", "method=exact")
    train_here(data, folder / "spoilt", "steps=10", "method=exact", "seed=1")
    return folder


@pytest.fixture
def both(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def read(file: Path) -> Any:
    return (yaml.safe_load if file.suffix == ".yaml" else json.loads)(file.read_text())


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in values if isinstance(values, dict) else ():
        yield (*path, key)
        yield from leaves(values[key], (*path, key))


def changed(values: Any, path: tuple[Any, ...], value: Any) -> str:
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(values)  # which is YAML too


NAMED = [
    ("summary.json", ("wall_seconds",), "x", "wall_seconds is 'x'"),
    ("summary.json", ("machine",), [], "machine is []"),
    ("summary.json", ("step",), True, "step is True"),
    ("summary.json", ("data",), None, "data is None"),
    ("config.yaml", ("seed",), None, "seed is None"),
    ("config.yaml", ("model", "n_embd"), "16", "model.n_embd is '16'"),
    ("config.yaml", ("activations", "name"), -1, "activations.name is -1"),
    ("config.yaml", ("method", "name"), ["exact"], "method.name is not there"),
    ("config.yaml", ("optim", "lr"), {}, "optim.lr is {}"),
]


@pytest.mark.parametrize(("file", "path", "value", "said"), NAMED, ids=lambda value: str(value))
def test_a_value_of_another_type_is_named_and_the_other_run_reported(
    file: str, path: tuple[str, ...], value: Any, said: str, both: Path
) -> None:
    spoilt = both / "spoilt" / file
    spoilt.write_text(changed(read(spoilt), path, value))
    found, complaints = find_runs([both])
    assert [run.folder.name for run in found] == ["sound"]
    (complaint,) = complaints
    assert f"{spoilt}: damaged" in complaint
    assert said in complaint or ".".join(path) in complaint


@pytest.mark.parametrize("file", ["summary.json", "config.yaml", "run.json"])
def test_no_value_of_a_file_ends_the_report(file: str, both: Path) -> None:
    """Every entry, with a value of another type: the folder is read or named."""
    spoilt = both / "spoilt" / file
    values = read(spoilt)
    tried = 0
    values_tried = itertools.cycle([None, "x", [], -1, {}, True, 1e308, float("nan"), 10**30])
    for path, value in zip(leaves(values), values_tried, strict=False):
        spoilt.write_text(changed(values, path, value))
        found, complaints = find_runs([both / "spoilt"])
        assert len(found) + len(complaints) == 1
        tried += 1
    assert tried >= (5 if file == "run.json" else 40)


def test_no_value_of_a_diverged_run_ends_the_tables(both: Path) -> None:
    """Nothing of such a run is computed again: what its files say goes into the tables."""
    folder = both / "spoilt"
    summary = read(folder / "summary.json") | {"status": "diverged", "diverged_at": 5}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    source = random.Random(0)
    for _ in range(5):
        row = source.randrange(len(rows))
        name = source.choice(sorted(rows[row]))
        spoilt = copy.deepcopy(rows)
        spoilt[row][name] = source.choice([None, "x", [], {}, True, 10**30, float("inf")])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in spoilt))
        report = write.gather([both], studies(), progress=False)
        write.json_text(report.json("command"))
        assert any(run.folder.name == "sound" for group in report.groups for run in group.runs)


def test_types() -> None:
    assert fits(1, float)
    assert not fits(True, float)
    assert not fits(True, int)
    assert fits(None, int | None)
    assert fits(["a"], list[str])
    assert not fits(["a", 1], list[str])
    assert fits({"a": "b"}, dict[str, str])
    assert not fits({"a": 1}, dict[str, str])


REFUSED = [
    (["runs=[]"], "runs=[]: must be a folder or a list of folders"),
    (["runs=[[a]]"], "runs=[['a']]: must be"),
    (["runs=true"], "runs=True: must be"),
    (["runs={a:1}"], "runs={'a': 1}: must be"),
    (["runs=''"], "runs=: must be"),
    (["runs=nowhere"], "runs=nowhere: no such folder"),
    (["out=[1,2]"], "out: Cannot convert"),
    (["out=''"], "out='': must be a path, or null"),
    (["metrics='???'"], "metrics=???: must be given"),
    (["metrics=often"], "metrics: "),
    (["arena=[true]"], "arena: "),
    (["complexity=3.5"], "complexity: "),
    (["times={a:b}"], "times: "),
    (["times=absent.csv"], "times=absent.csv: no such file"),
    (["out=/proc/report"], "out=/proc/report: can't be written (No such file or directory)"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_options_are_refused_by_name_before_the_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("report.write.runs_that_count", lambda *_: pytest.fail("began to work"))
    given = [word.partition("=")[0] for word in words]
    needed = [f"runs={runs}"] * ("runs" not in given) + ["out=o"] * ("out" not in given)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (`said` is what is compared)
        evaluate_here(*words, *needed)
    assert said in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_number_is_one(runs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "sound", tmp_path / "2024")
    evaluate_here("runs=2024", "out=7")
    assert (tmp_path / "7" / "report.md").exists()


def test_runs_on_a_disk_for_reading_need_an_out(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", closed)
    with pytest.raises(ValueError, match=r"out=null: the report goes to .*, which can't be wri"):
        evaluate_here(f"runs={runs}")


def test_a_disk_that_fills_up_leaves_whole_files_and_is_named(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(handle: int) -> None:
        if ".svg" in Path(f"/proc/self/fd/{handle}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=rf"out={out}: No space left on device: .*\.svg"):
            evaluate_here(f"runs={both}", f"out={out}")
    assert not out.exists()  # nothing was whole yet
    evaluate_here(f"runs={both}", f"out={out}")
    assert (out / "report.md").exists()


def test_a_folder_that_is_written_meanwhile_is_read(tmp_path: Path) -> None:
    """A checkpoint that goes between the listing and the reading has a newer one."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    checkpoints.save(1, filled(1), val_loss=1.0)
    stop = threading.Event()

    def train() -> None:
        step = 1
        while not stop.is_set():
            step += 1
            checkpoints.save(step, filled(step), val_loss=1.0 / step)

    writer = threading.Thread(target=train)
    writer.start()
    try:
        for _ in range(15):
            loaded, best = checkpoints.load_latest(), checkpoints.load_best()
            assert loaded is not None
            assert best is not None
            find_runs([tmp_path])
    finally:
        stop.set()
        writer.join()


def test_a_checkpoint_that_goes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, filled(1), val_loss=1.0)
    load, newest = Checkpoints.load, 1

    def slow(path: Path) -> Any:
        nonlocal newest
        if newest < 4:  # the writer is faster three times
            newest += 1
            checkpoints.save(newest, filled(newest), val_loss=1.0 / newest)
        return load(path)

    monkeypatch.setattr(Checkpoints, "load", staticmethod(slow))
    latest = checkpoints.load_latest()
    assert latest is not None
    assert latest.step == 4
    newest = 3
    best = checkpoints.load_best()
    assert best is not None
    assert best.step == 4
    (tmp_path / "step_00000004" / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        checkpoints.load_best()


def test_a_folder_whose_name_is_no_text_is_written_as_an_escape(tmp_path: Path) -> None:
    """Names of files are bytes; Python reads those that are no UTF-8 as surrogates."""
    folder = os.fsdecode(b"runs/caf\xe9")
    rows = Table("runs", "Runs", {"folder": Column("folder")}, [{"folder": folder}])
    report = write.Report([], [], [rows], [f"{folder} is a run."], [])
    write.write(report, tmp_path, command=f"eval.py runs={folder}")
    assert "caf\\udce9 is a run" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "caf\\udce9" in (tmp_path / "runs.csv").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text())["sentences"] == report.sentences
