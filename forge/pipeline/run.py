"""Runs the stages in order: each is found in the store or made, then judged; actions always act.

Not covered: stages side by side. The long ones use the whole machine anyway.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from forge import report
from forge.codec import to_plain
from forge.errors import StageError
from forge.pipeline.plan import why
from forge.pipeline.reasons import other_versions
from forge.pipeline.stage import Action, Result, Stage, Step, request_of, select
from forge.store import runs
from forge.store.artifacts import Artifact, Made, Request, Store
from forge.store.digest import digest


def run_stages(
    stages: Sequence[Step],
    store: Store,
    *,
    run_directory: Path | None = None,
    from_stage: str | None = None,
    until: str | None = None,
    force: frozenset[str] = frozenset(),
    on_result: Callable[[Result], None] | None = None,
    stack: ExitStack | None = None,
) -> dict[str, Result]:
    """Run the pipeline and return the result of each stage, by name and in order.

    `run_directory` is registered with the store, which remembers each request as soon as its stage
    is done (take `store.runs.hold` around all that writes there). `from_stage` makes that stage
    and those behind it again even though they are in the store, `until` stops behind a stage,
    `force` makes single stages again; what depends on bytes that come out the same is cached.
    `on_result` gets each result at once, before it is judged. What actions leave running ends
    with this call, or with `stack` where one is given.

    Raises what a stage raises or its judgement says, `StageError` when the disk is too small,
    `RecipeError` for the name of a stage that is not there. Earlier artifacts stay published.
    """
    selection = select(stages, from_stage, until, force)
    session = _Session(store, selection.forced, run_directory)
    if run_directory:
        session.begin([stage.name for stage in stages], run_directory)
    with ExitStack() as closing:
        for number, stage in enumerate(selection.stages, 1):
            label = f"[{number}/{len(selection.stages)}] {stage.name}"
            failure = None
            if isinstance(stage, Action):
                result = _act(stage, session.results, stack or closing, label)
            else:
                artifact, result = _make(stage, session, label)
                failure = stage.judge(artifact)
            session.results[stage.name] = result
            if on_result:
                on_result(result)
            if failure:
                raise failure
    return session.results


@dataclass
class _Session:
    """What is carried from stage to stage."""

    store: Store
    forced: Mapping[str, str]
    run_directory: Path | None
    previous: Mapping[str, Request] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)

    def begin(self, names: Sequence[str], run_directory: Path) -> None:
        """Take up what the run's last ship was made from, without the stages that are no more."""
        runs.register(self.store, run_directory)
        self.previous = runs.requests(self.store, run_directory)
        self.requests = {name: past for name, past in self.previous.items() if name in names}

    def remember(self, stage: str, request: Request) -> None:
        self.requests[stage] = request
        if self.run_directory:
            runs.remember(self.store, self.run_directory, self.requests)


def _act(stage: Action, results: Mapping[str, Result], stack: ExitStack, label: str) -> Result:
    started = time.monotonic()
    report.info(f"{label}: starts")
    facts = to_plain(stage.act(results, stack))
    seconds = time.monotonic() - started
    report.info(f"{label}: {duration(seconds)}")
    return Result(stage.name, False, seconds, facts)


def _make(stage: Stage, session: _Session, label: str) -> tuple[Artifact, Result]:
    """Find or build a pure stage's artifact."""
    started = time.monotonic()
    needed = [_artifact(session.results[name]) for name in stage.needs]
    inputs = {artifact.stage: artifact for artifact in needed}
    request = request_of(stage, {name: artifact.digest for name, artifact in inputs.items()})
    forced = session.forced.get(stage.name)
    artifact = None if forced else session.store.find(stage.kind, digest(request))
    built = False
    if artifact is None:
        reasons = why(stage, request, session.store, session.previous.get(stage.name), forced)
        report.info(f"{label}: {'; '.join(reasons)}")
        artifact, built = _build(stage, session, request, inputs)
    session.remember(stage.name, request)
    seconds = time.monotonic() - started
    remark = "".join(f" ({words})" for words in other_versions(artifact.recorded, stage.recorded()))
    report.info(f"{label}: {duration(seconds)}" if built else f"{label}: cached{remark}")
    return artifact, Result(stage.name, not built, seconds, artifact.facts, artifact)


def _build(
    stage: Stage, session: _Session, request: Request, inputs: Mapping[str, Artifact]
) -> tuple[Artifact, bool]:
    """Build, unless another process did so while we waited for it; whether it was us."""
    built = False

    def build(out: Path) -> Made:
        nonlocal built
        built = True
        _check_space(stage, session.store.root, stage.bytes_needed(inputs))
        return stage.build(inputs, out)

    try:
        artifact = session.store.build(
            stage.kind,
            digest(request),
            request,
            build,
            recorded=stage.recorded(),
            run=session.run_directory.name if session.run_directory else "",
            replace=stage.name in session.forced,
        )
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(
            f"{stage.name}: the disk became full; what it had written was removed", hint=MORE_SPACE
        ) from failure
    return artifact, built


MORE_SPACE = "free some (`forge gc` shows what no run uses), or set FORGE_HOME to a larger disk"


def _check_space(stage: Stage, root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise StageError(
            f"{stage.name} needs {size(needed)} of free disk, {root} has {size(free)}", hint=MORE_SPACE
        )


def _artifact(result: Result) -> Artifact:
    assert result.artifact is not None, f"{result.name} is no pure stage"  # select() saw to it
    return result.artifact


def size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
