"""eval.py and the groups, labels and intervals behind it."""

import csv
import json
import math
from pathlib import Path

import pytest
from tiny import REPOSITORY, run_command, train_here

import eval as evaluation
from harness.results import find_runs, format_mean, group_runs, mean_and_interval


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact, R = 4 and R = 2 at two seeds each, and an unfinished run."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train_here(data, folder / f"exact{seed}", "method=exact", f"seed={seed}")
        for rank in (2, 4):
            train_here(data, folder / f"basis{rank}_{seed}", f"method.rank={rank}", f"seed={seed}")
    train_here(data, folder / "broken", "method.rank=3")
    (folder / "broken" / "summary.json").write_text(json.dumps({"status": "interrupted", "step": 7}))
    return folder


def test_groups_are_ordered_and_named_by_what_differs(runs: Path) -> None:
    found, complaints = find_runs([runs])
    assert [group.label for group in group_runs(found)] == ["exact", "basis R=4", "basis R=2"]
    assert all([run.seed for run in group.runs] == [0, 1] for group in group_runs(found))
    (complaint,) = complaints
    assert "broken is left out: interrupted" in complaint


def test_table_holds_the_runs_own_numbers(runs: Path, tmp_path: Path) -> None:
    evaluation.report([runs], tmp_path)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["exact", "basis R=4", "basis R=2"]
    exact, sketched = (
        [json.loads((runs / f"{name}{s}" / "summary.json").read_text()) for s in (0, 1)] for name in ("exact", "basis4_")
    )
    mean = sum(s["val/loss"] for s in sketched) / 2
    assert rows[1]["val loss"].startswith(f"{mean:.3f} ± ")
    difference = mean - sum(s["val/loss"] for s in exact) / 2
    assert rows[1]["above exact"].startswith(f"{difference:.3f} ± ")
    assert rows[0]["above exact"] == ""
    assert rows[1]["run ids"] == " ".join(s["run_id"] for s in sketched)
    assert (tmp_path / "table.md").read_text().splitlines()[0].startswith("| method")
    assert (tmp_path / "validation_loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "validation_loss.svg").read_text()[:600]


def test_options_that_differ_are_part_of_the_label(runs: Path, tmp_path: Path) -> None:
    train_here(tmp_path, tmp_path / "a", "method.rank=2", "method.hashing=uniform")
    train_here(tmp_path, tmp_path / "b", "method.rank=2", "method.hashing=balanced")
    found, _ = find_runs([tmp_path])
    assert {group.label for group in group_runs(found)} == {"basis R=2 hashing=uniform", "basis R=2 hashing=balanced"}


def test_repeats_count_once_and_pairs_share_everything_but_the_method(runs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    train_here(data, tmp_path / "exact", "method=exact", "steps=12")
    train_here(data, tmp_path / "short", "method.rank=2", "steps=12")
    train_here(data, tmp_path / "longer", "method.rank=2", "steps=16")
    train_here(data, tmp_path / "again", "method.rank=2", "steps=12", "tracker.project=other")
    found, complaints = find_runs([tmp_path, tmp_path])
    assert len(found) == 3
    (complaint,) = complaints
    assert "the same run as" in complaint
    above = {row["method"]: row["above exact"] for row in evaluation.table(group_runs(found))}
    assert above["basis R=2 steps=16"] == ""  # no exact run of 16 steps to compare with
    assert above["basis R=2 steps=12"] != ""


def test_other_text_is_another_group(tmp_path: Path) -> None:
    train_here(tmp_path, tmp_path / "a", "seed=0")
    text = tmp_path / "text.txt"
    text.write_text(text.read_text()[::-1])
    train_here(tmp_path, tmp_path / "b", "seed=1")
    found, _ = find_runs([tmp_path])
    assert [len(group.runs) for group in group_runs(found)] == [1, 1]


def test_one_bad_folder_is_named_and_the_rest_reported(runs: Path, tmp_path: Path) -> None:
    for name, config, summary in (("a", "{bad", "{}"), ("b", "a: 1", "{"), ("c", "a: 1", '{"status": "finished"}')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        (folder / "summary.json").write_text(summary)
    found, complaints = find_runs([runs, tmp_path])
    assert len(found) == 6
    assert all(any(str(tmp_path / name) in complaint for complaint in complaints) for name in "abc")


def test_interval_is_students() -> None:
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-6)  # t(0.975, 2)
    assert mean_and_interval([5.0]) == (5.0, None)
    assert format_mean([5.0]) == "5.000"


def test_command_line(runs: Path, tmp_path: Path) -> None:
    arguments = ["python", str(REPOSITORY / "eval.py")]
    import sys

    arguments[0] = sys.executable
    done = run_command([*arguments, f"runs={runs}", f"out={tmp_path / 'out'}"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert "| basis R=4" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    for wrong, said in (("runs=nowhere", "runs=nowhere: no such folder"), (f"runs={tmp_path}", "no finished run")):
        done = run_command([*arguments, wrong], tmp_path)
        assert done.returncode == 1
        assert said in done.stdout
