"""The disk that a whole ship takes, known before its first stage.

Not covered: what a download takes (the hub's own code checks that), and other programs that write
meanwhile; each stage looks again before it starts.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from forge.errors import StageError
from forge.model.estimate import Estimate, export_disk
from forge.pipeline.plan import Plan
from forge.pipeline.run import MORE_SPACE, size
from forge.resolve.derived import largest_type
from forge.resolve.resolved import Resolved
from forge.stages.calibrate import CalibrateStage
from forge.stages.train import TrainStage
from forge.stages.verify import VerifyStage


def space_needed(ship: Resolved, planned: Plan) -> Estimate:
    """Bytes at the fullest moment: what the stages that run keep, and the most that one takes beside it."""
    runs = {one.name for one in planned.stages if not one.cached}
    export = ship.recipe.export
    kept: dict[str, int] = {}
    beside: dict[str, int] = {}
    if "train" in runs and ship.training:
        stage = TrainStage(ship)
        kept["adapter"] = stage.bytes_kept()
        beside["checkpoints"] = stage.bytes_needed({}) - kept["adapter"]
    if "export" in runs:
        kept |= export_disk(ship.parameters, largest_type(ship), keep_merged=export.keep_merged).parts
    if "calibrate" in runs:
        beside["files to try types on"] = CalibrateStage(ship).bytes_needed({})
    if "verify" in runs:
        beside["files to compare with"] = VerifyStage(ship).bytes_needed({})
    largest = max(beside, key=beside.__getitem__, default=None)
    return Estimate(kept | ({largest: beside[largest]} if largest else {}))


def free_space(root: Path) -> int:
    """Free bytes where `root` is, or will be."""
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def require_space(ship: Resolved, planned: Plan) -> None:
    """Raise `StageError` when the disk cannot hold this ship."""
    needed, free = space_needed(ship, planned), free_space(ship.store.root)
    if needed.total > free:
        parts = ", ".join(f"{name} {size(count)}" for name, count in needed.parts.items())
        raise StageError(
            f"this ship needs {size(needed.total)} of free disk ({parts}), "
            f"{ship.store.root} has {size(free)}",
            hint=MORE_SPACE,
        )
