"""`forge push`: what of a run goes to a model hub, and the card that says what it is.

The card is made from the run's manifest. What names this machine or shows rows (manifest, log, report,
certificate.json) stays here.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from forge import report
from forge.chat.hand_over import MODELFILE, MODELFILE_JINJA
from forge.errors import CheckError, DataError, RecipeError
from forge.export.run import MERGED_DIRECTORY
from forge.files import sha256_of
from forge.model.config import read_json
from forge.model.hub_repository import Repository
from forge.model.licence import notice, refuse_publishing
from forge.recipe.fields import values
from forge.runs.figures import read_whole_manifest
from forge.runs.files import ADAPTER, ADAPTER_SUFFIX, SIGNATURE
from forge.runs.find import find_run
from forge.runs.manifest import Manifest, read_run_modelfile
from forge.tools.model_signing import sign_files

Kind = Literal["adapter", "merged", "gguf"]
_REPOSITORY = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_WEIGHTS = (".gguf", ".safetensors")
# The settings that a reader looks for; all others are at forge's defaults or in the recipe.
_SETTINGS = (
    "method", "epochs", "max_steps", "learning_rate", "schedule", "batch_size", "gradient_accumulation",
    "max_length", "optimizer", "lora.r", "lora.alpha", "lora.targets", "packing", "seed",
)  # fmt: skip
# The hub's own names of licences; what it does not know is `other`, with its name.
_HUB_LICENCES = re.compile(
    r"apache-2\.0|mit|bsd(-\w+)*|cc0-1\.0|cc-by(-\w+)*-\d\.\d|a?l?gpl-\d\.\d|mpl-2\.0|isc|unlicense|openrail(\+\+)?"
    r"|bigscience-[\w.-]+|bigcode-openrail-m|creativeml-openrail-m|llama2|llama3(\.[123])?|llama4|gemma"
)


@dataclass(frozen=True)
class Push:
    """What is asked for; `what` is empty for the adapter and the GGUFs."""

    run: str
    to: str
    what: tuple[Kind, ...] = ()
    licence: str | None = None
    is_private: bool = False
    sign: Path | None = None
    is_dry: bool = False


def push(asked: Push) -> Mapping[str, object]:
    """Push the run's files in one commit; gives the contract's fields. With `is_dry` the card is shown.

    Raises `CheckError` for a run whose certificate is not sound, `DataError` for what may not be passed on,
    was changed since its ship, or is refused by the hub.
    """
    if not _REPOSITORY.fullmatch(asked.to):
        raise RecipeError(f"--to {asked.to}: no name of a repository", hint="such as --to me/yoda")
    run = find_run(asked.run)
    manifest = read_whole_manifest(run)
    licence = asked.licence or manifest.base.licence
    refuse_publishing(licence, asked.to.partition("/")[2])
    assert licence is not None  # else it was refused
    certified = manifest.read_certificate()
    if certified and not certified.ok:
        raise CheckError(
            f"{manifest.name} is not pushed: {certified.verdict}", hint="ship it until it is sound"
        )
    files: dict[str, Path | bytes] = dict(_chosen(run, asked.what))
    sums = _proved({name: path for name, path in files.items() if isinstance(path, Path)}, manifest)
    files |= dict(_without_paths(files))
    if texts := _licence_texts(run):
        files["LICENSE"] = texts.encode()
    card = _card(asked, licence, manifest, files, sums)
    files["README.md"] = card.encode()
    if asked.sign:
        files[SIGNATURE] = _signature(files, asked.sign)
    repository = Repository(asked.to)
    fields = {"url": repository.page, "files": sorted(files), "private": asked.is_private, "licence": licence}
    if asked.is_dry:
        report.output(card.rstrip("\n"))
        return {**fields, "card": card, "commit": None}
    from forge.model.hub_upload import require_login, upload

    require_login()
    commit = upload(repository, files, private=asked.is_private)
    report.success(f"pushed {len(files)} files: {repository.page}")
    return {**fields, "card": card, "commit": commit}


def _chosen(run: Path, what: Sequence[Kind]) -> Iterator[tuple[str, Path]]:
    """The files by their names in the repository, whose root is the merged model's, else the adapter's."""
    there: dict[Kind, list[Path]] = {
        "adapter": _below(run / ADAPTER),
        "merged": _below(run / MERGED_DIRECTORY),
        "gguf": sorted(run.glob("*.gguf")),
    }
    for kind in what:
        if not there[kind]:
            raise DataError(
                f"{run} has no {kind}",
                hint="export: {keep_merged: true} keeps the merged model"
                if kind == "merged"
                else "ship its recipe as far as that",
            )
    kinds = what or tuple(kind for kind in ("adapter", "gguf") if there[kind])
    if not kinds:
        raise DataError(f"{run} has neither an adapter nor a GGUF", hint="ship its recipe, or --what merged")
    for kind in kinds:
        for path in there[kind]:
            inside = f"{ADAPTER}/" if kind == "adapter" and "merged" in kinds else ""
            yield inside + path.name, path
    if "gguf" in kinds:
        yield from ((path.name, path) for path in sorted(run.glob(f"{MODELFILE}*")))


def _below(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("*")) if path.is_file() and path.name != "README.md"]


def _proved(files: Mapping[str, Path], manifest: Manifest) -> Mapping[str, str]:
    """The digests of the weights; raises `DataError` for those that are not what was shipped."""
    shipped = {file.sha256 for made in manifest.artifacts.values() for file in made.files.values()}
    sums = {name: sha256_of(path) for name, path in files.items() if path.suffix in _WEIGHTS}
    if other := [name for name, sha256 in sums.items() if sha256 not in shipped]:
        raise DataError(
            f"not what was shipped: {', '.join(other)}",
            hint="ship the recipe again, so that the card is true",
        )
    return sums


def _without_paths(files: Mapping[str, Path | bytes]) -> Iterator[tuple[str, bytes]]:
    """The adapter's settings without the place of its base on this machine."""
    for name, path in files.items():
        if name.endswith("adapter_config.json") and isinstance(path, Path):
            settings = dict(read_json(path))
            settings["base_model_name_or_path"] = _public(str(settings.get("base_model_name_or_path")))
            yield name, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def _signature(files: Mapping[str, Path | bytes], key: Path) -> bytes:
    """That of the files as a download of the repository has them."""
    with tempfile.TemporaryDirectory(prefix="forge-push-") as scratch:
        root = Path(scratch, "files")
        for name, source in files.items():
            place = root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                place.write_bytes(source)
            else:
                place.symlink_to(source.absolute())
        signature = Path(scratch, SIGNATURE)
        sign_files(root, key, signature)
        return signature.read_bytes()


