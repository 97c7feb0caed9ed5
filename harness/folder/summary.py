"""summary.json: what a run is when it begins, and the last of its numbers when it ends.

Written twice, at the start with the status "running", so that a run which is killed is not taken
for finished, and at the end with what became of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from harness.folder import rundir
from harness.folder.metrics import read_metrics
from harness.provenance import provenance

if TYPE_CHECKING:
    from harness.run import Run


def at_the_start(run: Run) -> dict[str, Any]:
    """What is known of `run` before its first step, with command, commit, machine and versions."""
    summary: dict[str, Any] = {
        "status": "running",
        "run_id": run.id,
        "method": run.config.method.name,
        "runtime": run.runtime.describe(),
        "saved_step": run.saved_step,
    }
    summary |= {
        "data": run.data_hashes,
        "parameters": run.model.parameter_count(),
        "sketched_layers": run.sketched,
    }
    if run.knobs:
        summary["knobs"] = run.knobs
    return summary | provenance()


def last_values(run: Run) -> dict[str, Any]:
    """Of each metric the last value in the folder."""
    file = run.folder / rundir.METRICS_FILE
    return {k: v for row in (read_metrics(file) if file.exists() else []) for k, v in row.items()}


def leave(run: Run, summary: dict[str, Any]) -> None:
    """Add the last numbers of `run` to `summary`, and write it for people and for the tracker."""
    summary |= last_values(run)
    summary |= {
        "step": run.step,
        "saved_step": run.saved_step,
        "val/loss_best": run.best_val_loss if math.isfinite(run.best_val_loss) else None,
        "wall_seconds": run.wall_seconds(),
    }
    rundir.write_summary(run.folder, summary)
    run.tracker.summary({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
