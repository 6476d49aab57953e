"""What can be done with a base and an adapter without a ship: validate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from forge import report, worker
from forge.adapter import status
from forge.adapter.places import other_base
from forge.adapter.read import read_adapter
from forge.adapter.status import ValidateRequest
from forge.codec import to_plain
from forge.model.config import read_json
from forge.resolve.bases import directory_of

# As long as the adapter has layers, or said in a line of its own.
_NOT_SHOWN = {"adapted_modules", "impurities", "trainable_parameters"}


def validate(base: str, adapter: Path) -> Mapping[str, object]:
    """`forge validate --base --adapter`; raises what `adapter.status.validate_adapter` raises."""
    directory = directory_of(base)
    validated = worker.perform(status.validate_adapter, ValidateRequest(directory, adapter.absolute()))
    report.success(
        f"sound: {len(validated.adapted_modules)} layers, "
        f"{validated.trainable_parameters:,} parameters, scale {validated.scale}"
    )
    if validated.vocabulary_rows:
        report.info(f"it resized the embedding to {validated.vocabulary_rows} rows")
    if validated.untied:
        report.info("it trained embedding and output layer apart, which the base ties: both are written")
    if not validated.pure:
        report.info("not pure: " + "; ".join(validated.impurities))
    another = other_base(read_adapter(adapter), base, read_json(directory / "config.json"))
    warnings = [*validated.warnings, *([another] if another else [])]
    for warning in warnings:
        report.warning(warning)
    shown: Mapping[str, object] = to_plain(replace(validated, warnings=tuple(warnings)))
    return {name: value for name, value in shown.items() if name not in _NOT_SHOWN}
