"""A tracker whose server can't be reached, goes away, or whose helper process is killed: the real
command trains to its end, with the same losses, and says one thing about it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from offline_wandb import clean_environment, history, segments
from tiny import command, losses, train_here
from wandb_server import Server, serving

pytestmark = pytest.mark.slow

WORDS = ("tracker.mode=online", "steps=600", "log.every=10", "eval.every=100")


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("straight") / "run"
    train_here(data, folder, *WORDS, "tracker.mode=disabled")
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


def train(
    data: Path, home: Path, url: str, during: Callable[[int], object] = lambda _: None
) -> tuple[int, str]:
    """Exit code and what was said. during: called with the process's id once some rows are
    written.
    """
    patience = {"WANDB_INIT_TIMEOUT": "4", "WANDB_FINISH_TIMEOUT": "4"}
    process = subprocess.Popen(
        command(data, *WORDS, f"hydra.run.dir={home / 'run'}"),
        cwd=home,
        env=clean_environment(
            **patience, WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40, HOME=str(home)
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, end = home / "run" / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and metrics.read_text().count("\n") > 10:
            during(process.pid)
            break
        time.sleep(0.01)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def test_a_server_that_answers_is_no_trouble(
    data: Path, straight: Path, tmp_path: Path, server: Server
) -> None:
    code, said = train(data, tmp_path, server.url)
    assert code == 0, said
    assert "tracker" not in said
    assert losses(tmp_path / "run") == losses(straight)


def test_a_server_that_can_t_be_reached_leaves_files_to_upload(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    with serving() as gone:
        url = gone.url
    code, said = train(data, tmp_path, url)
    assert code == 0, said
    assert said.count(f"tracker.mode=online: {url} can't be reached") == 1
    assert said.count("tracker") == 1
    assert "Traceback" not in said
    assert losses(tmp_path / "run") == losses(straight)
    _, offline = segments(tmp_path / "run")  # after the one that had begun online
    assert offline.name.startswith("offline-run-")
    assert len(history(offline)) == len(losses(straight))


def test_a_server_that_goes_away_costs_the_mirror_alone(
    data: Path, straight: Path, tmp_path: Path, server: Server
) -> None:
    code, said = train(data, tmp_path, server.url, lambda _: server.die())
    assert code == 0, said
    assert said.count("the tracker has failed (TimeoutError") == 1, said
    assert "Traceback" not in said
    assert losses(tmp_path / "run") == losses(straight)


def test_a_helper_process_that_is_killed_costs_the_mirror_alone(
    data: Path, straight: Path, tmp_path: Path, server: Server
) -> None:
    def kill_helper(process: int) -> None:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        named = {int(c): Path(f"/proc/{c}/cmdline").read_text() for c in children}
        (helper,) = (c for c, name in named.items() if "wandb-core" in name)
        os.kill(helper, signal.SIGKILL)

    code, said = train(data, tmp_path, server.url, kill_helper)
    assert code == 0, said
    assert said.count("the tracker has failed (") == 1, said
    assert "Traceback" not in said
    assert losses(tmp_path / "run") == losses(straight)
