"""A progress bar that goes on when the system's clock is set.

tqdm takes its times from that clock. Set back by a day, it would show nothing for a day, and a
remaining time that is wrong for good. So the bars of training and of preparing text take them from
the monotonic clock. tqdm is imported here alone in this package, and this module when a bar is
needed.
"""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm


def bar(**options: Any) -> tqdm[Any]:
    """tqdm(**options). Its display is brought up to date by the thread that counts, so that tqdm's
    thread for slow bars, which compares times of the system's clock, has nothing to do.
    """
    made = tqdm(miniters=1, **options)
    made._time = time.monotonic
    made.start_t = made.last_print_t = time.monotonic()
    return made
