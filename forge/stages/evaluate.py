"""The stage *evaluate*: what was learned, on rows that were held out."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
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
from forge.train.outcome import fall_at_the_end, is_far, is_guessing, still_falling
from forge.train.run import LOG_FILE

# Below this share of itself a loss differs by rounding: measured again on other hardware, or another batch.
_ARITHMETIC = 1e-4
# One-sided 95 % points of Student's t for 2, 3, ... rows; the last for all that are more.
_STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.75, 1.70, 1.645)


class EvaluateStage(ShipStage):
    """Held-out loss and answers of base and tuned model; judged afresh on every run."""

    name = "evaluate"
    rank = 20
    version = 4
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
        measured = worker.call("evaluate", arguments, log=self.ship.log)
        return {**measured, "falling": _falling(inputs[ADAPTER_STAGE], measured["loss"]["after"])}

    def judge(self, artifact: Artifact) -> ForgeError | None:
        wanted, facts = self.ship.recipe.verify.learned, artifact.facts
        if not facts["rows"]:
            report.warning(
                "what was learned is not measured: the rows are so few that none was held out; "
                "data.eval: 1 holds one out, or names a file of its own"
            )
            return None
        report.info(figures(facts))
        message = nothing_learned(facts)
        if message is None:
            for remark in remarks(facts):
                report.warning(remark)
        if message is None or wanted == "off":
            return None
        if wanted == "warn":
            report.warning(message)
            return None
        worse = facts["loss"]["after"] > facts["loss"]["before"]
        way = (
            "a lower learning rate or fewer epochs"
            if worse
            else "train longer or with a higher learning rate"
        )
        return CheckError(
            message,
            hint=f"{way}; look at the data's first row in the report; "
            "verify.learned: warn ships it all the same",
        )


def _falling(training: Artifact, heldout: float) -> str | None:
    """What still fell when the training ended; None where nothing did, or an adapter was adopted."""
    evaluations = [one["loss"] for one in training.facts.get("evaluations") or ()]
    if evaluations:
        ends = f"{evaluations[-2]:.3g} -> {evaluations[-1]:.3g}" if len(evaluations) > 1 else ""
        return f"the held-out loss ({ends})" if still_falling(evaluations) else None
    log = training.path / LOG_FILE
    if not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8").splitlines()
    falls = fall_at_the_end([json.loads(line)["loss"] for line in lines], heldout)
    return f"the training loss ({falls[0]:.3g} -> {falls[1]:.3g} in the second half)" if falls else None


def figures(facts: Mapping[str, Any]) -> str:
    """Held-out loss, perplexity and exact answers, before and after."""
    loss, perplexity, exact = facts["loss"], facts["perplexity"], facts.get("exact")
    answers = f", exact answers {exact['before']} -> {exact['after']} of {exact['rows']}" if exact else ""
    return (
        f"held-out rows ({facts['rows']}): loss {loss['before']:.4f} -> {loss['after']:.4f} a token, "
        f"perplexity {perplexity['before']:.4g} -> {perplexity['after']:.4g}{answers}"
    )


def nothing_learned(facts: Mapping[str, Any]) -> str | None:
    """Why these figures show that nothing was learned; None where they show that something was."""
    loss, vocabulary = facts["loss"], facts["vocabulary"]
    said = (
        f"nothing was learned: the held-out loss is {loss['after']:.6g} after training, "
        f"{loss['before']:.6g} before"
    )
    if is_guessing(loss["after"], vocabulary):
        perplexity = facts["perplexity"]["after"]
        return f"{said}: perplexity {perplexity:,.0f} is worse than guessing among {vocabulary:,} tokens"
    if has_improved(facts):
        return None
    doubt = least_improvement(facts)
    if loss["after"] < loss["before"]:
        return f"{said}, and {facts['rows']} rows cannot tell an improvement under {doubt:.2g} from none"
    if loss["after"] - loss["before"] > doubt:
        return f"{said}: better than guessing, but the base itself answers these rows better"
    return said


def remarks(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know of a model that did learn something."""
    if is_far(facts["loss"]["after"], facts["vocabulary"]):
        yield (
            f"perplexity {facts['perplexity']['after']:,.4g} of {facts['vocabulary']:,} tokens: better than "
            "guessing, but far from an answer; take a base that knows the language, or more rows or epochs"
        )
    if falling := facts.get("falling"):
        yield f"{falling} was still falling when training ended: more train.epochs may teach it more"


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
