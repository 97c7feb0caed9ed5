"""Reading back what wandb wrote offline, through wandb's own command line, and environments without
wandb's variables.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what wandb put there, or a user's settings, and with
    `extra`.
    """
    return {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB_")
    } | extra


def segments(run_dir: Path) -> list[Path]:
    """The directories of the runs that wandb wrote under `run_dir`, oldest first."""
    return sorted((run_dir / "wandb").glob("*run-*-*"), key=lambda path: path.stat().st_mtime_ns)


@functools.cache
def _inspect(segment: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(segment)],
        env=clean_environment(WANDB_ERROR_REPORTING="false"),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def records(segment: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one type ("run", "history", ...) of a finished run, in order."""
    return [
        record[kind]
        for record in map(json.loads, _inspect(segment).splitlines())
        if record["type"] == kind
    ]


def history(segment: Path) -> list[dict[str, Any]]:
    """The logged rows, without what wandb adds to them (names that begin with "_")."""
    rows = [record["item"] for record in records(segment, "history")]
    return [
        {name: value for name, value in row.items() if not name.startswith("_")} for row in rows
    ]


def summary(segment: Path) -> dict[str, Any]:
    """State, exit code, configuration, tags and summary of a run, as one object."""
    content: dict[str, Any] = json.loads(_inspect(segment, "--summary"))
    return content
