"""What eval.py says of damaged folders and of copies of a run, and which copy counts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import train_here

from report import write
from report.results import copies_by_run, find_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run."""
    train_here(
        tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs") / "run", "method.rank=4"
    )
    return next(iter(tmp_path_factory.getbasetemp().glob("runs*/run")))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def set_status(folder: Path, status: str, **more: object) -> None:
    file = folder / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": status} | more))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shutil.rmtree(folder / "checkpoints"),
        lambda folder: cut(folder / "checkpoints" / "step_00000020" / "state.pt"),
        lambda folder: (folder / "metrics.jsonl").unlink(),
        lambda folder: set_status(folder, "interrupted", step=13),
    ],
)
def test_a_damaged_copy_does_not_take_the_place_of_a_sound_one(
    run: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for name in ("a0", "a1", "a2"):
        shutil.copytree(run, tmp_path / name)
    damage(tmp_path / "a0")
    report = write.gather([tmp_path], progress=False)
    (group,) = report.groups
    assert [found.folder.name for found in group.runs] == ["a1"]
    assert any(line.startswith(f"{tmp_path / 'a0'} is left out: ") for line in report.complaints)
    assert (
        f"{tmp_path / 'a2'} is left out: the same run as {tmp_path / 'a1'}, which counts once"
        in report.complaints
    )
    assert len(report.complaints) == 2


def test_of_copies_the_furthest_counts(run: Path, tmp_path: Path) -> None:
    for name in ("a0", "a1"):
        shutil.copytree(run, tmp_path / name)
    set_status(tmp_path / "a0", "diverged", step=12, reason="step 13: the training loss is nan")
    found, _ = find_runs([tmp_path])
    (members,) = copies_by_run(found)
    assert [member.folder.name for member in members] == ["a1", "a0"]
    (group,) = write.gather([tmp_path], progress=False).groups
    assert [found.folder.name for found in group.runs] == ["a1"]


def test_a_run_that_only_tuned_counts_once_and_needs_no_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    for name in ("a0", "a1"):
        shutil.copytree(run, tmp_path / name)
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace("purpose: training", "purpose: tuning"))
        shutil.rmtree(tmp_path / name / "checkpoints")
    shutil.copytree(run, tmp_path / "b")
    report = write.gather([tmp_path], progress=False)
    assert [found.folder.name for group in report.groups for found in group.runs] == ["b"]
    assert report.complaints == [
        f"{tmp_path / 'a1'} is left out: the same run as {tmp_path / 'a0'}, which counts once"
    ]


@pytest.mark.parametrize("left", ["metrics.jsonl", "summary.json", "checkpoints"])
def test_a_run_without_configuration_is_named(run: Path, tmp_path: Path, left: str) -> None:
    shutil.copytree(run, tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    found, complaints = find_runs([tmp_path])
    assert found == []
    assert complaints == [
        f"{tmp_path / 'a'} is left out: it has no config.yaml, so what was run is not known"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b'{"status": '),
        ("summary.json", b"[]"),
        ("summary.json", b"\xff\xfe"),
        ("summary.json", b'{"status": "finished"}'),
        ("config.yaml", b"{bad"),
        ("config.yaml", b"- 1"),
        ("config.yaml", b"word"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("config.yaml", b""),
        ("config.yaml", None),
        ("metrics.jsonl", b""),
        ("metrics.jsonl", b'{"step": 0}\n{"st\n{"step": 20}\n'),
        ("metrics.jsonl", None),
    ],
)
def test_a_damaged_file_is_named(
    run: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """content: what stands in the file; None: its first half."""
    shutil.copytree(run, tmp_path / "a")
    file = tmp_path / "a" / name
    if content is None:
        cut(file)
    else:
        file.write_bytes(content)
    found, complaints = find_runs([tmp_path])
    assert found == []
    (complaint,) = complaints
    assert complaint.startswith(f"{tmp_path / 'a'} is left out: {file}")


def test_a_configuration_other_than_the_checkpoints_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "a")
    file = tmp_path / "a" / "config.yaml"
    file.write_text(file.read_text().replace("rank: 4", "rank: 5"))
    said = (
        rf"a is left out: {file}: not what its checkpoint was trained with \(method.rank differ\)"
    )
    with pytest.raises(ValueError, match=said):
        write.gather([tmp_path], progress=False)
