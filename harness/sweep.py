"""What Hydra tells about the jobs of a sweep: which one failed, and why, at once and in few lines.

Hydra's basic launcher goes on with the remaining jobs, exits with code 1 at the end and shows the
first failure only, so all that failed are listed once more when the process ends: Hydra calls
nobody between the last job and that exit.
"""

from __future__ import annotations

import atexit
import logging
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class ReportFailedJobs(Callback):
    """A Hydra callback (conf/config.yaml). In a single run Hydra itself reports."""

    def __init__(self) -> None:
        self.jobs = 0
        self.failed: list[str] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.register(self.at_the_end)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        self.jobs += 1
        if job_return.status != JobStatus.FAILED:
            return
        self.failed.append(" ".join(job_return.overrides or []))
        error = job_return._return_value  # the public property would raise it
        unexpected = None if isinstance(error, CompactHydraException) else error
        log.error("FAILED: %s\n%s", self.failed[-1], error, exc_info=unexpected)

    def at_the_end(self) -> None:
        """All failures again, a line each, where they are not far above."""
        if self.failed:
            log.error(
                "%d of %d jobs failed:\n  %s", len(self.failed), self.jobs, "\n  ".join(self.failed)
            )
