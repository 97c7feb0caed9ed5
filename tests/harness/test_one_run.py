"""Files of another run in a folder, and history that is lost: refused by name, nothing changed."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import CompactHydraException
from tiny import evaluate_here, losses, train_here

from harness.folder import rundir
from harness.folder.checkpoint import Checkpoints
from harness.folder.manifest import write_manifest
from harness.trained import load_trained
from report.recompute import runs_that_count
from report.results import find_runs


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs of 20 steps, alike in everything but the id."""
    folder = tmp_path_factory.mktemp("two")
    train_here(data, folder / "one")
    train_here(data, folder / "other")
    return folder / "one", folder / "other"


@pytest.fixture
def run(two: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the first of two runs, to be spoilt."""
    return Path(shutil.copytree(two[0], tmp_path / "runs" / "run"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identity(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["id"])


def replace(name: str) -> Callable[[Path, Path], None]:
    """Put one file or folder of the other run in place of the run's own."""

    def act(run: Path, other: Path) -> None:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
            shutil.copytree(other / name, run / name)
        else:
            shutil.copy(other / name, run / name)

    return act


MIXED = ["checkpoints", "checkpoints/step_00000010", "run.json", "summary.json"]


@pytest.mark.parametrize("steps", [20, 30], ids=["finished", "continued"])
@pytest.mark.parametrize("name", MIXED)
def test_a_file_of_another_run_is_refused_with_both_ids(
    name: str, steps: int, two: tuple[Path, Path], run: Path, data: Path
) -> None:
    replace(name)(run, two[1])
    before = contents(run)
    with pytest.raises(CompactHydraException, match="more than one run") as refusal:
        train_here(data, run, f"steps={steps}")
    assert f"run {identity(two[0])}" in str(refusal.value)
    assert f"run {identity(two[1])}" in str(refusal.value)
    assert contents(run) == before


@pytest.mark.parametrize("name", MIXED)
def test_a_mixed_folder_is_left_out_of_a_report_and_not_loaded(
    name: str, two: tuple[Path, Path], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(name)(run, two[1])
    shutil.copytree(two[1], run.parent / "sound")
    evaluate_here(f"runs={run.parent}", f"out={run.parent.parent / 'out'}")
    assert f"{run} is left out: {run} holds files of more than one run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="more than one run"):
        load_trained(run)


def test_a_checkpoint_of_a_version_without_ids_in_manifests_is_known_by_its_state(
    two: tuple[Path, Path], run: Path, data: Path
) -> None:
    replace("checkpoints")(run, two[1])
    for path in (run / "checkpoints").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        write_manifest(path, {k: manifest[k] for k in ("step", "val_loss")}, ["state.pt"])
    with pytest.raises(CompactHydraException, match="more than one run"):
        train_here(data, run, "steps=30")


def cut(bytes_kept: Callable[[int], int]) -> Callable[[Path], None]:
    def act(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: bytes_kept(len(content))])

    return act


def change_a_digit(file: Path) -> None:
    content = file.read_bytes()
    place = content.index(b"val/loss") + len(b'val/loss": 2')
    file.write_bytes(content[:place] + content[place:].replace(b"1", b"2", 1))


def without_first_row(file: Path) -> None:
    file.write_bytes(file.read_bytes().partition(b"\n")[2])


LOST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (Path.unlink, "is gone"),
    "emptied": (cut(lambda size: 0), "has 0 bytes of the"),
    "cut in half": (cut(lambda size: size // 2), "bytes of the"),
    "without its last row": (cut(lambda size: size - 2), "bytes of the"),
    "without its first row": (without_first_row, "bytes of the"),
    "a digit changed": (change_a_digit, "does not hold the same rows any more"),
}


@pytest.mark.parametrize(("spoil", "said"), LOST.values(), ids=LOST)
def test_lost_rows_are_refused_by_the_name_of_the_file(
    spoil: Callable[[Path], Any], said: str, run: Path, data: Path
) -> None:
    spoil(run / "metrics.jsonl")
    before = contents(run)
    with pytest.raises(CompactHydraException, match=said) as refusal:
        train_here(data, run, "steps=30")
    assert str(run / "metrics.jsonl") in str(refusal.value)
    assert contents(run) == before
    found, complaints = find_runs([run])
    _, _, more = runs_that_count(found, progress=False)
    assert any("metrics.jsonl" in line for line in complaints + more)


@pytest.mark.parametrize("name", ["deleted", "emptied", "cut in half", "without its first row"])
def test_lost_rows_are_noticed_beside_a_checkpoint_of_an_older_version(
    name: str, run: Path, data: Path
) -> None:
    checkpoints = Checkpoints(run / "checkpoints")
    loaded = checkpoints.load_latest()
    assert loaded is not None
    del loaded.state["metrics"]
    torch.save(loaded.state, loaded.path / "state.pt")
    write_manifest(loaded.path, {"step": 20, "val_loss": loaded.val_loss}, ["state.pt"])
    whole = (run / "metrics.jsonl").read_bytes()
    LOST[name][0](run / "metrics.jsonl")
    with pytest.raises(CompactHydraException, match=r"metrics\.jsonl"):
        train_here(data, run, "steps=30")
    (run / "metrics.jsonl").write_bytes(whole)
    train_here(data, run, "steps=30")


def test_a_lost_run_file_is_named_and_made_again(
    run: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = json.loads((run / "run.json").read_text())
    (run / "run.json").unlink()
    with caplog.at_level(logging.WARNING):
        train_here(data, run, "steps=30")
    assert f"run.json is gone; it is made again for run {before['id']}" in caplog.text
    assert json.loads((run / "run.json").read_text()) == before


def test_lost_checkpoints_do_not_cost_the_history(run: Path, data: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with pytest.raises(CompactHydraException, match=r"saved at step 20 and holds no checkpoint"):
        train_here(data, run, "steps=30")
    assert contents(run) == before


def test_a_lost_newest_checkpoint_is_named(
    run: Path, data: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    with caplog.at_level(logging.WARNING):
        train_here(data, run, "steps=30")
    assert "the steps after 10 are computed again" in caplog.text
    train_here(data, tmp_path / "straight", "steps=30")
    assert losses(run) == losses(tmp_path / "straight")
    assert rundir.read_summary(run)["saved_step"] == 30


@pytest.mark.slow
def test_no_damage_to_a_file_is_used_in_silence(
    two: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    """A bit flipped, a file cut or deleted: the run is refused in a message about its folder, or
    goes on as if nothing had happened, to the last bit.
    """
    train_here(data, tmp_path / "straight", "steps=24")
    source, refused, same = random.Random(0), 0, 0
    files = [f.relative_to(two[0]) for f in two[0].rglob("*") if f.is_file() and f.name != ".lock"]
    for number in range(200):
        run = Path(shutil.copytree(two[0], tmp_path / f"run{number}"))
        file = run / source.choice(sorted(files))
        content = bytearray(file.read_bytes())
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        damage = source.choice(["flip", "cut", "delete"])
        if damage == "delete":
            file.unlink()
        else:
            cut = source.randrange(len(content)) if damage == "cut" else None
            file.write_bytes(content[:cut])
        try:
            train_here(data, run, "steps=24")
        except CompactHydraException as error:
            refused += str(run) in str(error)
        else:
            assert losses(run) == losses(tmp_path / "straight"), (file, damage)
            same += 1
        shutil.rmtree(run)
    assert refused + same == 200
    assert refused > 40
    assert same > 80
