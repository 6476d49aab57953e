"""trl's trainers of each objective, and the rows in the columns that each reads. Runs in a worker.

The ids come ready from `data.prepare`; trl would render and encode the rows anew, with its own template's
ends. DPO and KTO compare the model with the base without the adapter; where training goes on from an adapter
it is that adapter, of which trl keeps a copy. ORPO compares with nothing, and learns the chosen answers too;
its trainer is one of trl's experiments.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from forge.data.prepare import PreparedRow
from forge.data.tokens import IGNORED
from forge.train.arguments import experimental

_REFERENCE = "ref"  # trl's name of the copy


def trainer_of(objective: str) -> Any:
    """trl's trainer, for rows that are ids already."""
    import trl

    if objective == "sft":
        return trl.SFTTrainer
    if objective == "orpo":

        class OrpoTrainer(experimental("orpo").ORPOTrainer):  # type: ignore[misc]
            def tokenize_row(self, feature: Any, model: Any = None) -> Any:
                return feature

            def store_metrics(self, metrics: Any, train_eval: str = "train") -> None:
                # Which answer is the likelier, with no base to compare with: no preference that was learned.
                metrics.pop(f"{train_eval}_rewards/accuracies", None)
                super().store_metrics(metrics, train_eval)

        return OrpoTrainer
    known = trl.DPOTrainer if objective == "dpo" else trl.KTOTrainer

    class PreferenceTrainer(known):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return PreferenceTrainer


def trainer_rows(objective: str, rows: Sequence[PreparedRow], batch: int, seed: int) -> Any:
    """The rows in the columns of trl's trainer; `batch` of them are held at once."""
    import datasets

    match objective:
        case "sft":
            columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
        case "dpo":
            columns = _paired(rows)
        case "orpo":
            columns = _both_whole(rows)
        case _:
            columns = _judged(rows, batch, seed)
    return datasets.Dataset.from_dict(columns)


def _parted(row: PreparedRow) -> tuple[list[int], list[int]]:
    """The prompt, and the answer that follows it."""
    ids = list(row["input_ids"])
    begins = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
    return ids[:begins], ids[begins:]


def _paired(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    """A prompt, and what follows it in the chosen and in the rejected answer."""
    parted = [(*_parted(row), row) for row in rows]
    return {
        "prompt_ids": [prompt for prompt, _, _ in parted],
        "chosen_ids": [chosen for _, chosen, _ in parted],
        "rejected_ids": [list(row["rejected_ids"])[len(prompt) :] for prompt, _, row in parted],
    }


def _both_whole(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    """Both answers as rows of their own, their prompts without loss."""
    columns: dict[str, Any] = {}
    for side, ids, labels in (
        ("chosen", "input_ids", "labels"),
        ("rejected", "rejected_ids", "rejected_labels"),
    ):
        columns[f"{side}_input_ids"] = [row[ids] for row in rows]  # type: ignore[literal-required]
        columns[f"{side}_attention_mask"] = [[1] * len(row) for row in columns[f"{side}_input_ids"]]
        columns[f"{side}_labels"] = [row[labels] for row in rows]  # type: ignore[literal-required]
    return columns


def _judged(rows: Sequence[PreparedRow], batch: int, seed: int) -> dict[str, Any]:
    """Single answers, good or bad, in an order drawn once; beside each, another of its batch.

    On those trl measures how far the model has moved from its reference at all.
    """
    answers = [answer for row in rows for answer in _answers_of(row)]
    random.Random(seed).shuffle(answers)
    # No batch of one: the answer beside it would be its own.
    starts = [at for at in range(0, len(answers), batch) if at == 0 or len(answers) - at > 1]
    others: list[list[int]] = []
    for start, end in zip(starts, [*starts[1:], len(answers)], strict=True):
        completions = [completion for _, completion, _ in answers[start:end]]
        others += [completions[-1], *completions[:-1]]
    return {
        "prompt_ids": [prompt for prompt, _, _ in answers],
        "completion_ids": [completion for _, completion, _ in answers],
        "KL_completion_ids": others,
        "label": [good for _, _, good in answers],
    }


def _answers_of(row: PreparedRow) -> Iterator[tuple[list[int], list[int], bool]]:
    prompt, answer = _parted(row)
    if "rejected_ids" in row:
        yield prompt, answer, True
        yield prompt, list(row["rejected_ids"])[len(prompt) :], False
    else:
        yield prompt, answer, row["desirable"]


def drop_reference(model: Any) -> None:
    """Take away the copy of the adapter that trl compares with, where there is one."""
    if _REFERENCE in model.peft_config:
        model.delete_adapter(_REFERENCE)
