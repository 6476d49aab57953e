"""What can be done with a base and an adapter without a ship: validate, export."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.model.base import resolve
from forge.model.tokenizer_files import read_tokenizer
from forge.store.artifacts import open_store
from forge.tools.llama_cpp import find_converters


def _directory(spec: str) -> Path:
    directory = resolve(spec).directory
    assert directory is not None  # only a plan leaves it open
    return directory


def validate(base: str, adapter: Path) -> dict[str, Any]:
    """`forge validate --base --adapter`; raises what `adapter.status.validate` raises."""
    facts = worker.call("validate", {"base": str(_directory(base)), "adapter": str(adapter.absolute())})
    report.success(
        f"sound: {len(facts['adapted_modules'])} layers, "
        f"{facts['trainable_parameters']:,} parameters, scale {facts['scale']}"
    )
    if not facts["pure"]:
        report.info("not pure: " + "; ".join(facts["impurities"]))
    return {key: facts[key] for key in ("ok", "status", "layers", "pure", "scale", "exports", "problems")}


def export(base: str, adapter: Path | None, out: Path, quant: str, threads: int | None) -> dict[str, Any]:
    """`forge export --base --adapter --out`; the file appears whole or not at all."""
    directory = _directory(base)
    own = adapter is not None and (adapter / "tokenizer.json").is_file()
    tokenizer = adapter if adapter is not None and own else directory
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        arguments = {
            "base": str(directory),
            "adapter": str(adapter.absolute()) if adapter else None,
            "tokenizer": str(tokenizer),
            "chat_template": read_tokenizer(tokenizer).chat_template,
            "data": None,
            "out": scratch,
            "converters": str(find_converters(open_store(read_only=True).root)),
            "settings": {"name": out.stem, "quant": quant.lower(), "keep_merged": False, "threads": threads},
        }
        facts = worker.call("export", arguments)
        shutil.move(Path(scratch) / "model.gguf", out)
    report.success(f"wrote {out}: {facts['bytes'] / 1e6:.1f} MB in {facts['seconds']} s")
    return {"gguf": str(out), **facts}
