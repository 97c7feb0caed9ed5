"""The run directory: where a run's evidence is, and whether it may be continued.

    config.yaml     the resolved configuration
    run.json        id and labels, the same for all segments of the run
    metrics.jsonl   every number, the source of truth
    summary.json    status and final numbers, with command, commit, machine and versions
    checkpoints/    the last ones and the best

The name is made of the overrides, without a clock, so the same command finds the same directory and
continues it. A different configuration in the same directory is refused, option by option, except
for options that do not change what is computed, and for more steps where the learning rate does not
depend on their number.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness.attention import OF_SUS
from harness.config import Config
from harness.files import write_atomic

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FOLDER = "checkpoints"

# What a run may be continued with although it was started otherwise.
FREE_OPTIONS = ("tracker.", "checkpoint.", "log.", "diagnostics.", "data.cache_dir")
_NAME_LIMIT = 120


def run_name(overrides: str) -> str:
    """A folder name for a comma-separated list of overrides: readable, stable, never too long,
    usable on a command line.

    "method.rank=8,seed=1" becomes "method.rank-8_seed-1", since Hydra would want quotes around the
    other. What else can't be in a name is replaced too, and a digest keeps different lists apart.
    """
    if not overrides:
        return "default"
    readable = overrides.replace("=", "-").replace(",", "_")
    name = re.sub(r"[^A-Za-z0-9_.+@-]", "_", readable)
    if name == readable and len(name) <= _NAME_LIMIT and not name.startswith("."):
        return name
    return f"{name[:_NAME_LIMIT].lstrip('.')}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def known_options(config: dict[str, Any]) -> dict[str, Any]:
    """A run's options by dotted name. What an older version had no option for is at its default.

    Exact attention has none of sus's options: older versions wrote their defaults there, or what
    was given and not looked at.
    """
    options = flatten(Config().to_dict()) | flatten(config)
    if options["attention.name"] == "exact":
        for option in OF_SUS:
            del options[f"attention.{option}"]
    return options


def changed_options(old: dict[str, Any], config: Config) -> list[str]:
    """ "option: old -> new" for each option in which a run can't be continued."""
    before, now = known_options(old), flatten(config.to_dict())
    changes = []
    for option in sorted(before.keys() | now.keys()):
        if option.startswith(FREE_OPTIONS) or before.get(option) == now.get(option):
            continue
        if (
            option == "steps"
            and config.optim.schedule == "constant"
            and before["steps"] < config.steps
        ):
            continue
        changes.append(f"{option}: {before.get(option)} -> {now.get(option)}")
    return changes


def check_same_run(run_dir: Path, config: Config) -> None:
    """Raise ValueError naming every changed option if `run_dir` holds a run of another
    configuration, or of one unknown.
    """
    if not (run_dir / CONFIG_FILE).exists():
        if (run_dir / METRICS_FILE).exists() or any((run_dir / CHECKPOINT_FOLDER).glob("*")):
            raise ValueError(
                f"{run_dir} holds a run without {CONFIG_FILE}, so what it is a run of can't be "
                "told; give another hydra.run.dir to start anew, or delete the folder"
            )
        return
    changes = changed_options(read_config(run_dir), config)
    if changes:
        raise ValueError(
            f"{run_dir} holds a run of another configuration:\n  "
            + "\n  ".join(changes)
            + "\nGive the same options to continue it, another hydra.run.dir to start anew, or delete the folder."
        )


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Leave the resolved configuration, as nested dicts, in the run directory."""
    write_atomic(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config)))


def read_config(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration that a run left, as nested dicts. Raises ValueError naming the
    file if it is damaged.
    """
    file = run_dir / CONFIG_FILE
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
    except (
        YAMLError,
        OmegaConfBaseException,
        ValueError,
        OSError,
    ) as error:  # OmegaConf's OSError: a bare word or number
        raise ValueError(f"{file}: not readable as YAML ({error})") from error
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{file}: not a mapping of options")
    return {str(group): values for group, values in config.items()}


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, or an empty dict if there is none yet. Raises ValueError naming the file if it
    is damaged.
    """
    file = run_dir / SUMMARY_FILE
    if not file.exists():
        return {}
    try:
        summary = json.loads(file.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{file}: not a JSON object")
    return summary


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replace summary.json."""
    write_atomic(run_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
