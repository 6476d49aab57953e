"""Several ships, one after another or one on each GPU, and one table and page of what came of them.

Each run shares the store with the others: what two of them have in common is made once, and a sweep that is
started again finds what is finished. Not covered: several runs at once on one device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forge import report
from forge.codec import to_plain
from forge.commands.side_by_side import Shipped, gpus_named, ship_side_by_side
from forge.errors import ForgeError, InterruptedByUserError, Problem, RecipeError, StageError
from forge.files import write_text
from forge.recipe.schema import Train
from forge.recipe.sweep import Combination, Sweep, load_sweep
from forge.runs.figures import SHOWN, FigureColumn, Figures, figures_of
from forge.runs.files import RUNS
from forge.runs.manifest import read_manifest
from forge.ship.drive import plan_quietly, run_directory, ship
from forge.ship.page import page_environment
from forge.ship.pictures import bars, points, standalone

_FIGURES = (
    "trainable_parameters", "loss_after", "exact_after", "peak_memory_bytes", "training_seconds",
    "gguf_bytes", "kl_mean", "top1",
)  # fmt: skip
_AGAIN = "run the same command again: what is finished comes from the store"


@dataclass(frozen=True)
class SweepRun:
    """One run: what makes it another, how it ended, and its figures as far as they were measured.

    `outcome` is None of a run that was not begun; `ok`: it ended without an error.
    """

    name: str
    directory: Path
    values: Mapping[str, Any]
    outcome: str | None = None
    ok: bool = False
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep; `table` is this as a JSON file, `plot` a page with its pictures.

    `picture` is the first of them as a file of its own; there is none before a run has figures.
    """

    name: str
    runs: tuple[SweepRun, ...]
    table: Path
    plot: Path
    picture: Path


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is called: see `load_sweep`. `overrides` are `key=value` or `key=[value, ...]`.

    `devices`: the GPUs that runs are spread over (`gpus_named`).
    """

    overrides: tuple[str, ...] = ()
    recipe: Path | None = None
    until: str | None = None
    is_sure: bool = False
    devices: str | None = None


def plan_sweep(path: Path, options: SweepOptions) -> dict[str, Any]:
    """Show the runs of a sweep and what each would run; nothing is written. Raises as `run_sweep`."""
    gpus, sweep = _gpus(options), _load(path, options)
    _refuse_several_devices(sweep, gpus)
    plans = _plans(sweep)
    rows = []
    for run, stages in zip(sweep.combinations, plans, strict=True):
        made = [name for name, cached in stages.items() if not cached]
        rows.append((run.name, run.label, ", ".join(made) or "nothing", len(stages) - len(made)))
    count = f"{len(rows)} run{'s' if len(rows) != 1 else ''}"
    report.table(f"{sweep.name}: {count}", ("run", "", "makes", "from the store"), rows)
    runs = [
        {"name": combination.name, "values": dict(combination.values), "stages": stages}
        for combination, stages in zip(sweep.combinations, plans, strict=True)
    ]
    return {"name": sweep.name, "runs": to_plain(runs), "table": None, "plot": None, "picture": None}


def run_sweep(path: Path, options: SweepOptions) -> dict[str, Any]:
    """Ship every run of a sweep; returns `SweepResult` as JSON, and leaves it in `runs/` after each run.

    Raises `RecipeError` before anything runs, with what is wrong with any of them; the error of the runs that
    failed when all had their turn; `InterruptedByUserError` when it is stopped.
    """
    gpus, sweep = _gpus(options), _load(path, options)
    _refuse_several_devices(sweep, gpus)
    _plans(sweep)
    kept = Path(RUNS).absolute()
    begun = tuple(_run_of(combination) for combination in sweep.combinations)
    files = (kept / f"{sweep.name}.sweep.{ending}" for ending in ("json", "html", "svg"))
    result = SweepResult(sweep.name, begun, *files)
    failures: dict[str, ForgeError] = {}
    shipped = ship_side_by_side(sweep.combinations, gpus, sweep.until) if gpus else _one_by_one(sweep)
    try:
        with closing(shipped):
            for number, failure in shipped:
                done = _recorded(sweep.combinations[number], failure)
                result = replace(result, runs=(*result.runs[:number], done, *result.runs[number + 1 :]))
                _keep(result)
                if failure:
                    failures[done.name] = failure
    except (KeyboardInterrupt, InterruptedByUserError) as stop:
        _keep(result)
        raise _stopped(result) from stop
    _show(result)
    plain: dict[str, Any] = to_plain(result)
    if failures:
        raise _failed(failures, plain)
    return plain


def _gpus(options: SweepOptions) -> tuple[int, ...]:
    return gpus_named(options.devices) if options.devices else ()


def _refuse_several_devices(sweep: Sweep, gpus: Sequence[int]) -> None:
    """Each process has one GPU of `gpus`, and sees no other."""
    for combination in sweep.combinations if gpus else ():
        train = combination.loaded.recipe.train
        if isinstance(train, Train) and train.devices_each not in (1, None):
            raise RecipeError(
                f"--devices gives each run one GPU, and {combination.name} has {train.devices_each} in "
                "train.devices",
                hint="leave one of the two out",
            )


def _load(path: Path, options: SweepOptions) -> Sweep:
    return load_sweep(
        path,
        options.overrides,
        recipe=options.recipe,
        until=options.until,
        ask=lambda question: options.is_sure or report.ask(question),
    )


def _plans(sweep: Sweep) -> list[dict[str, bool]]:
    """Of each run its stages, and which of them are in the store; raises what a plan of any raises."""
    plans = []
    problems: dict[Problem, str] = {}
    hints: dict[str, None] = {}
    for combination in sweep.combinations:
        try:
            planned = plan_quietly(combination.loaded, sweep.until).stages
            plans.append({stage.name: stage.cached for stage in planned})
        except ForgeError as failure:
            # What is wrong with all of them is reported once.
            faults = failure.problems or (Problem(failure.message),)
            problems = {**dict.fromkeys(faults, combination.name), **problems}
            hints[failure.hint] = None
    if problems:
        listed = [
            replace(problem, message=f"{name}: {problem.message}") for problem, name in problems.items()
        ]
        raise RecipeError(
            f"the sweep {sweep.name} cannot be run: nothing was", problems=listed, hint="; ".join(hints)
        )
    return plans


def _run_of(combination: Combination) -> SweepRun:
    return SweepRun(combination.name, run_directory(combination.loaded), combination.values)


def _one_by_one(sweep: Sweep) -> Shipped:
    """Ship each; yields its number and what it raised."""
    for number, combination in enumerate(sweep.combinations):
        report.info(f"run {number + 1} of {len(sweep.combinations)}: {combination.name}: {combination.label}")
        failure = None
        try:
            ship(combination.loaded, until=sweep.until)
        except InterruptedByUserError:
            raise
        except ForgeError as wrong:
            failure = wrong
        yield number, failure


def _recorded(combination: Combination, failure: ForgeError | None) -> SweepRun:
    """What came of a run; what is wrong with it is no error of the sweep yet."""
    run = _run_of(combination)
    if failure:
        for problem in failure.problems:
            report.warning(f"{run.name}: {problem}")
        report.warning(f"{run.name} failed: {failure.message}")
    manifest = read_manifest(run.directory)
    if failure and manifest.outcome != failure.message:
        # It failed before its manifest was written: what lies there is of an earlier ship.
        return replace(run, outcome=failure.message)
    return replace(run, outcome=manifest.outcome, ok=failure is None, figures=figures_of(manifest))


def _stopped(result: SweepResult) -> InterruptedByUserError:
    left = [run.name for run in result.runs if run.outcome is None]
    done = f"{len(result.runs) - len(left)} of {len(result.runs)} runs are done"
    rest = f"; not finished: {', '.join(left)}" if left else ""
    stop = InterruptedByUserError(f"the sweep was stopped; {done}{rest}", hint=_AGAIN)
    stop.fields = to_plain(result)
    return stop


def _failed(failures: Mapping[str, ForgeError], plain: Mapping[str, Any]) -> ForgeError:
    """One error of all that failed, of their own kind where they have one."""
    kinds = {type(failure) for failure in failures.values()}
    kind = kinds.pop() if len(kinds) == 1 else StageError
    failure = kind(
        f"{len(failures)} of {len(plain['runs'])} runs failed",
        hint=f"correct what failed; {_AGAIN}",
        problems=[Problem(failure.message, name) for name, failure in failures.items()],
    )
    failure.fields = plain
    return failure


def _shown(result: SweepResult) -> list[FigureColumn]:
    """The figures that one of the runs has."""
    return [
        figure
        for figure in SHOWN
        if figure.figure in _FIGURES and any(figure.number(run.figures) is not None for run in result.runs)
    ]


def _table(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: what makes each run another, its figures, and how it ended."""
    varied = list(dict.fromkeys(name for run in result.runs for name in run.values))
    shown = _shown(result)
    heads = [*(name.rpartition(".")[2] for name in varied), *(figure.label for figure in shown), "outcome"]
    rows = [
        [
            *(_word(run.values.get(name)) for name in varied),
            *(figure.of(run.figures) for figure in shown),
            run.outcome or "not run",
        ]
        for run in result.runs
    ]
    return heads, rows


