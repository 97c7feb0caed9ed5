"""What a run folder must hold before a report is made of it: values of the types that a run writes.

A report reads hundreds of folders that were copied, synced and edited. One value of another type in
one of them (a list where a number was) would end the report of all. So each file is checked when it
is read, and a folder that is not as a run leaves it is named and left out.

Checked is the type, not the range. Options that this version does not know were of an older one;
they must be scalars or lists of scalars. Cost: nothing beside reading.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from harness.config import Config
from harness.method import Method, method_schema

Scalar = bool | int | float | str | None
_SUMMARY: dict[str, Any] = {
    "run_id": str,
    "step": int,
    "diverged_at": int,
    "data": dict[str, str],
    "wall_seconds": float,
    "machine": dict[str, Any],
    "runtime": dict[str, Any],
    "versions": dict[str, Any],
    "sketched_layers": list[str],
    "command": str,
    "commit": str | None,
}
_NEEDED = ("run_id", "step", "data")


def check_summary(summary: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError naming `file` and the first entry that is not of its type."""
    for name, hint in _SUMMARY.items():
        if name not in summary and name not in _NEEDED:
            continue  # an older version did not write it
        if not fits(summary.get(name), hint):
            raise ValueError(f"{file}: damaged, {name} is {summary.get(name)!r}")


def check_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Raise ValueError naming `file` and the first value of a metric that is no number."""
    for row in rows:
        for name, value in row.items():
            if not fits(value, int if name == "step" else float):
                raise ValueError(
                    f"{file}: damaged, {name} is {value!r} in the row of step {row['step']!r}"
                )


def check_options(options: Mapping[str, Any], written: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError naming `file` and the first option, by dotted name, that is not of its type.

    options: the flat view; written: the nested values behind it, in which nothing may be empty (the
    flat view would hold the default in its place).
    """
    if empty := _empty(written):
        raise ValueError(f"{file}: damaged, {empty} is {{}}")
    hints = _hints(str(options.get("method.name")))
    for name, value in options.items():
        if not fits(value, hints.get(name, Scalar | list[Scalar])):
            raise ValueError(f"{file}: damaged, {name} is {value!r}")


def _empty(nested: Mapping[str, Any], prefix: str = "") -> str:
    """The dotted name of the first empty mapping in `nested`, or ""."""
    for key, value in nested.items():
        if value == {}:
            return f"{prefix}{key}"
        if isinstance(value, dict) and (found := _empty(value, f"{prefix}{key}.")):
            return found
    return ""


@cache
def _hints(method: str) -> dict[str, Any]:
    """The types of the options of a run by dotted name, as far as this version knows them."""
    found: dict[str, Any] = {}
    for group, hint in get_type_hints(Config).items():
        kind = hint
        if hint is Method:
            try:
                kind = method_schema(method)
            except ValueError:
                continue  # of an older version
        if not is_dataclass(kind):
            found[group] = kind
            continue
        inner = get_type_hints(kind)
        found |= {f"{group}.{f.name}": inner[f.name] for f in fields(kind)}
    return found


def fits(value: object, hint: Any) -> bool:
    """Whether `value`, read from YAML or JSON, is of the type `hint`; an int is a float too, and a
    bool is no number.
    """
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, hint)
