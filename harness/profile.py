"""`profile.steps=10`: what a few steps of a run do, operator by operator, for PyTorch's viewers.

    python train.py profile.steps=10

After `SKIPPED` steps of this start, which allocate, choose kernels and compile, so many steps are
recorded by torch.profiler. Into the run folder go

    profile/process_0.json.gz     a trace: open it in https://ui.perfetto.dev
    profile/process_0.pickle      on CUDA, each allocation: open it in https://pytorch.org/memory_viz

a file for each process of the run. A later start with the option replaces them.

Cost: recorded steps take longer, and `step_seconds` of their rows shows it; numbers do not change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from harness.world import here

FOLDER = "profile"
SKIPPED = 5
MOST = 1000
"""Steps; a trace of more is too large for the viewers."""
_ALLOCATIONS = 200_000


@dataclass(frozen=True)
class ProfileOptions:
    """steps: to record, 0 for none."""

    steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= MOST:
            raise ValueError(f"profile.steps={self.steps}: must be from 0 to {MOST:,}")


@contextmanager
def profiled(options: ProfileOptions, run_dir: Path) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step. Files are written when the last step to record is
    done, or when the block ends before.
    """
    if not options.steps:
        yield _nothing
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start and its end
    name = run_dir / FOLDER / f"process_{here().rank}"
    cuda = torch.cuda.is_available()

    def write(done: profile) -> None:
        name.parent.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(f"{name}.json.gz")
        if cuda:
            torch.cuda.memory._dump_snapshot(f"{name}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
    with profile(
        activities=activities,
        # The profiler itself has to be warm: the last of the skipped steps is for that.
        schedule=schedule(wait=SKIPPED - 1, warmup=1, active=options.steps, repeat=1),
        on_trace_ready=write,
    ) as recording:
        yield recording.step


def _nothing() -> None:
    pass
