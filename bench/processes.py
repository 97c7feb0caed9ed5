"""Processes side by side, each with its log, until they end or the time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GRACE = 30.0  # seconds from the request to stop, in which a run saves its checkpoint
POLL = 0.1


@dataclass
class Process:
    """A command, its log and its environment. code: its exit code; 124 if it never began.
    stopped: whether the time was over before it ended.
    """

    command: list[str]
    log: Path
    folder: Path
    environment: dict[str, str]
    code: int = 124
    stopped: bool = False
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def send(self, number: int) -> None:
        """A signal to the process and its children."""
        assert self.running is not None
        if self.running.poll() is None:
            os.killpg(self.running.pid, number)


def run_all(
    processes: list[Process],
    seconds: float,
    *,
    jobs: int = 1,
    after: Callable[[Process], object] | None = None,
) -> None:
    """Run all, `jobs` at a time; `after` is called as each one ends. When `seconds` are over, those
    that run are asked to stop (SIGTERM), killed after GRACE, and the others do not begin.
    """
    waiting, active = list(processes), list[Process]()
    ends = time.monotonic() + seconds
    try:
        while waiting or active:
            late = time.monotonic() - ends
            if late >= 0:
                for process in waiting:
                    process.stopped = True
                waiting.clear()
                for process in active:
                    if not process.stopped:
                        process.stopped = True
                        process.send(signal.SIGTERM)
                    elif late > GRACE:
                        process.send(signal.SIGKILL)
            while waiting and len(active) < jobs:
                active.append(waiting.pop(0))
                active[-1].start()
            for process in list(active):
                assert process.running is not None
                if (code := process.running.poll()) is not None:
                    process.code = code if code >= 0 else 128 - code  # as a shell says it
                    active.remove(process)
                    if after is not None:
                        after(process)
            if active:
                time.sleep(POLL)
    finally:
        for process in active:
            process.send(signal.SIGKILL)
