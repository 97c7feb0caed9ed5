"""Folders that may be read alone, as the real command meets them: one message that names the
folder, before training, and nothing is written. What needs no writing works.

The folder is mounted read-only over itself, in a namespace of the command's own: file modes do not
bind root.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import command, losses, train_here

MOUNT = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'


def closed(folder: Path, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, for which `folder` is read-only. Skips the test where nothing can be mounted."""
    there = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(folder)]
    try:
        tried = subprocess.run([*there, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare, of Linux")
    if tried.returncode != 0:
        pytest.skip("needs the right to mount in a namespace")
    return subprocess.run(
        [*there, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def nothing(data: Path, place: Path) -> None:
    """An empty folder."""


def begun(data: Path, place: Path) -> None:
    """A run that has more steps to take."""
    train_here(data, place, "steps=10")


def over(data: Path, place: Path) -> None:
    train_here(data, place)


REFUSED = [
    (nothing, "train.py", ["hydra.run.dir={}/run"], "hydra.run.dir={}/run: "),
    (nothing, "train.py", ["hydra.run.dir={}"], "{}: a run writes here"),
    (begun, "train.py", ["hydra.run.dir={}"], "{}: a run writes here"),
    (nothing, "train.py", ["data.cache_dir={}"], "data.cache_dir={}: "),
    (nothing, "train.py", ["-m", "hydra.sweep.dir={}/sweep", "seed=0,1"], "hydra.sweep.dir={}"),
    (over, "eval.py", ["runs={}", "out={}/report"], "out={}/report: "),
]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "script", "words", "said"), REFUSED)
def test_it_is_named_and_nothing_is_written(
    before: Callable[[Path, Path], None],
    script: str,
    words: list[str],
    said: str,
    data: Path,
    tmp_path: Path,
) -> None:
    (place := tmp_path / "closed").mkdir()
    (here := tmp_path / "here").mkdir()
    before(data, place)
    found = contents(place)
    words = [word.format(place) for word in words]
    if script == "train.py":
        arguments = command(data, *words)
    else:
        arguments = [*command(data, script=script)[:2], *words]
    done = closed(place, arguments, here)
    assert done.returncode == 1, done.stdout
    assert said.format(place) in done.stdout
    assert len([line for line in done.stdout.splitlines() if script in line]) == 1, done.stdout
    assert "Traceback" not in done.stdout
    assert "step " not in done.stdout
    assert contents(place) == found
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_what_is_read_alone_may_be_closed(data: Path, tmp_path: Path) -> None:
    """Prepared tokens, a finished run that is begun again, and runs that a report is made of."""
    over(data, tmp_path / "run")
    words = [f"hydra.run.dir={tmp_path / 'other'}"]
    done = closed(data / "cache", command(data, *words), tmp_path)
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path / "other") == losses(tmp_path / "run")

    found = contents(tmp_path / "run")
    done = closed(tmp_path / "run", command(data, f"hydra.run.dir={tmp_path / 'run'}"), tmp_path)
    assert done.returncode == 0, done.stdout
    assert "is finished" in done.stdout

    python, script = command(data, script="eval.py")[:2]
    report = [python, script, f"runs={tmp_path / 'run'}", f"out={tmp_path / 'report'}"]
    done = closed(tmp_path / "run", report, tmp_path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "report" / "report.md").exists()
    assert contents(tmp_path / "run") == found
