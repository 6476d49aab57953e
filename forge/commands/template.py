"""`forge template`: the chat template of any model as a Go template, proved on generated conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge import report
from forge.chat.format_check import NOT_CLAIMED, compile_template, limit_names
from forge.chat.format_source import read_source
from forge.chat.hand_over import day_in
from forge.errors import CheckError


def template(path: Path, *, bos: str | None, eos: str | None) -> Mapping[str, object]:
    """Show the Go template of `path`; returns the contract's fields.

    Raises `TemplateRefusedError`, with those fields, where there is none.
    """
    source = read_source(path, bos=bos, eos=eos)
    compiled = compile_template(source.template, add_bos=source.add_bos)
    limits, day = limit_names(compiled.limits), day_in(source.template)
    variables = list(source.template.variables_read())
    if compiled.go is not None:
        report.success(
            f"{compiled.status}: {compiled.checked} conversations compared; "
            f"stops: {', '.join(compiled.stops)}"
        )
        for limit in limits:
            report.info(f"not claimed: {limit}")
        report.info(f"never claimed: {'; '.join(NOT_CLAIMED)}")
        if day:
            report.info(f"it writes a date: the text has {day} for good")
        if variables:
            report.info(f"it reads {', '.join(variables)}: the text has them undefined")
        report.output(compiled.go)
    fields = {
        "status": compiled.status,
        "limits": limits,
        "reason": compiled.reason,
        "go": compiled.go,
        "stops": list(compiled.stops),
        "default_system": compiled.chat.default_system if compiled.chat else None,
        "conversations_checked": compiled.checked,
        "day": day,
        "variables_read": variables,
        "not_claimed": list(NOT_CLAIMED),
    }
    if compiled.go is None:
        raise TemplateRefusedError(fields)
    return fields


class TemplateRefusedError(CheckError):
    """No Go template is right for the chat template."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__(
            f"refused: {fields['reason']}",
            hint="serve it where the GGUF's own template is rendered: forge serve, or Ollama since 0.30",
        )
        self.fields = fields
