"""A limit on the time that somebody else's template may take: Jinja has loops, and no budget of its own.

By the timer of POSIX that counts the process's own computing time, so that a busy machine changes
nothing; it interrupts Python code in the main thread. In another thread there is no limit.
Not covered: one C call that never returns.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after `seconds`."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    pending, _ = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        # An outer limit goes on.
        signal.setitimer(signal.ITIMER_VIRTUAL, pending)
        signal.signal(signal.SIGVTALRM, before)
