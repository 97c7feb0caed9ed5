"""What became of the jobs that Hydra ran in this process, one or the cells of a sweep.

Hydra goes on with a sweep when a job fails, and at the end shows the first failure only. So each
failure is shown when it happens, and `command_line.run` reads here what it has to say at the end.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger(__name__)


@dataclass
class Jobs:
    """count: jobs that ended. failed: overrides and error of each that failed. folder: of a sweep;
    None in a single run.
    """

    count: int = 0
    failed: list[tuple[str, BaseException]] = field(default_factory=list)
    folder: Path | None = None


jobs = Jobs()
"""The jobs of this process. Hydra makes the callback itself, so it can't be handed this object."""


class ReportFailedJobs(Callback):
    """A Hydra callback (conf/config.yaml, conf/eval.yaml) that keeps `jobs` up to date."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        jobs.folder = Path(str(config.hydra.sweep.dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        jobs.count += 1
        if job_return.status != JobStatus.FAILED:
            return
        overrides = " ".join(job_return.overrides or [])
        error = job_return._return_value  # the public property would raise it
        jobs.failed.append((overrides, error))
        job_return.status = JobStatus.COMPLETED  # else Hydra would print lines of its own
        if config.hydra.mode == RunMode.MULTIRUN:
            unexpected = None if isinstance(error, CompactHydraException) else error
            log.error("FAILED: %s\n%s", overrides, error, exc_info=unexpected)
