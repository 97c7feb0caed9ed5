"""`metrics.jsonl`: every number a run reports, one JSON object per line, and the only source of
truth about them.

Dashboards, tables and figures are made from this file and can be made again. So it has to be right
after every kind of end. A line is written with one call and handed to the operating system at once,
so a killed process loses at most the line it was writing. Such a torn last line is dropped by the
reader and by the next writer; a line that cannot be read anywhere else is an error.

A run that is resumed from step s will report the steps after s again. Before it does,
`truncate_after(s)` removes the lines that the interrupted run had written past its checkpoint. The
file then reads as if nothing had happened, to the last bit: floats are written as the shortest
decimal that reads back as the same float64 (Python's `repr`).

A training run can diverge, and that is a result. JSON proper has no word for it, so non-finite
numbers are written as the bare tokens `NaN`, `Infinity` and `-Infinity`, which Python's `json`
writes and reads; `read_metrics` returns floats.

`mark` says what the file holds by length and hash. A checkpoint keeps it, so that a file that was
lost or cut meanwhile is noticed (one_run.py).

Cost: one short write per logged row. There is no fsync per line; call `sync()` before a checkpoint
is saved, so that a power cut cannot leave a checkpoint whose history is missing.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from data.storage import naming, write_atomic

Scalar = bool | int | float | str | None


class Stopwatch:
    """Seconds from one lap to the next, without those that pass in `paused` blocks."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def lap(self) -> float:
        """Seconds since the last lap, or since the start; the next lap begins."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds


class MetricsLog:
    """The writer of one `metrics.jsonl`; one process writes, any number may read meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, creating it if absent; a torn last line goes, so that no row
        is glued to it.

        Raises ValueError, naming file and line, if an earlier line cannot be read.
        """
        self.path = Path(path)
        if self.path.exists():
            whole = _join(_parse(self.path)[0])
            if whole != self.path.read_bytes():
                write_atomic(self.path, whole)
        self._open()

    def _open(self) -> None:
        # Unbuffered: what a full disk refused would be tried again by the close.
        self._file = self.path.open("ab", buffering=0)
        content = self.path.read_bytes()
        self._bytes, self._digest = len(content), hashlib.sha256(content)

    def mark(self) -> dict[str, Any]:
        """Length and SHA-256 of the rows so far, for a checkpoint to know them by."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def log(self, metrics: Mapping[str, Scalar]) -> None:
        """Append one row; it must have an int `step` and hold plain Python scalars only.

        Raises TypeError naming the metric if a value is a tensor, a numpy scalar or a container.
        """
        assert type(metrics.get("step")) is int, f"a row needs an int `step`: {dict(metrics)}"
        for name, value in metrics.items():
            kind = type(value)
            if kind not in (
                bool,
                int,
                float,
                str,
                type(None),
            ):  # exactly: np.float64 is a float to isinstance
                raise TypeError(
                    f"metric {name!r} is a {kind.__module__}.{kind.__qualname__}, not a plain "
                    "scalar"
                )
        line = json.dumps(dict(metrics)).encode() + b"\n"
        with naming(self.path):
            if self._file.write(line) < len(line):  # as much as there was room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bytes += len(line)
        self._digest.update(line)

    def truncate_after(self, step: int) -> int:
        """Remove the rows of later steps than `step`; returns how many. The file is replaced
        atomically.
        """
        lines, rows = _parse(self.path)
        keep = [line for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
        if len(keep) < len(lines):
            self._file.close()
            write_atomic(self.path, _join(keep))
            self._open()
        return len(lines) - len(keep)

    def sync(self) -> None:
        """Wait until all rows are on the disk, safe from a power cut."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; may be called again."""
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self.close()


class NoMetrics(MetricsLog):
    """The writer of processes that do not write: does nothing."""

    def __init__(self) -> None:
        """No file is opened."""

    def log(self, metrics: Mapping[str, Scalar]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl` in the order written, without a last line that a kill cut
    short.

    Raises FileNotFoundError, and ValueError naming file and line if any other line is not a JSON
    object with a `step`.
    """
    return _parse(Path(path))[1]


def digest_of(path: Path, size: int) -> str:
    """SHA-256 (hex) of the first `size` bytes of a file, or of all if it has fewer."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


def _join(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _parse(path: Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """The lines that hold a row, without their newline, and the rows."""
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last newline
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            if number == len(lines):
                return lines[:-1], rows
            raise ValueError(f"{path}, line {number}: not readable as JSON ({error})") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path}, line {number}: not a JSON object with a `step`")
        rows.append(row)
    return lines, rows
