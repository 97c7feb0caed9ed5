"""What Hydra tells about the jobs of a sweep: which one failed, and why, at once and in few lines.

Hydra's basic launcher goes on with the remaining jobs, exits with code 1 at the end and shows the first failure only.
"""

from __future__ import annotations

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

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status != JobStatus.FAILED or config.hydra.mode != RunMode.MULTIRUN:
            return
        error = job_return._return_value  # the public property would raise it
        unexpected = None if isinstance(error, CompactHydraException) else error
        log.error("FAILED: %s\n%s", " ".join(job_return.overrides or []), error, exc_info=unexpected)
