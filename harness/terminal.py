"""Where a program's words go, when nobody is there to read them.

What is shown is not the run: its numbers are in metrics.jsonl, a report's in its files. So a reader
that has gone must not cost them. `attach` is called first of all by what is started from a command
line, and sees to three things.

*The reader goes away*: `eval.py ... | head`, or a terminal that is closed while a program in its
background goes on. Python would raise BrokenPipeError at the next line, in the midst of a step or
before a report is written. Here the rest is said to nobody, and the program does its work. A full
disk behind `> log.txt` is another matter, for what is lost there was wanted: print raises, as ever.

*There is no stream at all*: a service, or `2>&-`. Then `sys.stderr` is None, on which progress bars
end. Worse, the next file that is opened gets the number of the missing stream, and what a library
says in C goes into a checkpoint. So the null device takes the place first.

*It can't take every character*, as in a Latin-1 locale: one that it lacks is shown as "?".
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO)
"""What a write meets when a pipe has no reader, and when a terminal was closed."""


class _Output(io.FileIO):
    """A stream by its number, whose reader may go away."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # also for what this process starts, and for Python's exit
        os.close(null)
        return memoryview(data).nbytes


def attach() -> None:
    """Give this process three streams whose readers may go away. To be called before anything is
    opened or said.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
            os.set_inheritable(number, True)
    sys.stdout = _stream(1, sys.stdout, "replace")
    sys.stderr = _stream(2, sys.stderr, "backslashreplace")
    # A line of a log that can't be written is no reason for a traceback in its place.
    logging.raiseExceptions = False


def _stream(number: int, before: Any, errors: str) -> io.TextIOWrapper:
    """Stream `number`, in all else as the one `before`, which is None if there was none."""
    raw = _Output(number, "wb", closefd=False)
    unbuffered = before is not None and before.write_through
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # as Python does
        encoding="utf-8" if before is None else before.encoding,
        errors=errors,
        line_buffering=before is None or before.line_buffering,
        write_through=unbuffered,
    )
