"""The run directory: where a run's evidence is, and whether it may be continued.

    config.yaml     the resolved configuration
    run.json        id and labels, the same for all segments of the run
    metrics.jsonl   every number, the source of truth
    summary.json    status and final numbers, with command, commit, machine and versions
    checkpoints/    the last ones and the best
    .lock           held by the process that works on the run

The name is made of the overrides, without a clock, so the same command finds the same directory and
continues it. A different configuration in the same directory is refused, option by option, except
for options that do not change what is computed, and for more steps where the learning rate does not
depend on their number.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.prepare import prepare
from data.storage import write_atomic
from harness.config import Config, flat_options
from harness.folder.bounded import json_object, yaml_mapping

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
LOCK_FILE = ".lock"

# What summary.json says of a run that came to an end, by its status.
_BY_STATUS: dict[str, dict[str, type]] = {
    "finished": {"step": int},
    "diverged": {"step": int, "reason": str},
}

# What a run may be continued with although it was started otherwise.
FREE_OPTIONS = (
    "tracker.",
    "checkpoint.",
    "log.",
    "diagnostics.",
    "profile.",
    "resume.",
    "data.cache_dir",
)
PROCESSES = ("parallel", "world_size")
"""Of these resume.world_size=any makes free options."""
OF_A_STEP = ("micro_batch_size", "model.block_size", "world_size")
"""Whose product is a step's tokens where tokens_per_step=null."""
MOVABLE = ("data.path", "data.tokenizer_path", "model.path", "model.architecture")
"""Files that may move: of a text its tokens are compared, of a model its model.sha256."""
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


def changed_options(old: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The dotted names in which two flat views differ, in order.

    A vocabulary that one of them leaves open (None) is no difference: until the text is read it is
    not known, and older versions wrote it down like that.
    """
    different = [name for name in sorted(old.keys() | now.keys()) if old.get(name) != now.get(name)]
    vocabulary = "model.vocab_size"
    if old.get(vocabulary) is None or now.get(vocabulary) is None:
        return [name for name in different if name != vocabulary]
    return different


def refused_changes(old: Mapping[str, Any], config: Config) -> list[str]:
    """ "option: old -> new" for each change with which a run of the flat view `old` can't go on."""
    now = config.flat()
    # What a step trains on, whether it was given or follows from the other sizes.
    old = {**old, "tokens_per_step": _step_tokens(old)}
    now["tokens_per_step"] = config.step_tokens
    free = (*FREE_OPTIONS, *(PROCESSES if config.resume.world_size == "any" else ()))
    return [
        f"{option}: {old.get(option)} -> {now.get(option)}"
        for option in changed_options(old, now)
        if not option.startswith(free)
        and option not in MOVABLE
        and not (
            option == "steps"
            and config.optim.schedule == "constant"
            and old["steps"] < config.steps
        )
    ]


def _step_tokens(options: Mapping[str, Any]) -> object:
    """Tokens of a step of the run with this flat view, None if it does not say."""
    if options.get("tokens_per_step"):
        return options["tokens_per_step"]
    sizes: list[Any] = [options.get(name) for name in OF_A_STEP]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def check_same_run(run_dir: Path, config: Config) -> None:
    """Raise ValueError naming every changed option if `run_dir` holds a run of another
    configuration, or of one unknown.
    """
    if not (run_dir / CONFIG_FILE).exists():
        if (run_dir / METRICS_FILE).exists() or any((run_dir / CHECKPOINT_FOLDER).glob("*")):
            raise ValueError(
                f"{run_dir} holds a run without {CONFIG_FILE}, so its options "
                "are not known; give another hydra.run.dir to start again, or delete the folder"
            )
        return
    check_same_options(run_dir, flat_options(read_config(run_dir)), config)


def check_same_options(run_dir: Path, old: Mapping[str, Any], config: Config) -> None:
    """Raise ValueError naming every option in which `config` can't continue a run of the flat view
    `old`.
    """
    if changes := refused_changes(old, config):
        raise ValueError(
            f"{run_dir} holds a run of another configuration:\n  "
            + "\n  ".join(changes)
            + "\nGive the same options to continue it, another hydra.run.dir to start again, or "
            "delete the folder."
        )
    if old.get("data.path") != config.data.path:
        _check_same_text(run_dir, config)


def _check_same_text(run_dir: Path, config: Config) -> None:
    """Raise ValueError if a run that is given another data.path was trained on another text."""
    known = trained_on(run_dir)
    if known is None:
        return  # nothing was trained yet
    found = prepare(config.data, progress=config.log.progress, known=known).train.sha256
    if found != known:
        raise ValueError(
            f"data.path={config.data.path}: not the text that the run in {run_dir} was started "
            "with; bring the same text back, give another hydra.run.dir, or delete the folder"
        )


def trained_on(run_dir: Path) -> str | None:
    """sha256 of the training tokens of the run in `run_dir`, None if it has not begun."""
    hashes = read_summary(run_dir).get("data", {})
    return hashes.get("train") if isinstance(hashes, dict) else None


def write_config(run_dir: Path, config: Config) -> None:
    """Leave the resolved configuration in the run directory."""
    write_atomic(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config.to_dict())))


def read_config(run_dir: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """The resolved configuration that a run left, or another YAML file of the folder, as nested
    dicts. Raises ValueError naming the file if it is damaged.

    A folder may come from anywhere, so nothing in it is carried out: `${...}` stays text, no class
    is named, and aliases are refused, a few of which can stand for more than fits any memory, as
    are depths that no configuration has.
    """
    return yaml_mapping(run_dir / name)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, or an empty dict if there is none yet. Raises ValueError naming the file if it
    is damaged.
    """
    file = run_dir / SUMMARY_FILE
    if not file.exists():
        return {}
    summary = json_object(file)
    for name, kinds in _BY_STATUS.get(str(summary.get("status")), {}).items():
        if not isinstance(summary.get(name), kinds) or isinstance(summary[name], bool):
            raise ValueError(f"{file}: damaged, {name} is {summary.get(name)!r}")
    return summary


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replace summary.json."""
    write_atomic(run_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
