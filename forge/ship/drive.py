"""A whole ship, a plan of one, and what a run's name stands for: what the commands call."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from forge import report
from forge.errors import ForgeError
from forge.pipeline.plan import Plan, plan_stages
from forge.pipeline.run import run_stages
from forge.pipeline.stage import Action, Result, Step
from forge.recipe.load import Loaded, load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.runs.files import RUNS
from forge.runs.manifest import Learned, read_manifest
from forge.ship.lock import Lock, failure_of, read_lock, require_locked, warn_of_machine, write_lock
from forge.ship.preflight import require_tools
from forge.ship.record import record, summary
from forge.ship.space import require_space
from forge.stages import stages_for
from forge.stages.deploy import DEPLOY_STAGE
from forge.stages.train import ADAPTER_STAGE
from forge.stages.verify import shared_by_types
from forge.store import runs
from forge.store.artifacts import Store, open_store


def run_directory(loaded: Loaded) -> Path:
    return Path(RUNS).absolute() / loaded.recipe.name


def ship(
    recipe: Path | Loaded,
    overrides: Sequence[str] = (),
    *,
    from_stage: str | None = None,
    until: str | None = None,
    retrain: bool = False,
    locked: bool = False,
) -> Mapping[str, object]:
    """Run the pipeline and return what `--json` prints; whatever way it ends, the run is recorded.

    Raises `CheckError` when a smoke query fails or a ship that is `locked` made other files than its lock
    says, what `require_locked` raises, and whatever a stage raises.
    """
    loaded = _load(recipe, overrides)
    store, directory = open_store(), run_directory(loaded)
    lock = read_lock(loaded.path, directory) if locked else None
    with runs.hold_run(store, directory), ExitStack() as stack:
        target = _open(loaded, store, directory, lock)
        stages, force = stages_for(target), frozenset({ADAPTER_STAGE} if retrain else ())
        past = runs.requests(store, directory)
        ahead = plan_stages(stages, store, past, from_stage=from_stage, until=until, force=force)
        if lock:
            warn_of_machine(lock, target, trains=ADAPTER_STAGE in ahead.running)
        to_run = [stage for stage in stages if stage.name in ahead.running]
        require_tools(to_run)
        require_space(target, to_run)
        directory.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(target.log.open("a", encoding="utf-8"))
        stack.enter_context(report.copied_to(log))
        stack.enter_context(shared_by_types(target))
        results: dict[str, Result] = {}
        failure: BaseException | None = None
        try:
            run_stages(
                stages,
                store,
                run_directory=directory,
                from_stage=from_stage,
                until=until,
                force=force,
                on_result=lambda result: results.__setitem__(result.name, result),
                stack=stack,
            )
            failure = _verdict(stages, results)
        except BaseException as stopped:
            failure = stopped
            if not isinstance(stopped, ForgeError | KeyboardInterrupt):
                traceback.print_exc(file=log)
            raise
        finally:
            manifest = record(target, stages, results, failure)
        failure = failure or (failure_of(lock, manifest) if lock else None)
        if not (failure or until):
            write_lock(target, manifest)
        fields = dict(summary(target, stages, results, manifest))
        _report_end(target, manifest.learned)
        if failure:
            raise failure
    if target.recipe.deploy.keep and DEPLOY_STAGE in results:
        # Outside the lock: the next ship of this recipe does not wait for a server.
        fields["endpoint"] = _keep(target)
    return fields


def ship_until(recipe: Path | Loaded, overrides: Sequence[str], stage: str) -> Mapping[str, object]:
    """Ship up to and with `stage`; its facts stand beside the summary of the ship."""
    fields = ship(recipe, overrides, until=stage)
    return {**fields, **read_manifest(Path(str(fields["run"]))).facts.get(stage, {})}


def _open(loaded: Loaded, store: Store, directory: Path, lock: Lock | None) -> Resolved:
    if lock:  # first with what is here, since fetching a base can take long
        require_locked(lock, resolve_recipe(loaded, store, directory, pins=lock.pins, fetch="nothing"))
    pins = lock.pins if lock else read_manifest(directory).pins
    target = resolve_recipe(loaded, store, directory, pins=pins)
    if lock:
        require_locked(lock, target)
    for problem in target.base.problems:
        report.warning(str(problem))
    for note in target.notes:
        report.info(note)
    return target


def _keep(target: Resolved) -> str:
    """Leave the model served as `forge serve --detach` does; give its address."""
    from forge.serve import detached
    from forge.ship.serving import Wish, serve_in_background, served_directory
    from forge.tools.hosts import DEFAULT_HOST

    deploy = target.recipe.deploy
    name = target.recipe.name
    if any(served.name == name for served in detached.running(served_directory())):
        report.info(f"{name} was being served before this ship; it is stopped")
        detached.stop_servers(served_directory(), name)
    # A recipe's host counts where it is another than the usual one; else Ollama is where OLLAMA_HOST says.
    host = None if deploy.host == DEFAULT_HOST else deploy.host
    wish = Wish(
        str(target.run_directory), runtime=deploy.runtime, host=host, port=deploy.port,
        parallel=deploy.parallel, threads=deploy.threads, gpu_layers=deploy.gpu_layers,
        without_key=deploy.without_key,
    )  # fmt: skip
    return str(serve_in_background(wish)["endpoint"])


def _load(recipe: Path | Loaded, overrides: Sequence[str]) -> Loaded:
    """A recipe that is loaded already carries its overrides."""
    loaded = recipe if isinstance(recipe, Loaded) else load(recipe, overrides)
    for warning in loaded.warnings:
        report.warning(warning)
    return loaded


def _verdict(stages: Sequence[Step], results: Mapping[str, Result]) -> ForgeError | None:
    """The first thing that an action found wrong: raised when all is recorded."""
    actions = [stage for stage in stages if isinstance(stage, Action) and stage.name in results]
    return next(filter(None, (stage.verdict(results[stage.name].facts) for stage in actions)), None)


def _report_end(target: Resolved, figures: Learned | None) -> None:
    """Say how it went."""
    if figures:
        report.success(f"learned: {figures.words}")
    report.info(f"the run: {target.run_directory}")


def plan(
    recipe: Path | Loaded, overrides: Sequence[str] = (), *, fetch: bool = False
) -> tuple[Resolved, Plan]:
    """What a ship would run, and why. Writes nothing; asks the hub only with `fetch`."""
    target, stages, planned = _planned(_load(recipe, overrides), fetch=fetch)
    for stage in stages:
        if stage.name in planned.running:
            stage.look()
    return target, planned


def plan_quietly(loaded: Loaded, until: str | None = None) -> Plan:
    """What a ship up to `until` would run, with nothing said and no row read; raises what `plan` raises."""
    return _planned(loaded, until=until)[2]


def _planned(
    loaded: Loaded, *, fetch: bool = False, until: str | None = None
) -> tuple[Resolved, tuple[Step, ...], Plan]:
    store, directory = open_store(read_only=True), run_directory(loaded)
    pins = read_manifest(directory).pins
    target = resolve_recipe(loaded, store, directory, pins=pins, fetch="headers" if fetch else "nothing")
    stages = stages_for(target)
    return target, stages, plan_stages(stages, store, runs.requests(store, directory), until=until)
