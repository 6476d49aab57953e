"""Plans, runs and garbage in words and in JSON: the reading commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge import report
from forge.codec import to_plain
from forge.commands.estimate import memory_of_ship, show_fit
from forge.errors import DataError
from forge.model.base import UNKNOWN
from forge.model.estimate import Estimate, available, inference
from forge.pipeline.plan import Plan
from forge.pipeline.run import duration
from forge.recipe.fields import values
from forge.recipe.load import load
from forge.resolve.derived import context_tokens, largest_type
from forge.resolve.rehearsal import rehearse
from forge.resolve.resolved import Resolved
from forge.runs.find import find_run
from forge.runs.manifest import read_manifest
from forge.ship.expected import ExpectedTime, expected_certificate
from forge.ship.space import free_space, space_needed
from forge.stages import stages_for
from forge.stages.train import ADAPTER_STAGE
from forge.stages.verify import VerifyStage
from forge.store import collect as garbage_collection
from forge.store import runs as store_runs
from forge.store.artifacts import open_store
from forge.train.memory import Memory
from forge.train.speed import Choice, choose_speed


def describe_plan(ship: Resolved, planned: Plan, *, deep: bool = False) -> Mapping[str, object]:
    """Show a plan; returns the contract's fields.

    With `deep` the model is laid out without weights, as before a training; raises what `rehearse` raises.
    """
    header = rehearse(ship) if deep and ship.base.directory else None
    for name, value in sorted(values(ship.recipe).items()):
        source = ship.loaded.sources[name]
        report.detail(f"{name}: {value!r}  ({source.where})")
    stages = planned.stages
    rows = [(stage.name, "cached" if stage.cached else "runs", "; ".join(stage.reasons)) for stage in stages]
    report.table(f"{ship.recipe.name}: {ship.base.spec}", ("stage", "", "why"), rows)
    memory, disk = _memory(ship), _disk(ship, planned)
    for label, space in (("memory", memory), ("disk", disk)):
        if space:
            report.info(f"{label}: {_size(space.needed)} needed, {_size(space.free)} free")
    choices = _choices(ship, planned, memory)
    for choice in choices:
        report.info(f"{choice.field}: auto means {str(choice.value).lower()} here: {choice.reason}")
    expected = _certificate(ship, planned)
    if expected:
        origin = "as one took here" if expected.measured else "estimated from parameters and cores"
        report.info(f"verify: about {duration(expected.seconds)}, {origin}")
    problems = [str(problem) for problem in ship.base.problems]
    for problem in problems:
        report.warning(problem)
    notes = ship.notes if ship.base.directory else []
    for note in notes:
        report.info(note)
    return {
        "stages": [
            {"name": stage.name, "cached": stage.cached, "reasons": list(stage.reasons)} for stage in stages
        ],
        "memory": memory.as_json() if memory else None,
        "disk": to_plain(disk),
        "verify": to_plain(expected),
        "downloads": _downloads(ship),
        "choices": to_plain(choices),
        "problems": problems,
        "notes": notes,
        "header": to_plain(header),
    }


@dataclass(frozen=True)
class _MemoryNeeded:
    """What serving and training take, and the training run against its device."""

    needed: int
    free: int
    parts: Mapping[str, Estimate]
    trained: Memory | None

    def as_json(self) -> Mapping[str, object]:
        return {
            "needed": self.needed,
            "free": self.free,
            **{name: {"bytes": part.total, "parts": dict(part.parts)} for name, part in self.parts.items()},
            **(self.trained.as_json() if self.trained else {}),
        }


@dataclass(frozen=True)
class _DiskNeeded:
    needed: int
    free: int
    parts: Mapping[str, int]
    store: Path


def _memory(ship: Resolved) -> _MemoryNeeded | None:
    if ship.base.directory is None:
        return None
    parts: dict[str, Estimate] = {
        "serving": inference(
            ship.parameters,
            ship.configuration,
            quant=largest_type(ship),
            context=context_tokens(ship, None),
        )
    }
    trained = memory_of_ship(ship) if ship.training else None
    if trained:
        parts["training"] = trained.estimate
        show_fit(trained)
    needed = max(part.total for part in parts.values())
    return _MemoryNeeded(needed, trained.device.free if trained else available().free, parts, trained)


def _choices(ship: Resolved, planned: Plan, memory: _MemoryNeeded | None) -> tuple[Choice, ...]:
    """What `auto` means for the training that will run."""
    if ship.training is None or memory is None or memory.trained is None:
        return ()
    if ADAPTER_STAGE not in planned.running:
        return ()
    return choose_speed(ship.training, ship.configuration, memory.trained).choices


def _certificate(ship: Resolved, planned: Plan) -> ExpectedTime | None:
    """What the certificates that will be made take together; each type of a ship has its own."""
    count = sum(
        isinstance(stage, VerifyStage) and stage.name in planned.running for stage in stages_for(ship)
    )
    if ship.base.directory is None or not count:
        return None
    each = expected_certificate(ship.store, ship.parameters)
    return ExpectedTime(round(count * each.seconds, 1), each.measured)


def _downloads(ship: Resolved) -> str | int:
    """Bytes of weights that a ship would fetch; unknown where not even headers are here."""
    if ship.base.directory is None:
        return UNKNOWN
    return sum(tensor.bytes for tensor in (ship.headers or {}).values())


def _disk(ship: Resolved, planned: Plan) -> _DiskNeeded | None:
    if ship.base.directory is None:
        return None
    estimate = space_needed([stage for stage in stages_for(ship) if stage.name in planned.running])
    return _DiskNeeded(estimate.total, free_space(ship.store.root), estimate.parts, ship.store.root)


def _size(count: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} B"


def describe_run(name: str) -> Mapping[str, object]:
    """Show a run's manifest in short; a recipe stands for the run of its name."""
    directory = find_run(load(Path(name)).recipe.name if name.endswith((".yaml", ".yml")) else name)
    manifest = read_manifest(directory)
    if not manifest.name:
        raise DataError(f"{directory}/manifest.json cannot be read", hint="ship its recipe again")
    report.info(f"{manifest.name}: {manifest.outcome} ({manifest.written})")
    report.info(f"base: {manifest.base.spec} {manifest.base.revision or ''}".rstrip())
    files = [
        (path.relative_to(directory).as_posix(), _size(path.stat().st_size)) for path in _files(directory)
    ]
    report.table(str(directory), ("file", "size"), files)
    if figures := manifest.learned:
        report.info(f"learned: {figures.words}")
    if manifest.verdict:
        report.info(f"certificate: {manifest.verdict}")
    return {"run": str(directory), "manifest": manifest.as_json(), "files": [file[0] for file in files]}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class KnownRun:
    """A run that the store knows, by what its manifest says."""

    name: str
    directory: Path
    base: str | None
    outcome: str | None
    written: str | None


