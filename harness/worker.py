"""What is different where a cell of a sweep runs in a process of its own.

Hydra's joblib, submitit and Ray launchers hand `train.main` and the callback of harness/sweep.py to
other processes, by pickle. There the process that the user started can't see what became of a job,
and its signals arrive elsewhere. So a worker

    reports    each job that ends, with a file in the sweep's folder (`Records`)
    stops      after Ctrl-C or a batch system's signal the run saves and its job counts as
               interrupted; jobs that this worker would have begun are interrupted too
    takes one  device of several, for as long as it lives (`take_device`): workers of joblib are
               alike, and each would take the first

A process is a worker if it did not make the callback itself (`Home`).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from filelock import FileLock, Timeout

from data.storage import write_atomic

ECHO = 0.5
"""Seconds in which a signal is the first one again, passed on by what started the program (conda
run, a script that traps it). A person's second Ctrl-C comes later.
"""

_PROCESS = uuid.uuid4().hex  # not the number of the process: jobs may run on other machines

STOP = "stop"  # a file of Records

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to save and stop; see harness/command_line.py."""


@dataclass(frozen=True)
class Home:
    """Where a callback was made. It knows this wherever it is sent."""

    process: str = field(default_factory=lambda: _PROCESS)

    def is_here(self) -> bool:
        """Whether this is the process that made it."""
        return self.process == _PROCESS


class Interrupted(Exception):
    """A job that a signal stopped, or kept from beginning. code: 128 + the signal's number."""

    def __init__(self, code: int) -> None:
        super().__init__("interrupted")
        self.code = code


@dataclass(frozen=True)
class Record:
    """What became of a job. error: in words, None if it went well. code: if it was interrupted."""

    overrides: str
    error: str | None = None
    code: int | None = None


@dataclass(frozen=True)
class Records:
    """The records of one sweep: a folder, made when the first is written.

    watched: whether workers look there for a signal, as none can be sent to them.
    """

    folder: Path
    watched: bool = False

    def write(self, number: int, record: Record) -> None:
        """Keep the record of job `number`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{number}.json", json.dumps(vars(record)))

    def ask_to_stop(self, number: int) -> None:
        """Leave signal `number` for workers that no signal reaches (see `begin`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / STOP, str(number))

    def stop(self) -> int | None:
        """The signal that was left for workers, if there was one."""
        file = self.folder / STOP
        return int(file.read_text(encoding="utf-8")) if file.exists() else None

    def take(self) -> list[Record]:
        """All records, in the order of the jobs. They are deleted."""
        files = sorted(self.folder.glob("*.json"), key=lambda file: int(file.stem))
        found = [Record(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
        shutil.rmtree(self.folder, ignore_errors=True)
        return found


def catch(handler: Callable[[int, FrameType | None], object]) -> None:
    """Have `handler` called for each of SIGNALS."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)  # nohup ignores SIGHUP: the run survives its terminal


class _Signals:
    """code: 128 + the first signal that came; None before. working: whether a job is being done."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.working = False
        catch(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.code = self.code or 128 + number
        if self.working:
            raise KeyboardInterrupt


_signals: _Signals | None = None  # in a worker, from its first job on


def begin(records: Records | None = None) -> None:
    """This process is a worker: from now on a signal between jobs is kept for the next one, also
    one that `records` ask for, if they are watched, now and each second.
    """
    global _signals
    _signals = _signals or _Signals()
    if records is None or not records.watched:
        return
    if (number := records.stop()) is not None:  # a job that waited: it does not begin
        _signals.code = _signals.code or 128 + number
    elif records not in _watched:
        _watched.add(records)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # Ray's processes are begun without
        threading.Thread(target=_watch, args=(records,), daemon=True).start()


_watched: set[Records] = set()


def _watch(records: Records) -> None:
    """Send this process the signal that `records` ask for, once."""
    while (number := records.stop()) is None:
        time.sleep(1)
    os.kill(os.getpid(), number)


@contextmanager
def job() -> Iterator[None]:
    """Around a job. In a worker it raises Interrupted if the job was stopped, or is not to begin;
    elsewhere it does nothing.
    """
    if _signals is None:
        yield
        return
    if _signals.code is not None:
        raise Interrupted(_signals.code)
    _signals.working = True
    try:
        yield
    except SystemExit as end:
        if end.code not in [128 + number for number in SIGNALS]:
            raise  # submitit's own: it has queued the job again
        _signals.code = int(str(end.code))  # the training loop saved, and ends with this
        raise Interrupted(_signals.code) from None
    except KeyboardInterrupt:
        _signals.code = _signals.code or 128 + signal.SIGINT
        raise Interrupted(_signals.code) from None
    finally:
        _signals.working = False


_taken: list[FileLock] = []


def take_device(folder: Path) -> None:
    """Leave this process one of several CUDA devices, the one that fewest other workers have. Locks
    in `folder` say which are taken; they go with the process.

    Must be called before CUDA is used. The second call does nothing.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())]
    if given is not None:
        names = [name for name in given.split(",") if name.strip()]
    if _taken or len(names) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        lock = FileLock(folder / f"device_{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _taken.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
        return
