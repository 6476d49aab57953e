"""A whole ship, a plan of one, and what a run's name stands for: what the commands call."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forge import report
from forge.data.prepare import read_all
from forge.errors import ForgeError
from forge.pipeline.plan import Plan
from forge.pipeline.plan import plan as plan_stages
from forge.pipeline.run import run
from forge.pipeline.stage import Result
from forge.recipe.load import Loaded, load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.runs.files import RUNS
from forge.runs.manifest import read_manifest
from forge.ship.preflight import require_tools
from forge.ship.record import learned, record, summary
from forge.ship.space import require_space
from forge.stages import stages_for
from forge.stages.data import DataStage
from forge.store import runs
from forge.store.artifacts import Store, open_store

_READ_BY_A_PLAN = 4_000_000  # bytes of rows: some 0.1 s


def run_directory(loaded: Loaded) -> Path:
    return Path(RUNS).absolute() / loaded.recipe.name


def ship(
    recipe: Path | Loaded,
    overrides: Sequence[str] = (),
    *,
    from_stage: str | None = None,
    until: str | None = None,
    retrain: bool = False,
) -> dict[str, Any]:
    """Run the pipeline and return what `--json` prints; whatever way it ends, the run is recorded.

    Raises `CheckError` when a smoke query fails, and whatever a stage raises.
    """
    loaded = _load(recipe, overrides)
    store, directory = open_store(), run_directory(loaded)
    with runs.hold(store, directory), ExitStack() as stack:
        target = _open(loaded, store, directory)
        stages, force = stages_for(target), frozenset({"train"} if retrain else ())
        past = runs.requests(store, directory)
        ahead = plan_stages(stages, store, past, from_stage=from_stage, until=until, force=force)
        require_tools(target, {one.name for one in ahead.stages if not one.cached})
        require_space(target, ahead)
        directory.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(target.log.open("a", encoding="utf-8"))
        stack.enter_context(report.copied_to(log))
        results: dict[str, Result] = {}
        failure: BaseException | None = None
        try:
            run(
                stages,
                store,
                run_directory=directory,
                from_stage=from_stage,
                until=until,
                force=force,
                on_result=lambda result: results.__setitem__(result.name, result),
                stack=stack,
            )
            failure = _failed_live(results) or _failed_smoke(results)
        except BaseException as stopped:
            failure = stopped
            if not isinstance(stopped, ForgeError | KeyboardInterrupt):
                traceback.print_exc(file=log)
            raise
        finally:
            record(target, results, failure)
        fields = _finish(target, results, failure)
    if target.recipe.deploy.keep and "deploy" in results:
        # Outside the lock: the next ship of this recipe does not wait for a server.
        fields["endpoint"] = _keep(target)
    return fields


def ship_until(recipe: Path | Loaded, overrides: Sequence[str], stage: str) -> dict[str, Any]:
    """Ship up to and with `stage`; its facts stand beside the summary of the ship."""
    fields = ship(recipe, overrides, until=stage)
    facts = read_manifest(Path(fields["run"])).get("facts", {}).get(stage, {})
    return {**fields, **facts}


def _open(loaded: Loaded, store: Store, directory: Path) -> Resolved:
    target = resolve_recipe(loaded, store, directory, pins=read_manifest(directory).get("pins"))
    for problem in target.base.problems:
        report.warning(str(problem))
    for note in target.notes:
        report.info(note)
    return target


def _keep(target: Resolved) -> str:
    """Leave the model served as `forge serve --detach` does; give its address."""
    from forge.serve import detached
    from forge.ship.serving import Wish, detach, served_directory
    from forge.tools.hosts import DEFAULT_HOST

    deploy = target.recipe.deploy
    name = target.recipe.name
    if any(one.name == name for one in detached.running(served_directory())):
        report.info(f"{name} was being served before this ship; it is stopped")
        detached.stop(served_directory(), name)
    # A recipe's host is told where it is another than the usual one; else Ollama is where OLLAMA_HOST says.
    host = None if deploy.host == DEFAULT_HOST else deploy.host
    wish = Wish(
        str(target.run_directory), runtime=deploy.runtime, host=host, port=deploy.port,
        parallel=deploy.parallel, threads=deploy.threads, gpu_layers=deploy.gpu_layers,
        without_key=deploy.without_key,
    )  # fmt: skip
    return str(detach(wish)["endpoint"])


def _load(recipe: Path | Loaded, overrides: Sequence[str]) -> Loaded:
    """A recipe that is loaded already carries its overrides."""
    loaded = recipe if isinstance(recipe, Loaded) else load(recipe, overrides)
    for warning in loaded.warnings:
        report.warning(warning)
    return loaded


def _failed_live(results: Mapping[str, Result]) -> ForgeError | None:
    from forge.serve.live_proof import failure_of

    return failure_of(results["deploy"].facts["live"]) if "deploy" in results else None


def _failed_smoke(results: Mapping[str, Result]) -> ForgeError | None:
    from forge.stages.smoke import failure_of

    return failure_of(results["smoke"].facts) if "smoke" in results else None


def _finish(target: Resolved, results: Mapping[str, Result], failure: ForgeError | None) -> dict[str, Any]:
    """Say how it went."""
    figures = learned(results)
    if figures and figures["metric"] == "exact_match":
        where = "the shipped file behind its server" if figures["served"] else "the tuned model"
        report.success(
            f"learned: {figures['rows']} held-out rows, exact answers: base {figures['before']:.0%}, "
            f"{where} {figures['after']:.0%}"
        )
    elif figures:
        report.success(f"learned: held-out loss {figures['before']:.4f} -> {figures['after']:.4f}")
    report.info(f"the run: {target.run_directory}")
    if failure:
        raise failure
    return summary(target, results)


def plan(
    recipe: Path | Loaded, overrides: Sequence[str] = (), *, fetch: bool = False
) -> tuple[Resolved, Plan]:
    """What a ship would run, and why. Writes nothing; asks the hub only with `fetch`."""
    loaded = _load(recipe, overrides)
    store, directory = open_store(read_only=True), run_directory(loaded)
    pins = read_manifest(directory).get("pins")
    target = resolve_recipe(loaded, store, directory, pins=pins, fetch="headers" if fetch else "nothing")
    planned = plan_stages(stages_for(target), store, runs.requests(store, directory))
    if not all(one.cached for one in planned.stages if one.name == "data"):
        _look_at_data(target)
    return target, planned


def _look_at_data(target: Resolved) -> None:
    """Rows that a ship would refuse are told by its plan, where reading them takes no time."""
    files = [*target.data_files, *([target.heldout] if isinstance(target.heldout, Path) else [])]
    light = all(path.suffix.lower() != ".parquet" for path in files)
    if target.data_files and light and sum(path.stat().st_size for path in files) < _READ_BY_A_PLAN:
        read_all(DataStage(target).settings())
