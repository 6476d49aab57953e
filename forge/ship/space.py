"""The disk that a whole ship takes, known before its first stage.

Not covered: what a download takes (the hub's own code checks that), and other programs that write
meanwhile; each stage looks again before it starts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from forge.errors import StageError
from forge.model.estimate import Estimate
from forge.pipeline.run import MORE_SPACE, size
from forge.pipeline.stage import Action, Step
from forge.resolve.resolved import Resolved


def space_needed(stages: Sequence[Step]) -> Estimate:
    """Bytes at the fullest moment of `stages`: what they keep, and the most that one takes besides."""
    kept: dict[str, int] = {}
    largest: dict[str, int] = {}
    for stage in stages:
        if not isinstance(stage, Action):
            kept |= stage.bytes_kept()
            largest = max(largest, dict(stage.bytes_beside()), key=lambda parts: sum(parts.values()))
    return Estimate(kept | largest)


def free_space(root: Path) -> int:
    """Free bytes where `root` is, or will be."""
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def require_space(ship: Resolved, stages: Sequence[Step]) -> None:
    """Raise `StageError` when the disk cannot hold what `stages` make."""
    needed, free = space_needed(stages), free_space(ship.store.root)
    if needed.total > free:
        parts = ", ".join(f"{name} {size(count)}" for name, count in needed.parts.items())
        raise StageError(
            f"this ship needs {size(needed.total)} of free disk ({parts}), "
            f"{ship.store.root} has {size(free)}",
            hint=MORE_SPACE,
        )
