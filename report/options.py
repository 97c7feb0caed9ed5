"""The options of eval.py, typed and checked before any run is read."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf


@dataclass
class _Values:
    """conf/eval.yaml, with its types for OmegaConf. runs: a text or a list of texts."""

    runs: Any = None
    out: str | None = None
    metrics: bool = False
    arena: bool = False
    times: str | None = None
    complexity: bool = False


@dataclass(frozen=True)
class ReportOptions:
    """runs: folders to look into, none for `complexity` alone; out: where to write."""

    runs: tuple[Path, ...]
    out: Path
    metrics: bool
    arena: bool
    times: Path | None
    complexity: bool


def load(values: DictConfig) -> ReportOptions:
    """The options that composed values mean. Raises ValueError naming the option."""
    for name in map(str, values):
        if OmegaConf.is_missing(values, name):
            raise ValueError(f"{name}=???: must be given, or left out")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_Values), values))
    except OmegaConfBaseException as error:
        raise ValueError(conf.explain(error, ())) from error
    assert isinstance(typed, _Values)
    if typed.runs is None and not typed.complexity:
        raise ValueError(
            "runs=null: give a folder or a list of folders, as in `python eval.py runs=runs/demo`"
        )
    if typed.runs is None and typed.out is None:
        raise ValueError("out=null: complexity=true measures no run; give a folder to write to")
    for name in ("out", "times"):
        if getattr(typed, name) == "":
            raise ValueError(f"{name}='': must be a path, or null")
    runs = _folders(typed.runs)
    times = None if typed.times is None else Path(typed.times)
    if times is not None and not times.is_file():
        raise ValueError(f"times={times}: no such file")
    out = runs[0] if typed.out is None else Path(typed.out)
    return ReportOptions(runs, out, typed.metrics, typed.arena, times, typed.complexity)


def _folders(given: object) -> tuple[Path, ...]:
    if given is None:
        return ()
    listed = given if isinstance(given, list) else [given]
    names = [str(name) if type(name) in (str, int, float) else "" for name in listed]
    if not names or "" in names:
        raise ValueError(f"runs={given}: must be a folder or a list of folders")
    for name in names:
        if not Path(name).is_dir():
            raise ValueError(f"runs={name}: no such folder")
    return tuple(map(Path, names))


def check_writable(out: Path, asked: bool) -> None:
    """Make the folder `out` and write into it once, so that hours of work do not end at its door.

    asked: whether the user named it. Raises ValueError naming the option.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        said = f"out={out}" if asked else f"out=null: the report goes to {out}, which"
        raise ValueError(
            f"{said}{':' if asked else ''} can't be written ({error.strerror}); give another out"
        ) from None
