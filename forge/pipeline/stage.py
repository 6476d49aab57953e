"""What a stage of the pipeline is: a pure `Stage`, or an `Action` that looks at the world.

A stage's *request* is everything its bytes depend on: its name and version, the recipe fields
that it names, the versions of its tools, and the digests (not the keys) of its inputs. Equal
requests have interchangeable results, so one that is in the store is never made twice; and
when an input is made anew with the same bytes, the work stops there.

Inherit from these protocols: they bring the defaults.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

from forge.codec import Json, from_plain
from forge.errors import ForgeError, RecipeError
from forge.store.artifacts import Artifact, Facts, Made, Request

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What one stage came to in one ship. `artifact` is None for an `Action`."""

    name: str
    cached: bool
    seconds: float
    facts: Facts
    artifact: Artifact | None = None

    def read(self, kind: type[T]) -> T:
        """The facts as the dataclass that the stage made; raises `ValueError` where they are none."""
        return from_plain(kind, self.facts)


class Described(Protocol):
    """What every stage says of itself, for those who plan a ship, record it and show it."""

    name: str
    """Its own within a ship."""
    needs: tuple[str, ...] = ()
    rank: int = 50
    """Where its section stands in the report; the conclusions come first."""
    lists_facts: bool = True
    """Whether the manifest lists its facts as they are."""

    @property
    def kind(self) -> str:
        """What it does: stages of one kind with equal requests are one artifact, whatever their names."""
        return self.name

    def packages(self) -> Collection[str]:
        """The Python packages that it imports, looked for before anything runs."""
        return ()

    def require_tools(self) -> None:
        """Raise `MissingToolError` for whatever else it needs and is not there."""
        return

    def look(self) -> None:
        """Raise in a plan, before it runs, what it would refuse; only where looking takes no time."""
        return

    def findings(self, results: Mapping[str, Result]) -> Mapping[str, object]:
        """Fields of the manifest and of the ship's JSON; a later stage's stand over an earlier one's."""
        return {}

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        """Fields of the ship's JSON; `run` is the run's directory."""
        return {}

    def section(self) -> str:
        """Its section of the report, a Jinja template: it reads `manifest`, `facts` (its own), and what
        `section_values` gives besides.
        """
        return ""

    def section_values(self, result: Result) -> Mapping[str, object]:
        """What its section shows that its facts do not hold."""
        return {}


class Stage(Described, Protocol):
    """A pure stage: its result depends only on its request and is kept in the store.

    `kind` is also its directory in the store; `version` goes up when its code changes the bytes
    that it makes; `needs` are names of earlier stages.
    """

    version: int

    def params(self) -> Mapping[str, Json]:
        """What of the recipe changes the bytes: dotted field -> value.

        A file or directory that the recipe names stands here as its digest, `sha256:...`, so that
        its content counts and not its place.
        """
        ...

    def tools(self) -> Mapping[str, str]:
        """Packages whose version changes the bytes: name -> version. An upgrade makes it anew."""
        return {}

    def recorded(self) -> Mapping[str, str]:
        """Packages to note without asking for the same ones: a result of other versions is used."""
        return {}

    def bytes_kept(self) -> Mapping[str, int]:
        """The bytes that stay on the disk, by what they are."""
        return {}

    def bytes_beside(self) -> Mapping[str, int]:
        """The most that it takes besides while it runs, by what it is."""
        return {}

    def bytes_needed(self, inputs: Mapping[str, Artifact]) -> int:
        """The most free disk that `build` takes at any moment; checked before it starts."""
        return sum(self.bytes_kept().values()) + sum(self.bytes_beside().values())

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Made:
        """Make the outputs in the directory `out`; return facts, which are kept as plain JSON.

        `out` is empty but for what a stopped run left in `out/work`, where resumable state goes.
        Logs go to `out/logs`. Both are no outputs. `inputs` holds the stages of `needs`, by their kinds.
        """
        ...

    def goes_on(self, work: Path) -> bool:
        """Whether what a stopped run left in `out/work` spares the next one anything."""
        return work.is_dir() and any(work.iterdir())

    def judge(self, artifact: Artifact) -> ForgeError | None:
        """What to raise, made now or found: limits are held against kept measurements on every run."""
        return None

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        """Put what a person looks for into `run`; `published` is the digest of what lies there."""
        return


@runtime_checkable
class Action(Described, Protocol):
    """A stage that acts on the world (starts a server, asks it, writes a report): never cached."""

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> Made:
        """Act on the results so far. What must live on for later stages (a server) enters `stack`."""
        ...

    def verdict(self, facts: Facts) -> ForgeError | None:
        """What to raise when the ship is over and recorded."""
        return None


Step: TypeAlias = Stage | Action


@dataclass(frozen=True)
class Selection:
    """Which stages take part, and which of them are made even though they are in the store, and why."""

    stages: tuple[Step, ...]
    forced: Mapping[str, str] = field(default_factory=dict)


def request_of(stage: Stage, inputs: Mapping[str, str]) -> Request:
    """The request of a stage; `inputs` gives the digest of each kind of stage that it needs.

    A plan leaves out those that are not known yet; the request is then good for comparing only.
    """
    return {
        "stage": stage.kind,
        "version": stage.version,
        "params": dict(stage.params()),
        "tools": dict(stage.tools()),
        "inputs": dict(inputs),
    }


def select(
    stages: Sequence[Step],
    from_stage: str | None = None,
    until: str | None = None,
    force: frozenset[str] = frozenset(),
) -> Selection:
    """The stages up to `until`; forced are those from `from_stage` on and those in `force`.

    Several stages of one kind go together: from the first of them, or until the last.

    Raises `RecipeError` for a name that is no stage, ValueError for stages in an impossible order.
    """
    names = [stage.name for stage in stages]
    for number, stage in enumerate(stages):
        earlier = {before.name for before in stages[:number] if not isinstance(before, Action)}
        allowed = set(names[:number]) if isinstance(stage, Action) else earlier
        if not set(stage.needs) <= allowed or stage.name in names[:number]:
            raise ValueError(f"{stage.name}: needs {stage.needs}, may need {sorted(allowed)}, must be unique")
    first = _position(names, from_stage, "--from") if from_stage else len(names)
    last = _position(names, until, "--until") if until else len(names) - 1
    last = max([last, *(number for number, stage in enumerate(stages) if stage.kind == until)])
    if from_stage and first > last:
        raise RecipeError(f"--from {from_stage} comes after --until {until}: nothing would run")
    forced = dict.fromkeys(names[first : last + 1], f"forced by --from {from_stage}")
    for name in force:
        _position(names, name, "--retrain")
        forced[name] = "forced by --retrain"
    return Selection(tuple(stages[: last + 1]), forced)


def _position(names: Sequence[str], name: str, option: str) -> int:
    if name in names:
        return names.index(name)
    close = get_close_matches(name, names, 1)
    raise RecipeError(
        f"{option} {name}: this recipe has no such stage",
        hint=f"did you mean {close[0]}?" if close else f"its stages are {', '.join(names)}",
    )
