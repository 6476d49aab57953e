"""The stage *evaluate*: what was learned, on rows that were held out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from forge import report, worker
from forge.codec import Json
from forge.data.account import Prepared
from forge.errors import CheckError, ForgeError
from forge.pipeline.stage import Result
from forge.resolve.stage import ShipStage, installed
from forge.runs.manifest import Learned
from forge.stages.data import DATA_STAGE
from forge.stages.train import ADAPTER_STAGE, BASE_FIELDS, TRAINING_STACK
from forge.store.artifacts import Artifact
from forge.train.evaluate import Evaluated, EvaluateRequest, Preferred, evaluate
from forge.train.log import LOG_FILE, Step, read_log
from forge.train.model import BaseSettings
from forge.train.outcome import fall_at_the_end, is_far, is_guessing, still_falling
from forge.train.request import Trained

# Below this share of itself a loss differs by rounding: measured again on other hardware, or another batch.
_ARITHMETIC = 1e-4
# One-sided 95 % points: of Student's t for 2, 3, ... rows, and of the normal distribution.
_STUDENT, _NORMAL = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943), 1.645


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
            "train.beta": training.beta if training and training.compares else None,
            **({f"train.{name}": getattr(training, name) for name in BASE_FIELDS} if training else {}),
        }

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in TRAINING_STACK}

    def packages(self) -> Collection[str]:
        return ("torch", "transformers", "peft")

    def findings(self, results: Mapping[str, Result]) -> Mapping[str, object]:
        measured = evaluated(results[self.name])
        return {"learned": learned(measured) if measured else None}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Evaluated | Mapping[str, object]:
        if not inputs[DATA_STAGE].read(Prepared).heldout_rows:
            return {"rows": 0}
        ship, training = self.ship, self.ship.training
        request = EvaluateRequest(
            base=ship.base_directory,
            adapter=inputs[ADAPTER_STAGE].path,
            data=inputs[DATA_STAGE].path,
            tokenizer=ship.tokenizer.directory,
            loading=BaseSettings.of(training, trust_remote_code=ship.runs_own_code),
            device=training.device if training else "auto",
            dtype=training.dtype if training else "auto",
            end_of_turn_id=ship.prompt_format.end_of_turn_id,
            pad_token_id=ship.pad_token_id,
            beta=training.beta if training and training.compares else None,
        )
        measured = worker.perform(evaluate, request, log=ship.log)
        return replace(measured, falling=_falling(inputs[ADAPTER_STAGE], measured))

    def judge(self, artifact: Artifact) -> ForgeError | None:
        wanted, measured = self.ship.recipe.verify.learned, evaluated(artifact)
        if measured is None:
            report.warning(
                "what was learned is not measured: the rows are so few that none was held out; "
                "data.eval: 1 holds one out, or names a file of its own"
            )
            return None
        report.info(figures(measured))
        message = nothing_learned(measured)
        if message is None:
            for remark in remarks(measured):
                report.warning(remark)
        if message is None or wanted == "off":
            return None
        if wanted == "warn":
            report.warning(message)
            return None
        worse = not measured.preferred and measured.loss.after > measured.loss.before
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


def evaluated(stage: Artifact | Result) -> Evaluated | None:
    """What was measured; None where no rows were held out."""
    return stage.read(Evaluated) if stage.facts["rows"] else None


def _falling(training: Artifact, measured: Evaluated) -> str | None:
    """What still fell when the training ended; None where nothing did, or an adapter was adopted."""
    if "adopted_from" in training.facts:
        return None
    evaluations = [evaluation.loss for evaluation in training.read(Trained).evaluations]
    if evaluations or measured.preferred:
        ends = f"{evaluations[-2]:.3g} -> {evaluations[-1]:.3g}" if len(evaluations) > 1 else ""
        return f"the held-out loss ({ends})" if still_falling(evaluations) else None
    falls = fall_at_the_end(
        [step.loss for step in read_log(training.path / LOG_FILE, Step)], measured.loss.after
    )
    return f"the training loss ({falls[0]:.3g} -> {falls[1]:.3g} in the second half)" if falls else None


def figures(measured: Evaluated) -> str:
    """Held-out loss, perplexity and exact answers, before and after."""
    loss, perplexity, exact = measured.loss, measured.perplexity, measured.exact
    answers = f", exact answers {exact.before} -> {exact.after} of {exact.rows}" if exact else ""
    if preferred := measured.preferred:
        answers += (
            f"; {_better(preferred)} preferred in {preferred.accuracy:.0%}, margin {preferred.margin:.3g}"
        )
        if likelier := preferred.likelier:
            answers += f" (likelier than the rejected one in {likelier.before:.0%} -> {likelier.after:.0%})"
    return (
        f"held-out rows ({measured.rows}): loss {loss.before:.4f} -> {loss.after:.4f} a token, "
        f"perplexity {perplexity.before:.4g} -> {perplexity.after:.4g}{answers}"
    )


def _better(preferred: Preferred) -> str:
    return "the chosen answer" if preferred.likelier else "a good answer to a bad one"


def nothing_learned(measured: Evaluated) -> str | None:
    """Why these figures show that nothing was learned; None where they show that something was."""
    loss, vocabulary = measured.loss, measured.vocabulary
    nothing = (
        f"nothing was learned: the held-out loss is {loss.after:.6g} after training, {loss.before:.6g} before"
    )
    if is_guessing(loss.after, vocabulary) and not (measured.preferred and loss.after <= loss.before):
        perplexity = measured.perplexity.after
        return f"{nothing}: perplexity {perplexity:,.0f} is worse than guessing among {vocabulary:,} tokens"
    if measured.preferred:
        return _no_preference(measured.preferred, measured.rows)
    if has_improved(measured):
        return None
    doubt = least_improvement(measured)
    if loss.after < loss.before:
        return f"{nothing}, and {measured.rows} rows cannot tell an improvement under {doubt:.2g} from none"
    if loss.after - loss.before > doubt:
        return f"{nothing}: better than guessing, but the base itself answers these rows better"
    return nothing


def _no_preference(preferred: Preferred, rows: int) -> str | None:
    """Why the held-out pairs do not show that the chosen answers are preferred now."""
    error = preferred.error
    doubt = 0.0 if error is None else error * _students_t(rows)
    if preferred.margin > doubt:
        return None
    nothing = (
        f"nothing was learned: {_better(preferred)} is preferred in {preferred.accuracy:.0%} of {rows} "
        f"held-out {'pairs' if preferred.likelier else 'good answers'}, by a margin of {preferred.margin:.3g}"
    )
    return (
        f"{nothing}, and they cannot tell one under {doubt:.2g} from none"
        if preferred.margin > 0
        else nothing
    )


def remarks(measured: Evaluated) -> Iterator[str]:
    """What a person should know of a model that did learn something."""
    if is_far(measured.loss.after, measured.vocabulary):
        yield (
            f"perplexity {measured.perplexity.after:,.4g} of {measured.vocabulary:,} tokens: better than "
            "guessing, but far from an answer; take a base that knows the language, or more rows or epochs"
        )
    if measured.falling:
        yield (
            f"{measured.falling} was still falling when training ended: more train.epochs may teach it more"
        )


def has_improved(measured: Evaluated) -> bool:
    """Whether the held-out loss fell by more than its own uncertainty."""
    return measured.loss.before - measured.loss.after > least_improvement(measured)


def least_improvement(measured: Evaluated) -> float:
    """The least fall of the loss (nats a token) that the rows can tell from none.

    Of one row only the arithmetic's part is known.
    """
    error, rows = measured.loss_error, measured.rows
    of_rows = 0.0 if error is None else error * _students_t(rows)
    return max(of_rows, _ARITHMETIC * measured.loss.before)


def _students_t(rows: int) -> float:
    """The one-sided 95 % point of `rows` - 1 degrees of freedom; of many by Fisher's expansion, to 0.004."""
    if rows - 2 < len(_STUDENT):
        return _STUDENT[rows - 2]
    z, freedom = _NORMAL, rows - 1
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def learned(measured: Evaluated, served_exact: int | None = None) -> Learned:
    """The figures before and after: exact answers where there are short ones, else held-out loss.

    `after` is of the tuned model, or of the shipped file behind its server where that gave `served_exact`
    exact answers.
    """
    exact, preferred = measured.exact, measured.preferred
    if preferred:
        metric = "preference" if preferred.likelier else "judgement"
        return Learned(metric, 0.0, preferred.accuracy, measured.rows)
    if not exact:
        return Learned("heldout_loss", measured.loss.before, measured.loss.after, measured.rows)
    return Learned(
        "exact_match",
        before=round(exact.before / exact.rows, 4),
        after=round((exact.after if served_exact is None else served_exact) / exact.rows, 4),
        rows=exact.rows,
        served=served_exact is not None,
    )
