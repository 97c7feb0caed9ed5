"""How train.py and eval.py answer on a command line: a refusal is one message, nothing is left, and
a signal to stop lets a run save first.

Hydra has a printer of its own for errors: a traceback for many of the user's mistakes, and a hint
at HYDRA_FULL_ERROR under each refusal. `run` takes its place. A mistake in the user's options (an
error of Hydra or OmegaConf, or a CompactHydraException, which is what train.py and eval.py raise
for theirs) becomes one message on stderr and exit code 1. Any other error of the program is a fault
of ours and keeps its traceback. With HYDRA_FULL_ERROR=1 in the environment every error does.

Of several processes of one run (world.py) the first speaks for all, unless one met what the others
did not.

A batch system sends SIGTERM or SIGUSR1 minutes before it kills, a person presses Ctrl-C (SIGINT)
or closes the terminal (SIGHUP). None of these should cost a run the steps since its last
checkpoint. So the signal only sets a flag (`StopRequest`), which the loop looks at between steps.
After a second signal the process ends at once, unless it comes so soon that it is the first one,
passed on.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hydra.errors import CompactHydraException, HydraException
from omegaconf.errors import OmegaConfBaseException

import conf
from harness import sweep
from harness.folder import disk, status
from harness.worker import ECHO, SIGNALS
from harness.world import here

FULL_ERROR = "HYDRA_FULL_ERROR"
LINGER = 10.0  # seconds
TORCHRUN_ECHO = 2.0  # as worker.ECHO: torchrun passes on what its processes have had already
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class OwnError(CompactHydraException):
    """An error that this process met alone: it says so even where another one speaks for all."""


def run(main: Callable[[], Any]) -> int:
    """Run `main`, a function decorated by hydra.main, on sys.argv; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not here().first:
        logging.disable(logging.WARNING)
    overrides = [word for word in sys.argv[1:] if not word.startswith("-")]
    jobs = sweep.jobs = sweep.Jobs()
    asked = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would print
    try:
        if here().size > 1 and not {"-m", "--multirun"}.isdisjoint(sys.argv):
            return _refuse(
                f"--multirun: {here().size} processes work on one run; start each run of a sweep "
                "with a torchrun or srun of its own"
            )
        conf.check(overrides)
        main()
    # What a job raises is in `jobs`: these are Hydra's errors before the first one.
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if asked == "1":
            raise
        if isinstance(error, OSError):
            option = "hydra.run.dir" if jobs.folder is None else "hydra.sweep.dir"
            if (
                error.errno in disk.FULL and jobs.folder is not None
            ):  # Hydra's own record of a sweep
                return _refuse(disk.explain(error, {option: jobs.folder}))
            if error.filename is not None:
                remove_if_empty(Path(error.filename).parent)  # made on the way to the folder itself
                return _refuse(f"{option}={error.filename}: can't be made ({error.strerror})")
        return _refuse(conf.explain(error, overrides))
    except sweep.losses_of_workers() as error:
        return _refuse(f"a process of the sweep has gone, killed or out of memory: {error}")
    except KeyboardInterrupt:
        _refuse("interrupted")
        return INTERRUPTED
    finally:
        os.environ.pop(FULL_ERROR)
        if asked is not None:
            os.environ[FULL_ERROR] = asked
        if jobs.folder is not None:
            _end_of_sweep(jobs, jobs.folder)
    if jobs.code is not None:
        _refuse("interrupted")
        return jobs.code
    if jobs.folder is None and jobs.failed:
        _, failure = jobs.failed[0]
        assert isinstance(failure, BaseException)
        if asked == "1" or not isinstance(failure, CompactHydraException):
            raise failure
        return _refuse(str(failure), own=isinstance(failure, OwnError))
    return 1 if jobs.failed else 0


def _refuse(said: str, *, own: bool = False) -> int:
    """Of several processes of a run that refuse the same the first says it. The others wait until
    it has: what started them ends all of them when one has ended.
    """
    if own or here().first:
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr, flush=True)
    else:
        time.sleep(LINGER)
    return 1


def _end_of_sweep(jobs: sweep.Jobs, folder: Path) -> None:
    """Show how far each cell is, and list all failures, a line each, where they are not far above.
    A sweep of which no run began leaves nothing: Hydra's own record goes.
    """
    jobs.collect()
    record = folder / sweep.RECORD
    written = record.exists() and sweep.version(record) != jobs.record_before
    if written and list(folder.iterdir()) == [record]:
        record.unlink()
        remove_if_empty(folder)
    elif written:
        failures = {overrides: str(error) for overrides, error in jobs.failed}
        cells = status.of_sweep(folder, sweep.cells_of(jobs.hydra), failures)
        if cells and here().first:
            print(status.table(cells), flush=True)
    if jobs.failed:
        lines = "\n  ".join(overrides for overrides, _ in jobs.failed)
        _refuse(f"{len(jobs.failed)} of {jobs.count} jobs failed:\n  {lines}")


def remove_if_empty(folder: Path) -> None:
    """Remove the run directory of a refused run if this process made it and it holds nothing; Hydra
    makes it before anything is checked.

    Empty parents go too, as far as they lie below the working directory.
    """
    here, folder = Path.cwd(), folder.absolute()
    for candidate in (folder, *(parent for parent in folder.parents if here in parent.parents)):
        if candidate == here or not made_now(candidate) or any(candidate.iterdir()):
            return
        candidate.rmdir()


def made_now(folder: Path) -> bool:
    """Whether this process made the folder. Not by its time: the clock may have been set since."""
    return folder.is_dir() and os.path.realpath(folder) in _made


_made: set[str] = set()


def _note_made(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: Hydra makes folders before any code of the project is asked."""
    if event == "os.mkdir":
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not Path(path).exists():
            _made.add(path)
    elif event == "os.rename":  # checkpoints, as long as the run goes on
        _made.discard(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_note_made)


class StopRequest:
    """A context manager that catches SIGNALS. `code` is None until one came, then 128 + its number,
    the exit code that the run should end with.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.code is None:
            self.code, self._since = 128 + number, time.monotonic()
        elif time.monotonic() - self._since > (ECHO if here().size == 1 else TORCHRUN_ECHO):
            raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup: the run shall survive its terminal
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
