"""What can be done with a base and an adapter without a ship: validate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge import report, worker
from forge.adapter.places import other_base
from forge.adapter.read import read_adapter
from forge.model.config import read_json
from forge.resolve.bases import directory_of


def validate(base: str, adapter: Path) -> dict[str, Any]:
    """`forge validate --base --adapter`; raises what `adapter.status.validate` raises."""
    facts = worker.call("validate", {"base": str(directory_of(base)), "adapter": str(adapter.absolute())})
    report.success(
        f"sound: {len(facts['adapted_modules'])} layers, "
        f"{facts['trainable_parameters']:,} parameters, scale {facts['scale']}"
    )
    if facts["vocabulary_rows"]:
        report.info(f"it resized the embedding to {facts['vocabulary_rows']} rows")
    if facts["untied"]:
        report.info("it trained embedding and output layer apart, which the base ties: both are written")
    if not facts["pure"]:
        report.info("not pure: " + "; ".join(facts["impurities"]))
    another = other_base(read_adapter(adapter), base, read_json(directory_of(base) / "config.json"))
    facts["warnings"] += [another] if another else []
    for warning in facts["warnings"]:
        report.warning(warning)
    shown = "ok status layers vocabulary_rows untied pure scale exports warnings problems"
    return {key: facts[key] for key in shown.split()}
