"""Signals that ask a run to stop: finish the step, save, leave.

A batch system sends SIGTERM or SIGUSR1 minutes before it kills, a person presses Ctrl-C (SIGINT)
or closes the terminal (SIGHUP). None of these should cost a run the steps since its last
checkpoint. So the signal only sets a flag, which the loop looks at between steps. After a second
signal the process ends at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """A context manager that catches SIGNALS. `code` is None until one came, then 128 + its number,
    the exit code that the run should end with.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.code is not None:
            raise KeyboardInterrupt
        self.code = 128 + number

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup: the run shall survive its terminal
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