def _licence_texts(run: Path) -> str:
    modelfile = read_run_modelfile(run)
    return "\n\n".join(modelfile.licences) if modelfile else ""


def _card(
    asked: Push, licence: str, manifest: Manifest, files: Mapping[str, object], sums: Mapping[str, str]
) -> str:
    recipe, facts = manifest.read_recipe(), manifest.read_facts()
    leaves = values(recipe) if recipe else {}
    trained = [(name, leaves.get(f"train.{name}")) for name in _SETTINGS]
    ggufs = [name for name in files if name.endswith(".gguf")]
    adapter = "peft" if "adapter_config.json" in files else ""
    library = "transformers" if "config.json" in files else adapter
    sources = [source.source for source in recipe.data.sources] if recipe and recipe.data else []
    spec = (manifest.base.spec or "").partition("@")[0]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["cell"] = _cell
    text = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        repository=asked.to,
        title=asked.to.partition("/")[2],
        signature=SIGNATURE if asked.sign else None,
        manifest=manifest,
        licence=licence,
        licence_id=licence.lower() if _HUB_LICENCES.fullmatch(licence.lower()) else "other",
        notice=notice(licence),
        files=files,
        sums=sums,
        base=_public(spec) if spec else "a base that is not named",
        hub_base=spec if manifest.base.revision else None,
        hub_data=[source for source in sources if source in manifest.pins.data],
        data=", ".join(map(_public, sources)) or "none",
        relation=("adapter" if library == "peft" else "finetune") if library else "quantized",
        made="fine-tuned" if any(value for _, value in trained) else "converted",
        library=library,
        tags=["forge", *(["gguf"] if ggufs else []), *(["lora"] if library == "peft" else [])],
        settings=[(name, value) for name, value in trained if value not in (None, False)],
        learned=list(_learned(manifest)),
        certified=manifest.read_certificate(),
        legs=manifest.certificate.get("handovers", ()) if manifest.certificate else (),
        smoke=facts.smoke.smoke,
        gguf=next((name for name in ggufs if not name.endswith(ADAPTER_SUFFIX)), None),
        lora=next((name for name in ggufs if name.endswith(ADAPTER_SUFFIX)), None),
        modelfile=next((name for name in (MODELFILE_JINJA, MODELFILE) if name in files), None),
    )  # fmt: skip


def _learned(manifest: Manifest) -> Iterator[str]:
    evaluated, learned = manifest.read_facts().evaluate, manifest.learned
    if evaluated.loss:
        yield (
            f"Loss of {evaluated.rows} held-out rows: {evaluated.loss.before:.4f} before training, "
            f"{evaluated.loss.after:.4f} after."
        )
    if learned and learned.metric != "heldout_loss":
        yield f"{learned.words}."


def _public(name: str) -> str:
    """A name that says nothing of this machine: of a path its last part."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    return Path(name).name if is_path else name


def _cell(value: Any) -> str:
    """A text that stays in one cell of a table, and is nothing but text there."""
    words = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", words)
