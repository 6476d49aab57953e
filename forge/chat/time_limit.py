"""A limit on the time that somebody else's template may take: Jinja has loops, and no budget of its own.

A second thread watches the computing time of the one in the block, so that a busy machine changes nothing,
and raises TimeoutError there, whichever thread it is (`PyThreadState_SetAsyncExc`; signals would
reach the main thread alone). Where a thread's computing time cannot be read (macOS), the clock counts.

Not covered: one C call that never returns; `template` refuses those that a template can make.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from forge.errors import DataError

SECONDS = 20.0
"""Of computing: hundreds of prompts of the longest public template take one."""
# Between two looks at the time.
_LOOKS = 0.02


@contextmanager
def template_limit() -> Iterator[None]:
    """For a body that renders somebody else's template: raises `DataError` after `SECONDS` of computing."""
    try:
        with time_limit(SECONDS):
            yield
    except TimeoutError as over:
        raise DataError(
            f"the chat template's prompts took more than {SECONDS:g} seconds to compute",
            hint="no chat template needs that: look at its loops, or use another one",
        ) from over


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after `seconds` of its thread's computing time."""
    thread = threading.get_ident()
    spent = _stopwatch(thread)
    over, guard = threading.Event(), threading.Lock()
    fired = False

    def watch() -> None:
        nonlocal fired
        while not over.wait(min(_LOOKS, seconds)):
            with guard:
                if not over.is_set() and spent() >= seconds:
                    fired = True
                    _raise_in(thread, TimeoutError)
                    return

    watcher = threading.Thread(target=watch, daemon=True, name="time-limit")
    watcher.start()
    try:
        yield
    finally:
        try:
            with guard:
                over.set()
            watcher.join()
        finally:
            if fired:
                # It may have been sent and not arrived: then it must not, after the block.
                _raise_in(thread, None)


def _stopwatch(thread: int) -> Callable[[], float]:
    read: Callable[[], float] = time.monotonic
    if hasattr(time, "pthread_getcpuclockid"):
        clock = time.pthread_getcpuclockid(thread)

        def read() -> float:
            return time.clock_gettime(clock)

    began = read()
    return lambda: read() - began


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise `error` in `thread` at its next step of Python; None takes back one that has not arrived."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error) if error else None
    )
