"""The whole pipeline, readable as one tuple. `ship.record` comes after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge.pipeline.stage import Step
    from forge.resolve.resolved import Resolved


def stages_for(ship: Resolved) -> tuple[Step, ...]:
    """The stages of a ship, in order.

    Up to *verify* each is pure and kept in the store; *deploy* and *smoke* look at the world.
    """
    from forge.recipe.schema import Adopted, Train
    from forge.resolve.derived import of_each_type
    from forge.stages.adopt import AdoptStage
    from forge.stages.calibrate import CalibrateStage
    from forge.stages.data import DataStage
    from forge.stages.deploy import DeployAction
    from forge.stages.evaluate import EvaluateStage
    from forge.stages.export import ExportStage
    from forge.stages.merge import MergeStage
    from forge.stages.modelfile import ModelfileStage
    from forge.stages.smoke import SmokeAction
    from forge.stages.train import TrainStage
    from forge.stages.validate import ValidateStage
    from forge.stages.verify import VerifyStage

    recipe, types = ship.recipe, of_each_type(ship)
    has_data = recipe.data is not None
    is_adapted = recipe.train is not None
    makes_gguf = recipe.export.makes_gguf
    is_deployed = recipe.deploy.runtime != "none" and makes_gguf
    steps: tuple[Step | None, ...] = (
        DataStage(ship) if has_data else None,
        TrainStage(ship) if isinstance(recipe.train, Train) else None,
        AdoptStage(ship) if isinstance(recipe.train, Adopted) else None,
        ValidateStage(ship) if is_adapted else None,
        EvaluateStage(ship) if is_adapted and has_data and ship.heldout else None,
        CalibrateStage(ship) if recipe.export.is_calibrated else None,
        MergeStage(ship) if not makes_gguf else None,
        *(ExportStage(quant) for quant in types if makes_gguf),
        *(ModelfileStage(quant) for quant in types if makes_gguf),
        *(VerifyStage(quant) for quant in types if makes_gguf),
        DeployAction(ship) if is_deployed else None,
        SmokeAction(ship) if is_deployed else None,
    )
    return tuple(step for step in steps if step is not None)
