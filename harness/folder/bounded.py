"""Small files of a run folder, read within bounds of time and memory.

A folder may come from anywhere. 400 bytes of YAML whose aliases repeat each other unfold to ten
million values, and brackets within brackets exhaust the stack of the parser. What a run writes has
none of this: config.yaml names no aliases, is three levels deep and a few kilobytes long. So the
limits below are far from every sound file, and what lies beyond is refused by name before it is
unfolded.

Nothing that is read is carried out: YAML is read without tags, and what looks like an interpolation
stays the letters that it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

LARGEST_YAML = 1 << 18
LARGEST_JSON = 1 << 24
DEEPEST = 20

_OPENING = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSING = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def _content(file: Path, largest: int) -> bytes:
    with file.open("rb") as opened:
        content = opened.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{file}: larger than {largest:,} bytes, which no run writes")
    return content


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises OSError, and ValueError naming the file if it holds
    anything else.
    """
    try:
        found = json.loads(_content(file, LARGEST_JSON))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object")
    return found


def yaml_mapping(file: Path) -> dict[str, Any]:
    """The YAML mapping in `file`, as nested dicts, lists and scalars. Raises ValueError naming the
    file if it can't be read or holds anything else.
    """
    try:
        text = _content(file, LARGEST_YAML).decode()
        if (wrong := _wrong_shape(text)) is None:
            found = OmegaConf.to_container(OmegaConf.create(text))
            assert isinstance(found, dict)
            return {str(group): values for group, values in found.items()}
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: not readable as YAML ({error})") from error
    raise ValueError(f"{file}: {wrong}")


def _wrong_shape(text: str) -> str | None:
    """What no run writes: aliases, which unfold to more than they say, deep nesting, anything but
    one mapping. None if there is nothing of it.
    """
    depth = 0
    root: yaml.Event | None = None
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, _OPENING) - isinstance(event, _CLOSING)
        if isinstance(event, yaml.AliasEvent):
            return f"holds an alias (*{event.anchor}), which no run writes"
        if depth > DEEPEST:
            return f"nested deeper than {DEEPEST} levels, which no run writes"
        if root is None and isinstance(event, yaml.NodeEvent):
            root = event
    return None if isinstance(root, yaml.MappingStartEvent) else "not a mapping of options"
