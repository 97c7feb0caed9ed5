"""A note in a directory by which damage to its files is noticed.

`manifest.json` holds the size and SHA-256 of each file, some facts about them, and a checksum of
itself, so that a flipped bit in a fact (the step, a loss) is noticed as well. It guards against
broken disks, cut-off copies and half-synced folders, not against somebody who wants to deceive:
whoever can change a file can write a new manifest.

Cost: reading every file once, at the speed of SHA-256 (one to two gigabytes per second on
processors that have instructions for it).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.storage import fsync_directory, naming, sha256_of

FORMAT = 1
MANIFEST_FILE = "manifest.json"


class DamagedError(RuntimeError):
    """A file is missing, unreadable or not the one that was written; the message names it and says
    which.
    """


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Sequence[str]) -> None:
    """Describe `files` of `folder` and record `facts` (JSON values); manifest and directory are
    flushed to the disk.
    """
    manifest = {
        "format": FORMAT,
        **facts,
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in files
        },
    }
    path = folder / MANIFEST_FILE
    with naming(path), path.open("w", encoding="utf-8") as file:
        json.dump(manifest | {"checksum": _checksum(manifest)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, itself intact; its files are not looked at. Raises DamagedError."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    except OSError as error:
        raise DamagedError(f"{MANIFEST_FILE} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise DamagedError(f"{MANIFEST_FILE} is damaged ({error})") from error
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
        raise DamagedError(f"{MANIFEST_FILE} is damaged (it does not match its own checksum)")
    if manifest["format"] != FORMAT:
        raise DamagedError(
            f"{MANIFEST_FILE} has format {manifest['format']}, this program reads format {FORMAT}"
        )
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` if each of its files is as it was written. Raises DamagedError."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        try:
            size, digest = (folder / name).stat().st_size, sha256_of(folder / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if size != expected["bytes"]:
            raise DamagedError(f"{name} is damaged ({size} bytes instead of {expected['bytes']})")
        if digest != expected["sha256"]:
            raise DamagedError(f"{name} is damaged (its SHA-256 is not the one in {MANIFEST_FILE})")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