def describe_runs() -> Sequence[KnownRun]:
    """Show every run that the store knows."""
    known = []
    for run in store_runs.runs(open_store(read_only=True)):
        manifest = read_manifest(run.directory)
        known.append(
            KnownRun(run.name, run.directory, manifest.base.spec, manifest.outcome, manifest.written)
        )
    if not known:
        report.info("no runs yet; forge init writes a recipe to start from")
        return known
    rows = [(run.name, run.base, run.outcome, run.written, str(run.directory)) for run in known]
    report.table("", ("name", "base", "outcome", "written", "directory"), rows)
    return known


def describe_garbage(*, delete: bool, adapters: bool, partials: bool) -> Mapping[str, object]:
    """What no run uses; removed with `delete`."""
    store = open_store(read_only=not delete)
    garbage = garbage_collection.find_garbage(store)
    removed = garbage_collection.collect(store, adapters=adapters, partials=partials) if delete else None
    shown = removed or garbage
    rows = [(item.kind, item.stage, item.key[:12], _size(item.bytes)) for item in shown.items]
    report.table("removed" if delete else "not used by any run", ("kind", "stage", "key", "size"), rows)
    total = sum(item.bytes for item in shown.items)
    if delete:
        report.success(f"{_size(total)} freed")
    else:
        report.info(
            f"{_size(total)} could be freed; --delete does, adapters and unfinished work only when "
            "named (--adapters, --partials)"
        )
    return {
        "deleted": delete,
        "bytes": total,
        "used_bytes": garbage.used_bytes,
        "items": [
            {"kind": item.kind, "stage": item.stage, "key": item.key, "bytes": item.bytes}
            for item in shown.items
        ],
    }
