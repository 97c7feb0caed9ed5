"""A disk that is full or closed at any write of a run: one message; the same command goes on."""

import errno
import itertools
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from tiny import losses, train_here

from harness.folder import disk, rundir
from harness.folder.checkpoint import Checkpoints
from harness.folder.metrics import MetricsLog


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train_here(data, folder)
    return folder


@contextmanager
def failing(name: str, number: int, after: int = 0) -> Iterator[None]:
    """Within, the flush of each file called like `name` fails, but for the first `after` times."""
    fsync: Callable[[int], None] = os.fsync
    left = [after]

    def refused(handle: int) -> None:
        if name in Path(f"/proc/self/fd/{handle}").readlink().name:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(number, os.strerror(number))
        fsync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refused)
        yield


FILES = {
    "config.yaml": 0,
    "run.json": 0,
    "summary.json": 0,  # that the run is running
    "state.pt": 0,
    "manifest.json": 1,  # of the second checkpoint
    "metrics.jsonl": 1,
}


REFUSED = [(name, errno.ENOSPC) for name in FILES] + [
    ("state.pt", number) for number in (errno.EDQUOT, errno.EROFS, errno.EACCES)
]


@pytest.mark.parametrize(("name", "number"), REFUSED)
def test_each_file_of_a_run_can_be_refused(
    name: str, number: int, straight: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with failing(name, number, FILES[name]), pytest.raises(CompactHydraException) as refusal:
        train_here(data, run)
    said = str(refusal.value)
    assert f"hydra.run.dir={run}: {os.strerror(number)}: {run}/" in said
    assert name in said
    assert len(said.splitlines()) == 1
    assert ("make room there" in said) == (number in disk.FULL)
    assert ("make it writable" in said) == (number in disk.CLOSED)
    if name in ("config.yaml", "run.json"):
        assert not run.exists()
    else:
        steps = Checkpoints(run / "checkpoints").steps()
        assert steps == [10] * FILES[name]
        assert ("the last checkpoint is of step 10" in said) == bool(steps)
        assert rundir.read_summary(run).get("status") in (None, "running", "failed")
    train_here(data, run)
    assert losses(run) == losses(straight)
    assert rundir.read_summary(run)["status"] == "finished"


def test_a_row_that_does_not_fit(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog.log

    def to_a_full_disk(self: MetricsLog, row: dict[str, object]) -> None:
        if row["step"] == 16:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self._file.fileno())
            os.close(full)
        log(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", to_a_full_disk)
        with pytest.raises(
            CompactHydraException, match=r"No space left.*metrics\.jsonl"
        ) as refusal:
            train_here(data, tmp_path)
    assert "free of" in str(refusal.value)
    assert rundir.read_summary(tmp_path)["status"] == "failed"
    train_here(data, tmp_path)
    assert losses(tmp_path) == losses(straight)


def test_a_checkpoint_that_does_not_fit(straight: Path, data: Path, tmp_path: Path) -> None:
    """torch.save makes another error of what the disk said."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CompactHydraException, match=r"File too large: .*state\.pt"):
            train_here(data, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    train_here(data, tmp_path)
    assert losses(tmp_path) == losses(straight)


def test_a_token_cache_that_is_full_is_named_by_its_option(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with (
        failing("train.bin", errno.ENOSPC),
        pytest.raises(CompactHydraException, match=rf"data\.cache_dir={cache}: No space left"),
    ):
        train_here(data, tmp_path / "run", f"data.cache_dir={cache}")
    assert not (tmp_path / "run").exists()
    train_here(data, tmp_path / "run", f"data.cache_dir={cache}")


def test_a_token_cache_that_leads_nowhere_is_named_by_its_option(
    data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tokens").symlink_to(tmp_path / "unmounted" / "tokens")
    with pytest.raises(CompactHydraException, match=rf"data\.cache_dir={cache}: File exists: "):
        train_here(data, tmp_path / "run", f"data.cache_dir={cache}")
    assert not (tmp_path / "run").exists()


def test_the_first_refusal_that_names_a_file_is_the_one_that_is_told() -> None:
    def raised(*errors: Exception) -> Exception:
        for before, error in itertools.pairwise(errors):
            error.__context__ = before
        return errors[-1]

    unnamed = OSError(errno.ENOSPC, "full")
    first, second = (OSError(errno.ENOSPC, "full", f"/{name}") for name in "ab")
    assert disk.first_refusal(raised(unnamed, first, RuntimeError("torch"), second)) is first
    absent, closed = OSError(errno.ENOENT, "absent", "/c"), OSError(errno.EROFS, "closed", "/d")
    assert disk.first_refusal(raised(absent, closed)) is closed
    assert disk.first_refusal(raised(OSError("no number"), ValueError())) is None
