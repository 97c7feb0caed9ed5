"""kill -9 at random moments through one run, the real command: continued, it has the same bits as a
run that nobody killed.

BASIS_KILLS says how many kills a run gets; results/reliability/README.md says how many were tried.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import command, losses, run_command

from harness.folder.checkpoint import Checkpoints

KILLS = int(os.environ.get("BASIS_KILLS", "3"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "basis", "transform"])
def test_a_run_that_is_killed_again_and_again_has_the_same_bits(
    method: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    # A checkpoint after each step: half of the time goes into saves, and so do half of the kills.
    words = [f"method={method}", *(["method.rank=8"] if method == "basis" else [])]
    words += [f"steps={40 * KILLS}", "eval.every=20", "log.every=3", "checkpoint.every=1"]
    done = run_command(
        command(tmp_path, *words, f"hydra.run.dir={tmp_path / 'straight'}"), tmp_path
    )
    assert done.returncode == 0, done.stdout
    run, moments, in_a_save = tmp_path / "killed", random.Random(method), 0
    saved = Checkpoints(run / "checkpoints")
    for kill in range(KILLS):
        process = subprocess.Popen(
            command(tmp_path, *words, f"hydra.run.dir={run}"),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        begun = max(saved.steps(), default=0)
        deadline = time.monotonic() + 120
        while max(saved.steps(), default=0) <= begun + kill % 3 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.wait()
        assert max(saved.steps()) < 40 * KILLS, "the run ended before it was killed"
        in_a_save += any(path.name.startswith(".") for path in saved.folder.iterdir())
    done = run_command(command(tmp_path, *words, f"hydra.run.dir={run}"), tmp_path)
    assert done.returncode == 0, done.stdout
    record_property(f"kills of {method}", f"{KILLS}, {in_a_save} within a save")
    assert losses(run) == losses(tmp_path / "straight")
