"""A long run takes no more memory, threads and open files at its end than after its first part.

BASIS_LONG_STEPS says how many steps; results/reliability/README.md says what was found for 20,000.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import command

STEPS = int(os.environ.get("BASIS_LONG_STEPS", "4000"))
OPTIONS = ["eval.every=50", "checkpoint.every=100", "log.every=10", "diagnostics.every=100"]
MIB = 1 << 20


def _held(process: int) -> dict[str, int]:
    """Resident bytes, threads and open files of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    return {
        "bytes": 1024 * int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", [("method=basis", "method.rank=8"), ("method=transform",)])
def test_nothing_grows(
    method: tuple[str, ...], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    words = [*method, f"steps={STEPS}", *OPTIONS, f"hydra.run.dir={tmp_path / 'run'}"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        command(tmp_path, *words), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seen: list[tuple[int, dict[str, int]]] = []
    while process.poll() is None:
        if metrics.exists():
            rows = metrics.read_bytes().count(b"\n")
            try:
                seen.append((rows, _held(process.pid)))
            except (FileNotFoundError, KeyError):  # it has just ended
                break
        time.sleep(0.1)
    said, _ = process.communicate()
    assert process.returncode == 0, said.decode()
    last = seen[-1][0]
    early = [held for rows, held in seen if 0.2 * last < rows < 0.4 * last]
    late = [held for rows, held in seen if rows > 0.8 * last]
    assert early
    assert late
    grown = {
        what: max(held[what] for held in late) - max(held[what] for held in early)
        for what in ("bytes", "threads", "files")
    }
    record_property(
        f"long run, {method[0]}", f"{STEPS} steps: {grown} of {early[-1]['bytes'] // MIB} MiB"
    )
    assert grown["bytes"] < 8 * MIB
    assert grown["threads"] <= 0
    assert grown["files"] <= 1  # a checkpoint that is being written
    assert len(said) < 100_000 + 100 * STEPS // 50  # a line for each evaluation
