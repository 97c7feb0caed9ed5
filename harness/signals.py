"""Ctrl-C and SIGTERM as a request: finish the step, save, leave.

A batch system sends SIGTERM minutes before it kills; a person presses Ctrl-C. Neither should cost a
run the steps since its last checkpoint, so the signal only sets a flag that the loop looks at
between steps. A second signal is not waited for.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context manager; inside it `code` is None until a signal came, then the exit code that the
    signal asks for.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.code is not None:
            raise KeyboardInterrupt
        self.code = 128 + number

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
