"""The most memory that a worker has had."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    # Linux's ru_maxrss begins with what the parent had when it started us.
    if match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else ""):
        return 1024 * int(match[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
