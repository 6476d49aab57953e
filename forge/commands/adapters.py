"""`forge adapters`: several adapters on one base, held side by side or merged with weights into one."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from forge import report, worker
from forge.adapter import combine, several
from forge.adapter.combine import PRUNES, Combination, Combined, CombineRequest, Weighted
from forge.adapter.directory import CONFIG_FILE, WEIGHTS_FILE
from forge.adapter.places import other_base
from forge.adapter.read import read_adapter
from forge.adapter.several import Named, SeveralRequest
from forge.codec import to_plain
from forge.errors import RecipeError
from forge.files import sha256_of, work_beside
from forge.model.config import read_json
from forge.resolve.bases import directory_of
from forge.resolve.taught import trained_tokenizer
from forge.runs.files import ADAPTER
from forge.runs.find import find_run

ORIGIN = "merged_from.json"
"""Beside a merged adapter: what it was merged from, and how near it is to the weighted sum."""


def list_adapters(base: str, adapters: Mapping[str, Path]) -> Mapping[str, object]:
    """`forge adapters list`; raises what `several.hold` raises."""
    directory = directory_of(base)
    named = tuple(Named(name, _directory(str(path))) for name, path in adapters.items())
    if odd := [item.name for item in named if "." in item.name]:
        raise RecipeError(f"{odd[0]}: a name has no full stop in it", hint="it is part of the layers' names")
    _warn_of_other_bases(base, directory, [item.adapter for item in named])
    held = worker.perform(several.hold, SeveralRequest(directory, named))
    rows = [
        (
            item.name,
            item.modules,
            f"{item.parameters:,}",
            f"{statistics.median(item.changes.values()):.2%}",
            f"{max(item.changes.values()):.2%} {max(item.changes, key=lambda name: item.changes[name])}",
            f"{item.logits:.3g}",
        )
        for item in held.adapters
    ]
    columns = ("adapter", "layers", "parameters", "change (median)", "largest", "logits moved")
    report.table(f"{len(rows)} adapters on {base}", columns, rows)
    if held.kept_by_unload:
        report.warning(
            f"{', '.join(held.kept_by_unload)}: peft's unload() leaves what these saved whole in the model; "
            "load the base anew, or switch them off with disable_adapter()"
        )
    report.success(f"each can be switched on, off and taken away: {held.checks} states as they should be")
    result: Mapping[str, object] = to_plain(held)
    return result


def merge_adapters(
    base: str,
    adapters: Sequence[str],
    out: Path,
    *,
    combination: Combination = "cat",
    rank: int | None = None,
    density: float | None = None,
    sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> Mapping[str, object]:
    """`forge adapters merge`: write the adapter `out`, whole or not at all.

    Raises `RecipeError` for options that cannot be, and what `combine.combine` raises.
    """
    _check_options(out, combination, rank, density)
    parts = tuple(_weighted(text) for text in adapters)
    directory = directory_of(base)
    combine.refuse_uncombinable([read_adapter(part.adapter) for part in parts])
    _warn_of_other_bases(base, directory, [part.adapter for part in parts])
    tokenizers = [trained_tokenizer(directory, part.adapter) for part in parts]
    if len({tokenizer.chat_template for tokenizer in tokenizers}) > 1:
        report.warning(f"the adapters were trained with different chat templates: {adapters[0]}'s is taken")
    out = out.absolute()
    with work_beside(out) as scratch:
        request = CombineRequest(
            directory,
            parts,
            tokenizers[0].directory,
            scratch / "adapter",
            combination,
            rank,
            density,
            sign,
            seed,
        )
        combined = worker.perform(combine.combine, request)
        origin = {**_origin(request), "error": combined.error, "least": combined.least}
        text = json.dumps(origin, indent=2) + "\n"
        (scratch / "adapter" / ORIGIN).write_text(text, encoding="utf-8")
        (scratch / "adapter").rename(out)
    _show(out, combination, combined)
    return {"adapter": str(out), **to_plain(combined)}


def _check_options(out: Path, combination: str, rank: int | None, density: float | None) -> None:
    if out.exists():
        raise RecipeError(f"--out: {out} exists: an adapter is never written over", hint="name another")
    if rank is not None and not combination.endswith("svd"):
        raise RecipeError(f"--rank is of the combinations that end in svd, not of {combination}")
    prunes = combination.startswith(PRUNES)
    if prunes and density is None:
        raise RecipeError(f"{combination} keeps a share of the values", hint="say which: --density 0.5")
    if density is not None and not prunes:
        raise RecipeError(f"{combination} keeps every value", hint="leave --density out")


def _weighted(text: str) -> Weighted:
    name, equals, weight = text.rpartition("=")
    try:
        number = float(weight) if equals and name else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number == 0:
        raise RecipeError(
            f"{text}: ADAPTER=WEIGHT, the weight a number other than 0", hint="such as runs/yoda/adapter=0.7"
        )
    return Weighted(_directory(name), number)


def _directory(name: str) -> Path:
    """An adapter's own directory, or that of a run."""
    path = Path(name)
    return path.absolute() if path.exists() and not _is_run(path) else find_run(name) / ADAPTER


def _is_run(path: Path) -> bool:
    return not (path / CONFIG_FILE).is_file() and (path / ADAPTER / CONFIG_FILE).is_file()


def _warn_of_other_bases(base: str, directory: Path, adapters: Sequence[Path]) -> None:
    local = read_json(directory / "config.json")
    for adapter in adapters:
        if another := other_base(read_adapter(adapter), base, local):
            report.warning(f"{adapter}: {another}")


def _origin(request: CombineRequest) -> Mapping[str, object]:
    parts = [
        {"name": part.adapter.name, "weight": part.weight, "sha256": sha256_of(part.adapter / WEIGHTS_FILE)}
        for part in request.parts
    ]
    options = {"rank": request.rank, "density": request.density, "sign": request.sign, "seed": request.seed}
    return {"combination": request.combination, **options, "parts": parts}


def _show(out: Path, combination: str, combined: Combined) -> None:
    if combined.is_exact:
        report.info(f"{combination}: the weighted sum, to {combined.error:.1e} of its norm, in every layer")
    else:
        worst = max(combined.layers, key=lambda name: combined.layers[name].error)
        report.warning(
            f"{combination} is not the weighted sum: {combined.error:.1%} of its norm is missing (most, "
            f"{combined.layers[worst].error:.1%}, in {worst}); the best of rank {combined.rank} would miss "
            f"{combined.least:.1%}, and cat nothing"
        )
    if combined.forward is None:
        needed = combined.bytes_for_forward / 1e9
        report.info(f"logits were not compared: the base in float32 takes {needed:.1f} GB of memory")
    else:
        report.info(
            f"logits against the adapters active together: within {combined.forward.largest_difference:.2g}, "
            f"KL {combined.forward.mean_kl:.2g}, on {combined.forward.positions} positions"
        )
    report.success(f"wrote {out}: {len(combined.layers)} layers, rank {combined.rank}")
