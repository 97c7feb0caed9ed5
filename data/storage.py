"""Files that are either the old version or the new one, never half of each, and their hashes.

A process can be killed between any two instructions, and a disk can fill up in the middle of a
write. The way to survive both: write the new content under a temporary name in the same folder,
`fsync` it, rename it over the old name (atomic within a file system), then `fsync` the folder so
that the rename itself outlives a power cut. Without the first fsync some file systems commit the
rename before the data, and a power cut leaves an empty file under the right name.

The cost is two flushes to the disk, a few milliseconds on an SSD. So this is for files written now
and then (`run.json`, a token file), not for every line of a log.

What is read back may have been damaged on the disk in between, or be a copy of another file.
`write_json` adds a checksum to what it writes, and `read_json` refuses what does not match its own.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

CHECKSUM = "checksum"


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(folder: Path) -> None:
    """Force the entries of `folder` (creations, renames, removals) to the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError that names no file (a write to a full disk does not) is of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends without an error.

    The folder must exist. Raises OSError (disk full, no permission). After any error, or a kill,
    the old file is untouched; a kill leaves a `.<name>.<random>.tmp` next to it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # already gone if all went well
    fsync_directory(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8), as `replacing` does."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON object of `values`, with a checksum of them as its last entry."""
    write_atomic(path, json.dumps({**values, CHECKSUM: digest_of(values)}, indent=2))


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The values that `write_json` wrote. Files of versions that wrote no checksum are taken as
    they are.

    Raises ValueError, naming the file and ending in `advice`, if it is damaged; FileNotFoundError.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {advice}")
    if (said := values.pop(CHECKSUM, None)) is not None and said != digest_of(values):
        raise ValueError(f"{path} is damaged (it does not match its own checksum): {advice}")
    return values


def digest_of(values: Mapping[str, Any]) -> str:
    """sha256 (hex) of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