def _word(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "+".join(map(_word, value))
    return value if isinstance(value, str) else json.dumps(value)


def _show(result: SweepResult) -> None:
    report.table(result.name, *_table(result))
    report.info(f"plots: {result.plot}")


def _keep(result: SweepResult) -> None:
    """The table and the page, so far."""
    result.table.parent.mkdir(parents=True, exist_ok=True)
    write_text(result.table, json.dumps(to_plain(result), indent=2, ensure_ascii=False) + "\n")
    heads, rows = _table(result)
    pictures = _pictures(result)
    text = Path(__file__).with_name("sweep.html.jinja").read_text(encoding="utf-8")
    page = page_environment().from_string(text)
    written = page.render(name=result.name, runs=result.runs, heads=heads, rows=rows, pictures=pictures)
    write_text(result.plot, written)
    if pictures:
        write_text(result.picture, standalone(pictures[0][1]))


def _pictures(result: SweepResult) -> Sequence[tuple[str, str]]:
    """Title and SVG of each: the loss over what was trained, and each figure by run."""
    named = [(_label(run), run.figures) for run in result.runs]
    both = [
        (float(figures.trainable_parameters), figures.loss_after, name)
        for name, figures in named
        if figures.trainable_parameters and figures.loss_after is not None
    ]
    title = "held-out loss by trainable parameters"
    drawn = [(title, points(both, "trainable parameters", title))] if len({x for x, _, _ in both}) > 1 else []
    for figure in _shown(result):
        values = [(name, figure.number(figures), figure.of(figures)) for name, figures in named]
        known = [(name, value, words) for name, value, words in values if value is not None]
        drawn.append((figure.label, bars(known, f"{figure.label} of each run")))
    return drawn


def _label(run: SweepRun) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {_word(value)}" for name, value in run.values.items())
