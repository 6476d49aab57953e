"""`report.html` of a run: one file, no scripts, nothing fetched; made from what the manifest holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from forge.pipeline.stage import Result
from forge.ship.pictures import ids_that_differ, kl_by_position, kl_by_size, loss_curve, top1_by_stage
from forge.store import durable
from forge.train.run import LOG_FILE


def write_page(path: Path, manifest: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Write the report; the loss curve comes from the training log in the store."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))
    durable.write_text(
        path,
        template.render(
            manifest=manifest,
            facts=manifest["facts"],
            curve=loss_curve(_losses(results)),
            certificate=manifest["certificate"],
            pictures=_pictures(manifest["certificate"]) | _picture_of_types(manifest["facts"]),
            answers=_answers(manifest["facts"]),
        ),
    )


def _picture_of_types(facts: Mapping[str, Any]) -> dict[str, str]:
    found = facts.get("calibrate", {})
    if "types" not in found:
        return {}
    return {"types": kl_by_size(found["types"], found["max_kl"], found["quant"])}


def _pictures(certificate: Mapping[str, Any] | None) -> dict[str, str]:
    if certificate is None:
        return {}
    tokens = certificate["tokens"]
    return {
        "kl": kl_by_position(certificate["kl_by_position"]),
        "top1": top1_by_stage(certificate["handovers"]),
        "ids": ids_that_differ(tokens["compared"] - tokens["different"], tokens["different"]),
    }


def _losses(results: Mapping[str, Result]) -> list[tuple[int, float]]:
    train = results.get("train")
    log = train.artifact.path / LOG_FILE if train and train.artifact else None
    if log is None or not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def _answers(facts: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Held-out answers, the served ones where the shipped file was asked."""
    served = (facts.get("smoke") or {}).get("heldout")
    exact = (facts.get("evaluate") or {}).get("exact")
    found: Sequence[Mapping[str, Any]] = (served or exact or {}).get("answers", [])
    return found
