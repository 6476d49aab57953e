"""`report.html` of a run: one file, no scripts, nothing fetched; made from what the manifest holds.

Each stage brings its own section; this is what stands around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from forge.files import write_text
from forge.pipeline.stage import Result, Step
from forge.ship.pictures import ids_that_differ, kl_by_position, kl_by_size, loss_curve, top1_by_stage

# What a section may draw.
_PICTURES = {
    picture.__name__: picture
    for picture in (ids_that_differ, kl_by_position, kl_by_size, loss_curve, top1_by_stage)
}


def page_environment(**values: object) -> jinja2.Environment:
    """What makes a page of a template: it escapes what it writes, and knows `values` and the `style`."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    environment.globals |= {**values, "style": Markup(style)}
    return environment


def write_page(
    path: Path, manifest: Mapping[str, Any], stages: Sequence[Step], results: Mapping[str, Result]
) -> None:
    """Write the report of `stages`, those that have a result."""
    environment = page_environment(**_PICTURES, manifest=manifest)
    shown = sorted((stage for stage in stages if stage.name in results), key=lambda stage: stage.rank)
    sections = [
        environment.from_string(stage.section()).render(
            facts=results[stage.name].facts, **stage.section_values(results[stage.name])
        )
        for stage in shown
    ]
    page = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))
    write_text(path, page.render(sections=[section for section in sections if section.strip()]))
