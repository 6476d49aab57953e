"""Learning from preference pairs, through trl's DPOTrainer. Runs in a worker.

The ids come ready from `data.prepare`; trl would render and encode the rows anew, with its own template's
ends. What the model is compared with is the base without the adapter; where training goes on from an adapter
it is that adapter, of which trl keeps a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forge.data.prepare import PreparedRow
from forge.data.tokens import IGNORED

_REFERENCE = "ref"  # trl's name of the copy


def pair_trainer() -> Any:
    """trl's trainer, for rows that are ids already."""
    import trl

    class PairTrainer(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return PairTrainer


def pairs_of(rows: Sequence[PreparedRow]) -> Any:
    """The rows in trl's columns: a prompt, and what follows it in the chosen and in the rejected answer."""
    import datasets

    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row in rows:
        ids = list(row["input_ids"])
        begins = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
        columns["prompt_ids"].append(ids[:begins])
        columns["chosen_ids"].append(ids[begins:])
        columns["rejected_ids"].append(list(row["rejected_ids"])[begins:])
    return datasets.Dataset.from_dict(columns)


def drop_reference(model: Any) -> None:
    """Take away the copy of the adapter that trl compares with, where there is one."""
    if _REFERENCE in model.peft_config:
        model.delete_adapter(_REFERENCE)
