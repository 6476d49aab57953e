"""`forge.lock`: what a whole ship was made of and what it came to; `forge ship --locked` repeats that ship.

It holds the part of a run's manifest that another ship can be held to, so that it can lie beside the recipe.
Not covered: the code of a function that `data.format` names; drivers, servers and whatever else is no Python
package; the answers to smoke queries.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.codec import from_plain, to_plain
from forge.errors import CheckError, DataError, ForgeError, MissingToolError, Problem, RecipeError
from forge.files import kept_json, write_text
from forge.model.base import UNKNOWN
from forge.pipeline.reasons import differences, short
from forge.recipe.fields import values
from forge.resolve.certified import versions
from forge.resolve.resolved import Resolved
from forge.resolve.stage import installed
from forge.runs.files import LOCK
from forge.runs.manifest import Manifest, Pins
from forge.store.digest import digest
from forge.train.machine import LookRequest, look
from forge.verify.basis import Verdict
from forge.verify.measurement import Basis

SCHEMA, FORMAT = "forge-lock", 1
_NO_PACKAGES = ("python", "llama.cpp")


@dataclass(frozen=True)
class TrainedOn:
    """What trained: it decides the last bits of an adapter."""

    device: str | None = None
    compute: str | None = None
    processor: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Lock:
    """A ship: `recipe` by dotted field, digests of what its names stood for, versions, and of each file made.

    `certificate` is the digest of its verdict and figures, without the server's.
    """

    recipe: Mapping[str, Any]
    pins: Pins
    inputs: Mapping[str, str]
    packages: Mapping[str, str]
    system: str
    trained_on: TrainedOn
    files: Mapping[str, str]
    certificate: str | None
    schema: str = SCHEMA
    format: int = FORMAT
    path: Path = field(default=Path(LOCK), compare=False)


def read_lock(recipe: Path, run: Path) -> Lock:
    """The lock that lies beside `recipe` under its name (`yoda.lock`), else that of the run's last ship.

    Raises `RecipeError` where there is none, `DataError` for what is no lock.
    """
    beside = recipe.with_suffix(".lock")
    path = beside if beside.is_file() else run / LOCK
    try:
        content = kept_json(path)
    except FileNotFoundError:
        raise RecipeError(
            f"--locked: there is no {beside}, and no {path}",
            hint="a whole ship without --locked writes the second; copy it beside the recipe to keep it",
        ) from None
    except (OSError, ValueError) as failure:
        raise DataError(
            f"{path}: cannot be read: {getattr(failure, 'strerror', failure)}",
            hint="copy it again: a whole ship writes one into its run",
        ) from failure
    schema, number = (
        content.get(name) if isinstance(content, dict) else None for name in ("schema", "format")
    )
    if schema != SCHEMA or not isinstance(number, int):
        raise DataError(f"{path}: no lock of forge", hint="a whole ship writes one into its run")
    if number > FORMAT:
        raise DataError(f"{path}: a lock of format {number}, known is {FORMAT}", hint="update forge")
    try:
        return from_plain(Lock, {**content, "path": str(path)}, is_strict=False)
    except ValueError as failure:
        raise DataError(f"{path}: no lock of forge: {failure}") from failure


def write_lock(ship: Resolved, manifest: Manifest) -> None:
    """Write the lock of a whole ship into its run.

    None where stages from the store were made with other versions of a package than the rest: no environment
    makes them all.
    """
    path = ship.run_directory / LOCK
    packages = packages_of(manifest)
    mixed = [f"{name} {' and '.join(several)}" for name, several in packages.items() if len(several) > 1]
    if mixed:
        path.unlink(missing_ok=True)
        report.warning(f"no {LOCK}: its stages were made with {'; '.join(mixed)}")
        report.info("a ship with --from train makes them all with what is installed")
        return
    trained = manifest.read_facts().train
    lock = Lock(
        recipe=values(ship.recipe),
        pins=manifest.pins,
        inputs=_inputs(ship),
        packages={name: several[0] for name, several in packages.items()},
        system=_system(),
        trained_on=TrainedOn(trained.device, trained.compute, trained.processor, trained.threads),
        files=_files(manifest),
        certificate=_certificate(manifest),
    )
    plain = to_plain(lock)
    del plain["path"]
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def require_locked(lock: Lock, ship: Resolved) -> None:
    """Raise with every difference between the lock and what is here, as far as that is known yet.

    `RecipeError` where recipe, base or data differ, `MissingToolError` where only packages do.
    """
    installed_here = {name: installed(name) for name in lock.packages} | versions()
    packages = differences(lock.packages, {name: installed_here[name] for name in lock.packages})
    now = _inputs(ship)
    known = {name: lock.inputs.get(name) if sha256 == UNKNOWN else sha256 for name, sha256 in now.items()}
    others = [*differences(lock.recipe, _recipe(lock, ship)), *differences(lock.inputs, known)]
    if not (others or packages):
        return
    kind: type[ForgeError] = RecipeError if others else MissingToolError
    wanted = [f"{name}=={lock.packages[name]}" for name, _ in packages if name not in _NO_PACKAGES]
    hints = [f"pip install {' '.join(wanted)}"] if wanted else []
    hints += ["put back what was locked"] if others else []
    problems = [Problem(words, name) for name, words in (*others, *packages)]
    raise kind(
        f"{lock.path}: {_count(problems)} between the lock and what is here",
        hint=f"{'; '.join(hints) or 'use the locked version'}; or ship without --locked, for a new lock",
        problems=problems,
    )


def warn_of_machine(lock: Lock, ship: Resolved, *, trains: bool) -> None:
    """Say where another kind of machine may give other bits; what it gives is compared when it is there."""
    was, now = {"system": lock.system}, {"system": _system()}
    if trains and ship.training:
        here = worker.perform(look, LookRequest(ship.training.device, ship.training.dtype))
        was |= to_plain(lock.trained_on)
        now |= to_plain(TrainedOn(here.device, here.compute, here.processor, here.threads))
    for name, words in differences(was, now):
        report.warning(f"the lock is of another machine: {name} {words}: the last bits may differ")


def failure_of(lock: Lock, manifest: Manifest) -> CheckError | None:
    """What is wrong with a ship that was to be the locked one: the files and figures that are others."""
    made = _files(manifest)
    problems = [
        Problem(f"sha256 {short(lock.files.get(name, 'none'))} → {short(sha256)}", name)
        for name, sha256 in made.items()
        if lock.files.get(name) != sha256
    ]
    figures = _certificate(manifest)
    if figures and lock.certificate != figures:
        problems.append(Problem("other figures", "certificate"))
    if not problems:
        return None
    return CheckError(
        f"not the locked run: {_count(problems)} from {lock.path}",
        hint="recipe, base, data and packages are the locked ones: look at this machine (another processor, "
        "GPU or number of threads rounds otherwise)",
        problems=problems,
    )


def _recipe(lock: Lock, ship: Resolved) -> Mapping[str, Any]:
    """The recipe without fields that are newer than the lock and that nobody has set: they change nothing."""
    sources = ship.loaded.sources
    return {
        name: value
        for name, value in values(ship.recipe).items()
        if name in lock.recipe or sources[name].kind != "default"
    }


def _inputs(ship: Resolved) -> Mapping[str, str]:
    """What names in the recipe stand for: `UNKNOWN` where it is not here."""
    digests = {
        "base": ship.base_digest,
        "base's tokenizer": ship.tokenizer_digest,
        "chat template": ship.template_digest if ship.base.directory else UNKNOWN,
    }
    if ship.adopted:
        digests["adapter"] = ship.adapter_digest
    if ship.continued:
        digests["train.continue_from"] = ship.continued_digest
    if ship.sources:
        digests["data"] = ship.file_digest(ship.data_files)
    if isinstance(ship.heldout, Path):
        digests["held-out rows"] = ship.file_digest([ship.heldout])
    return digests


def packages_of(manifest: Manifest) -> Mapping[str, Sequence[str]]:
    """Each package's version, or its versions where stages were made with several."""
    basis = (manifest.certificate or {}).get("basis")
    computed = from_plain(Basis, basis, is_strict=False).versions if basis else {}
    seen: dict[str, dict[str, str]] = {}
    for name, version in _versions(manifest, computed):
        seen.setdefault(name, {})[version] = version
    first = {"forge-ship": (manifest.forge or "",), "python": (manifest.machine.get("python", ""),)}
    return {**first, **{name: tuple(several) for name, several in sorted(seen.items())}}


def _versions(manifest: Manifest, computed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from computed.items()
    for made in manifest.artifacts.values():
        for name, version in {**made.recorded, **(made.tools or {})}.items():
            # A stage's tools call llama.cpp by what is taken of it.
            yield name.removesuffix(" converters"), version


def _files(manifest: Manifest) -> Mapping[str, str]:
    return {
        f"{stage}/{name}": file.sha256
        for stage, made in manifest.artifacts.items()
        for name, file in made.files.items()
    }


def _certificate(manifest: Manifest) -> str | None:
    """Of what is the same wherever the files are: neither their places nor the server count."""
    if manifest.certificate is None:
        return None
    plain = to_plain(from_plain(Verdict, manifest.certificate, is_strict=False))
    plain["handovers"] = [leg for leg in plain["handovers"] if leg["to"] != "live server"]
    return digest(plain)


def _system() -> str:
    return f"{platform.system()} {platform.machine()}"


def _count(problems: Sequence[Problem]) -> str:
    return f"{len(problems)} difference{'s' if len(problems) != 1 else ''}"
