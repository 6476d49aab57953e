"""The stage *evaluate*: what was learned, on rows that were held out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.errors import CheckError, ForgeError
from forge.pipeline.stage import Result
from forge.resolve.stage import ShipStage, installed
from forge.runs.manifest import Learned
from forge.stages.data import DATA_STAGE
from forge.stages.train import ADAPTER_STAGE, BASE_FIELDS, TRAINING_STACK
from forge.store.artifacts import Artifact
from forge.store.digest import Json

# Below this share of itself a loss differs by rounding: measured again on other hardware, or another batch.
_ARITHMETIC = 1e-4
# One-sided 95 % points of Student's t for 2, 3, ... rows; the last for all that are more.
_STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.75, 1.70, 1.645)


class EvaluateStage(ShipStage):
    """Held-out loss and answers of base and tuned model; judged afresh on every run."""

    name = "evaluate"
    rank = 20
    version = 3
    needs = (DATA_STAGE, ADAPTER_STAGE)

    def params(self) -> Mapping[str, Json]:
        training = self.ship.training
        return {
            "base": self.ship.base_digest,
            "train.method": training.method if training else None,
            "train.device": training.device if training else "auto",
            "train.dtype": training.dtype if training else "auto",
            **({f"train.{name}": getattr(training, name) for name in BASE_FIELDS} if training else {}),
        }

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in TRAINING_STACK}

    def packages(self) -> Collection[str]:
        return ("torch", "transformers", "peft")

    def findings(self, results: Mapping[str, Result]) -> Mapping[str, object]:
        return {"learned": learned(results[self.name].facts)}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        if not inputs[DATA_STAGE].facts["heldout_rows"]:
            return {"rows": 0}
        training = self.ship.training
        settings = {
            "device": training.device if training else "auto",
            "dtype": training.dtype if training else "auto",
            "method": training.method if training else "lora",
            **({name: getattr(training, name) for name in BASE_FIELDS} if training else {}),
            "trust_remote_code": self.ship.runs_own_code,
            "seed": training.seed if training else 0,
            "end_of_turn_id": self.ship.prompt_format.end_of_turn_id,
            "pad_token_id": self.ship.pad_token_id,
            "tokenizer": str(self.ship.tokenizer.directory),
        }
        arguments = {
            "base": str(self.ship.base_directory),
            "adapter": str(inputs[ADAPTER_STAGE].path),
            "data": str(inputs[DATA_STAGE].path),
            "settings": settings,
        }
        return worker.call("evaluate", arguments, log=self.ship.log)

    def judge(self, artifact: Artifact) -> ForgeError | None:
        wanted, facts = self.ship.recipe.verify.learned, artifact.facts
        if not facts["rows"]:
            report.warning(
                "what was learned is not measured: the rows are so few that none was held out; "
                "data.eval: 1 holds one out, or names a file of its own"
            )
            return None
        if wanted == "off" or has_improved(facts):
            return None
        loss, doubt = facts["loss"], least_improvement(facts)
        message = (
            f"nothing was learned: the held-out loss is {loss['after']:.6g} after training, "
            f"{loss['before']:.6g} before"
        )
        if loss["after"] < loss["before"]:
            message += f", and {facts['rows']} rows cannot tell an improvement under {doubt:.2g} from none"
        if wanted == "warn":
            report.warning(message)
            return None
        return CheckError(
            message,
            hint="train longer or with a higher learning rate, look at the data's first row in the report; "
            "verify.learned: warn ships it all the same",
        )


def has_improved(facts: Mapping[str, Any]) -> bool:
    """Whether the held-out loss fell by more than its own uncertainty."""
    loss = facts["loss"]
    return bool(loss["before"] - loss["after"] > least_improvement(facts))


def least_improvement(facts: Mapping[str, Any]) -> float:
    """The least fall of the loss (nats a token) that the rows can tell from none.

    Of one row only the arithmetic's part is known.
    """
    error, rows = facts.get("loss_error"), facts["rows"]
    of_rows = 0.0 if error is None else error * _STUDENT[min(rows - 2, len(_STUDENT) - 1)]
    return max(of_rows, _ARITHMETIC * float(facts["loss"]["before"]))


def learned(facts: Mapping[str, Any], served: Mapping[str, Any] | None = None) -> Learned | None:
    """The figures before and after: exact answers where there are short ones, else held-out loss.

    `after` is of the tuned model, or of the shipped file behind its server: `served`, what it answered.
    """
    if not facts["rows"]:
        return None
    exact = facts.get("exact")
    if not exact:
        return Learned("heldout_loss", facts["loss"]["before"], facts["loss"]["after"], facts["rows"])
    rows = exact["rows"]
    return Learned(
        "exact_match",
        before=round(exact["before"] / rows, 4),
        after=round((served["exact"] if served else exact["after"]) / rows, 4),
        rows=rows,
        served=served is not None,
    )
