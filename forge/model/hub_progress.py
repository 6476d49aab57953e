"""A download that reports how far it is and ends soon after Ctrl-C.

Not covered: limiting the bandwidth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

from huggingface_hub.utils.tqdm import tqdm as hub_bar

from forge import report


def download(label: str, total: int, work: Callable[[type[Any]], str]) -> str:
    """Run `work`, a download of `total` bytes that takes the class of its progress bars, to its end.

    huggingface_hub waits for all its threads when it is interrupted, which with large shards takes
    minutes. So it runs in a thread of its own, and its next progress after an interrupt ends it.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(work, _bar(label, total, stopped))
        try:
            return running.result()
        except BaseException:
            stopped.set()
            raise


def _bar(label: str, total: int, stopped: threading.Event) -> type[Any]:
    """A progress bar for huggingface_hub that draws nothing and calls `report` instead."""
    lock = threading.Lock()
    done = 0

    class Bar(hub_bar):
        def __init__(self, *args: Any, name: str | None = None, **options: Any) -> None:
            # One bar of several counts the bytes written to disk; the others would count twice.
            self.counts_bytes = name == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if stopped.is_set():
                raise CancelledError("interrupted")
            if self.counts_bytes and n and done < total:
                with lock:
                    done = min(total, done + int(n))
                    report.advance(label, done, total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB")

    return Bar
