"""What became of the jobs that Hydra ran, one or the cells of a sweep.

Hydra goes on with a sweep when a job fails, and at the end shows the first failure only. So each
failure is shown when it happens, and `command_line.run` reads here what it has to say at the end.

Hydra's basic launcher runs jobs in this process. Those of joblib, submitit and Ray run them in
others, which get a copy of the callback and report by files (worker.py). There a first signal to
this process waits for the jobs, which have it too by Ctrl-C, and else from here; a second one ends
it. Ray's processes are out of reach of both, so a file tells them (`Records.stop`).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from harness import worker
from harness.folder import rundir
from harness.worker import Home, Interrupted, Record, Records

log = logging.getLogger(__name__)

# Names folders in conf/config.yaml. Here, since a worker imports this file before it needs a name.
OmegaConf.register_new_resolver("run_name", rundir.run_name, replace=True)

RECORD = "multirun.yaml"  # Hydra's, of the last sweep into a folder
_LITTLE = 75 << 20  # bytes, the least that Ray takes: nothing large is sent to a cell
SUBDIR = "${run_name:${hydra:job.override_dirname}}"  # as in conf/config.yaml


@dataclass
class Jobs:
    """count: jobs that ended. failed: overrides and error of each that failed, an error in words
    where it happened in another process. folder: of a sweep; None in a single run. record_before:
    the version of its RECORD, before it began. hydra: what RECORD says of this sweep, where another
    sweep into the folder may have written since. code: 128 + the signal that interrupted jobs of
    other processes.
    """

    count: int = 0
    failed: list[tuple[str, BaseException | str]] = field(default_factory=list)
    folder: Path | None = None
    record_before: tuple[int, ...] | None = None
    hydra: dict[str, Any] = field(default_factory=dict)
    records: Records | None = None
    code: int | None = None

    def collect(self) -> None:
        """Take in what other processes have left."""
        for record in self.records.take() if self.records else []:
            self.count += 1
            if record.code is not None:
                self.code = record.code
            elif record.error is not None:
                self.failed.append((record.overrides, record.error))


def version(file: Path) -> tuple[int, ...] | None:
    """What changes when the file is written, whatever the clock says; None if there is none."""
    if not file.exists():
        return None
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


jobs = Jobs()
"""The jobs of this process. Hydra makes the callback itself, so it can't be handed this object."""


class ReportFailedJobs(Callback):
    """A Hydra callback (conf/config.yaml, conf/eval.yaml) that keeps `jobs` up to date."""

    def __init__(self) -> None:
        self.home = Home()
        self.records: Records | None = None
        self.shares_devices = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        jobs.folder = Path(str(config.hydra.sweep.dir))
        jobs.record_before = version(jobs.folder / RECORD)
        jobs.hydra = cast(dict[str, Any], OmegaConf.to_container(config.hydra))
        launcher = str(config.hydra.launcher._target_)
        if launcher.endswith("BasicLauncher"):
            return
        ray = launcher.endswith("RayLauncher")
        self.shares_devices = ray or launcher.endswith("JoblibLauncher")
        folder = jobs.folder.absolute() / f".jobs_{uuid.uuid4().hex}"
        self.records = jobs.records = Records(folder, watched=ray)
        # Other processes look for the modules of this project, whatever folder they begin in.
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if ray:
            _start_ray(config.hydra.launcher.ray.init)
        worker.catch(_wait_for_the_jobs)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.records is None or self.home.is_here():
            return
        worker.begin(self.records)
        if self.shares_devices:
            worker.take_device(self.records.folder)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        overrides = " ".join(job_return.overrides or [])
        error = None
        if job_return.status == JobStatus.FAILED:
            error = job_return._return_value  # the public property would raise it
            job_return.status = JobStatus.COMPLETED  # else Hydra would print lines of its own
            if config.hydra.mode == RunMode.MULTIRUN and not isinstance(error, Interrupted):
                unexpected = None if isinstance(error, CompactHydraException) else error
                log.error("FAILED: %s\n%s", overrides, error, exc_info=unexpected)
        if self.home.is_here():
            jobs.count += 1
            if error is not None:
                jobs.failed.append((overrides, error))
            return
        assert self.records is not None
        code = None
        if isinstance(error, Interrupted):
            code = error.code
            with contextlib.suppress(OSError):  # not empty: it had begun
                Path(str(config.hydra.runtime.output_dir)).rmdir()
        said = None if error is None else str(error) or type(error).__name__
        self.records.write(int(config.hydra.job.num), Record(overrides, said, code))
        job_return.return_value = None  # an error that can't be pickled would be another one


def _wait_for_the_jobs(number: int, frame: FrameType | None) -> None:
    """The first signal to a process whose jobs run in others."""
    since = time.monotonic()

    def end(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - since > worker.ECHO:
            raise KeyboardInterrupt

    worker.catch(end)
    log.warning("waiting until the jobs have saved; a second signal ends them at once")
    assert jobs.records is not None
    if jobs.records.watched:
        jobs.records.ask_to_stop(number)
    if number != signal.SIGINT:  # Ctrl-C goes to all processes of a terminal
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)


def _start_ray(options: DictConfig) -> None:
    """Start Ray as its launcher would, which finds it started: later it would take the handlers of
    signals away again. What cells say is not shown, unless `options` ask for it (`log_to_driver`):
    it would come after the table of the sweep.
    """
    import ray

    given: Any = OmegaConf.to_container(options, resolve=True)
    ray.init(**{"object_store_memory": _LITTLE, "log_to_driver": False, **given})


def losses_of_workers() -> tuple[type[Exception], ...]:
    """What a launcher raises when a process of its own has gone."""
    found: list[type[Exception]] = [BrokenExecutor]
    if "submitit" in sys.modules:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        found += [FailedJobError, UncompletedJobError]
    if "ray" in sys.modules:
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        found += [NodeDiedError, OutOfMemoryError, WorkerCrashedError]
    return tuple(found)


def cells(folder: Path) -> dict[str, str]:
    """The overrides of each run of the last sweep into `folder`, by the name of the run's folder.
    Empty where there was none, or where names are not made as in conf/config.yaml.

    Raises ValueError naming a damaged file.
    """
    if not (folder / RECORD).exists():
        return {}
    try:
        return cells_of(rundir.read_config(folder, RECORD)["hydra"])
    except HydraException as error:
        raise ValueError(f"{folder / RECORD}: {error}") from error


def cells_of(hydra: Mapping[str, Any]) -> dict[str, str]:
    """As `cells`, of a sweep that was configured by `hydra`."""
    if hydra["sweep"]["subdir"] != SUBDIR or "Basic" not in hydra["sweeper"]["_target_"]:
        return {}
    swept = [f"{name}={value}" for name, value in (hydra["sweeper"]["params"] or {}).items()]
    style = hydra["job"]["config"]["override_dirname"]
    parser = OverridesParser.create()
    found = {}
    given = parser.parse_overrides(swept + hydra["overrides"]["task"])
    for cell in BasicSweeper.split_arguments(given, None)[0]:
        name = get_overrides_dirname(parser.parse_overrides(cell), **style)
        found[rundir.run_name(name)] = " ".join(cell)
    return found
