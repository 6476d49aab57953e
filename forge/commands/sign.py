"""`forge sign`: a signature of a run's files, of any directory or file, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge import report
from forge.errors import RecipeError
from forge.runs.files import SIGNATURE
from forge.runs.find import find_run
from forge.tools.model_signing import check_signature, sign_files


def sign(
    target: str, *, key: Path | None, public: Path | None, signature: Path | None
) -> Mapping[str, object]:
    """Sign with `key`, or check with `public`; gives the command's fields."""
    if (key is None) == (public is None):
        raise RecipeError("give --key to sign, or --check to see whether a signature holds")
    path = Path(target).absolute() if Path(target).exists() else find_run(target)
    place = signature or (path / SIGNATURE if path.is_dir() else path.with_name(f"{path.name}.sig"))
    if key is not None:
        sign_files(path, key, place)
        report.success(f"wrote {place}: all files of {path}, signed")
    elif public is not None:
        check_signature(path, public, place)
        report.success(f"{path} is what the owner of {public} signed")
    return {"target": str(path), "signature": str(place), "checked": key is None}
