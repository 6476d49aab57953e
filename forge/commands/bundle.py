"""`forge bundle`: what of a run, or of a GGUF file, goes into the archive."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from forge import report
from forge.chat.hand_over import MODELFILE, MODELFILE_JINJA
from forge.model.gguf_header import read_whole_gguf
from forge.runs.find import find_run
from forge.runs.manifest import Manifest, read_manifest
from forge.serve import ready
from forge.serve.bundle import Contents, write_bundle
from forge.ship.serving import Wish, settings

_HELLO = "Hello!"
# What may stand in a JSON text as it is, so that the smoke test can look for it.
_PLAIN = re.compile(r"[A-Za-z0-9 ,.;:!?'()-]+")


def bundle(
    target: str,
    out: Path,
    context: int | None = None,
) -> Mapping[str, object]:
    """Write the archive; gives the contract's fields. The smoke question is the run's own first."""
    chosen = settings(Wish(target, context=context))
    ready.check_settings(chosen)
    run = None if Path(target).is_file() else find_run(target)
    manifest = read_manifest(run) if run else Manifest()
    question, expect = _smoke(manifest)
    modelfiles = [run / name for name in (MODELFILE, MODELFILE_JINJA)] if run else []
    contents = Contents(
        name=re.sub(r"[^A-Za-z0-9._-]", "-", chosen.alias),
        model=chosen.model,
        adapter=chosen.adapter,
        context_tokens=chosen.context_tokens,
        licence=_licence(manifest, chosen.model),
        question=question,
        expect=expect,
        files={path.name: path for path in modelfiles if path.is_file()},
    )
    size = write_bundle(contents, out.absolute())
    report.success(f"wrote {out}: {size / 1e6:.1f} MB")
    return {"bundle": str(out.absolute()), "bytes": size}


def _smoke(manifest: Manifest) -> tuple[str, str]:
    """A question that the run was asked, and the plain beginning of the answer it gave."""
    for asked in manifest.read_facts().smoke.smoke:
        plain = _PLAIN.match(asked.answer.strip())
        if asked.ok and plain:
            return asked.prompt, plain[0][:40]
    return _HELLO, ""


def _licence(manifest: Manifest, model: Path) -> str:
    licence = manifest.base.licence or read_whole_gguf(model).metadata.get("general.license")
    made = f", made from {manifest.base.spec}" if manifest.base.spec else ""
    return f"{model.name}{made}: {licence or 'its licence is not known; ask whoever made the base'}"
