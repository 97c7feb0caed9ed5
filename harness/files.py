"""Files that are either the old version or the new one, never half of each.

A run can be killed between any two instructions, and a disk can fill up in the middle of a write.
The way to survive both is old: write the new text under a temporary name in the same folder,
`fsync` it, rename it over the old name (atomic within a file system), then `fsync` the folder so
that the rename itself outlives a power cut. Without the first fsync some file systems commit the
rename before the data, and a power cut leaves an empty file under the right name.

The cost is two flushes to the disk, a few milliseconds on an SSD. So this is for files written now
and then (`run.json`, `summary.json`), not for every line of a log.
"""

import os
import secrets
from pathlib import Path


def fsync_directory(folder: Path) -> None:
    """Force the entries of `folder` (creations, renames, removals) to the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8) so that a reader or a crash sees the old file or
    the new one.

    The folder must exist. Raises OSError (disk full, no permission); the old file is then
    untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # already gone if all went well
    fsync_directory(path.parent)
