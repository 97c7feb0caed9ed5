"""Runs as processes, so many at a time, each with its share of the cores and on CUDA a device.
Their output goes to logs. A signal lets every run save first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch

from experiments.arena.plan import Cell
from harness.command_line import StopRequest

REPOSITORY = Path(__file__).resolve().parents[2]


class Process(Protocol):
    """What the pool asks of a run that is under way, as subprocess.Popen answers it."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Mapping[str, str], IO[bytes]], Process]
"""Starts train.py with overrides, an environment, and a file for what it prints."""


def start_process(
    overrides: Sequence[str], environment: Mapping[str, str], output: IO[bytes]
) -> Process:
    """Start a fresh process. It gets a session of its own, so that Ctrl-C reaches it once, through
    the pool.
    """
    command = [sys.executable, str(REPOSITORY / "train.py"), *overrides]
    return subprocess.Popen(
        command, stdout=output, stderr=output, env=environment, start_new_session=True
    )


@dataclass
class Job:
    """A run that is under way in a slot."""

    cell: Cell
    slot: int
    process: Process
    output: IO[bytes]
    log: Path
    started: float


class Pool:
    """Runs cells as processes, so many at a time; remembers which failed."""

    def __init__(
        self, jobs: int, threads: int, logs: Path, stop: StopRequest, start: Start = start_process
    ) -> None:
        self.jobs, self.threads, self.logs, self.stop = jobs, threads, logs, stop
        self.start = start
        self.failed: list[Cell] = []
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = (
            devices.split(",") if devices else [str(i) for i in range(torch.cuda.device_count())]
        )

    def run(self, cells: Sequence[Cell]) -> None:
        """Those of `cells` that have not ended yet, in order; returns when all have, or soon after
        a signal.
        """
        waiting = [c for c in cells if c.state() in ("new", "started")]
        if cells:
            print(
                f"{len(cells)} runs, {len(cells) - len(waiting)} of them ended before", flush=True
            )
        total, running = len(waiting), list[Job]()
        while waiting or running:
            if self.stop.code is not None:
                waiting = []
                for job in running:
                    job.process.terminate()  # it finishes its step, saves and leaves
                for job in running:
                    job.process.wait()
            while waiting and len(running) < self.jobs:
                free = next(
                    slot for slot in range(self.jobs) if all(job.slot != slot for job in running)
                )
                running.append(self._start(waiting.pop(0), free))
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                job.output.close()
                print(
                    f"[{total - len(waiting) - len(running)}/{total}] {self._ended(job)}",
                    flush=True,
                )
            if running:
                time.sleep(0.2)

    def _start(self, cell: Cell, slot: int) -> Job:
        environment = {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            **os.environ,
        }
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{cell.folder.parent.name}_{cell.folder.name}.txt"
        output = log.open("wb")
        process = self.start(cell.overrides, environment, output)
        return Job(cell, slot, process, output, log, time.perf_counter())

    def _ended(self, job: Job) -> str:
        """What became of it, in a line; a failure is noted."""
        state, seconds = job.cell.state(), time.perf_counter() - job.started
        if state == "finished":
            return f"{job.cell.name}: val/loss {job.cell.loss():.4f}, {seconds:.0f} s"
        if state == "diverged":
            return f"{job.cell.name}: diverged"
        if self.stop.code is not None:
            return f"{job.cell.name}: stopped; the same command continues"
        self.failed.append(job.cell)
        last = job.log.read_text(errors="replace").strip().splitlines()[-6:]
        return "\n    ".join(
            [f"FAILED {job.cell.name}, exit code {job.process.returncode}, {job.log}:", *last]
        )
