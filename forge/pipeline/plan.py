"""What a ship would run, and why: computed from requests and the store, nothing is written.

Not covered: whether a stage will succeed, and what follows from bytes that do not exist yet (a
stage behind one that must run says that it waits for it; it may turn out to be cached).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forge.pipeline.reasons import FIRST_TIME, changes, other_versions
from forge.pipeline.stage import Action, Stage, Step, request_of, select
from forge.store.artifacts import Artifact, Request, Store
from forge.store.digest import digest


@dataclass(frozen=True)
class Planned:
    """One stage of a plan. A cached one may have a remark among its reasons."""

    name: str
    cached: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    stages: tuple[Planned, ...]

    @property
    def running(self) -> frozenset[str]:
        """The names of the stages that will run."""
        return frozenset(planned.name for planned in self.stages if not planned.cached)


def plan_stages(
    stages: Sequence[Step],
    store: Store,
    previous: Mapping[str, Request],
    *,
    from_stage: str | None = None,
    until: str | None = None,
    force: frozenset[str] = frozenset(),
) -> Plan:
    """Say per stage whether it is in the store, and else why it runs.

    `previous` are the requests of the run's last ship (`store.runs.requests`). The options are
    those of `pipeline.run.run`. Raises `RecipeError` for the name of a stage that is not there.
    """
    selection = select(stages, from_stage, until, force)
    known: dict[str, Artifact] = {}
    planned: list[Planned] = []
    for stage in selection.stages:
        if isinstance(stage, Action):
            planned.append(Planned(stage.name, False, ("looks at the world: always runs",)))
            continue
        inputs = [known[name] for name in stage.needs if name in known]
        request = request_of(stage, {artifact.stage: artifact.digest for artifact in inputs})
        waits = [name for name in stage.needs if name not in known]
        kept = None if waits else store.find(stage.kind, digest(request))
        forced = selection.forced.get(stage.name)
        if kept and not forced:
            known[stage.name] = kept
            remarks = other_versions(kept.recorded, stage.recorded())
            planned.append(Planned(stage.name, True, tuple(remarks)))
        else:
            reasons = why(stage, request, store, previous.get(stage.name), forced, waits)
            planned.append(Planned(stage.name, False, reasons))
    return Plan(tuple(planned))


def why(
    stage: Stage,
    request: Request,
    store: Store,
    previous: Request | None,
    forced: str | None = None,
    waits: Sequence[str] = (),
) -> tuple[str, ...]:
    """The reasons for making a stage, never empty."""
    reasons = [forced] if forced else changes(request, previous)
    reasons += [f"waits for {name}" for name in waits]
    if stage.goes_on(store.work(stage.kind, digest(request))):
        reasons = [reason for reason in reasons if reason != FIRST_TIME]
        reasons.append("goes on from where it was stopped")
    return tuple(reasons) or ("no longer in the store",)
