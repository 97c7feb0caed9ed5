"""What a disk refused, in words: the path, how much room there is, and what to do.

A run meets a full disk, a quota, a disk that is for reading only, or a folder that is gone, at any
moment in days: in a checkpoint, a row of metrics, the token cache, Hydra's own record. Each is an
OSError with one of `ERRNOS`. Nothing is tried again and nothing is skipped: the program ends with
one message, and what was written before is whole (checkpoint.py, data/storage.py), so that the same
command goes on when there is room.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from harness.memory import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
GONE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ESTALE,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
)  # the last two: a link to nothing, or in a circle
ERRNOS = (*FULL, *CLOSED, *GONE)


def first_refusal(error: BaseException) -> OSError | None:
    """The refusal of a disk that `error` is or was raised after; None if there was none.

    Of several the first counts that names a file: what follows fails for the same reason. That a
    folder is absent counts last, as Python makes a folder's parents after it has failed.
    """
    found: list[OSError] = []
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in ERRNOS:
            found.insert(0, seen)
        seen = seen.__cause__ or seen.__context__
    found.sort(key=lambda refusal: (refusal.errno in GONE, refusal.filename is None))
    return found[0] if found else None


def explain(error: OSError, options: Mapping[str, Path]) -> str:
    """One line for `error`. options: the folders that the user has set by an option; the one in
    which the path lies is named, or the first where the error has no path.
    """
    path = Path(os.fsdecode(error.filename)) if error.filename else next(iter(options.values()))
    there = [
        (name, folder)
        for name, folder in options.items()
        if path.absolute().is_relative_to(folder.absolute())
    ]
    name, folder = there[0] if there else ("", path.parent)
    what = f"{name + '=' + str(folder) + ': ' if name else ''}{error.strerror or error}: {path}"
    another = f" or give another {name}" if name else ""
    if error.errno in FULL:
        room = _room(path) if error.errno == errno.ENOSPC else ""
        return f"{what}{room}; make room there{another}"
    if error.errno in CLOSED:
        return f"{what}; make it writable{another}"
    return f"{what}{' (give another ' + name + ')' if name else ''}"


def _room(path: Path) -> str:
    """How full the disk of `path` is."""
    folder = next((p for p in path.absolute().parents if p.is_dir()), None)
    if folder is None:
        return ""
    usage = shutil.disk_usage(folder)
    return f" ({format_bytes(usage.free)} free of {format_bytes(usage.total)} on that disk)"
