"""Two runs side by side: what their recipes differ in, and what came of it. Nothing is run or asked.

Not covered: runs of other machines than this, of which only a manifest is here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from forge import report
from forge.codec import to_plain
from forge.errors import DataError, RecipeError
from forge.files import write_text
from forge.pipeline.reasons import short
from forge.recipe.fields import values
from forge.runs.figures import SHOWN, Figures, figures_of, read_whole_manifest
from forge.runs.find import find_run
from forge.runs.manifest import Certified, Learned, Manifest, RunView
from forge.ship.page import page_environment
from forge.train.figures import HeldoutAnswer, ServedAnswer

_MOST_ANSWERS = 10
"""So many questions are shown on the terminal; the page and `--json` have all."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class ComparedRun:
    """One of the two. Without a certificate there is a reason."""

    name: str
    directory: Path
    base: str | None
    outcome: str | None
    written: str | None
    certificate_reason: str | None
    figures: Figures


@dataclass(frozen=True)
class Difference:
    """A field of the recipe, or what a name in it stood for, with its two values."""

    field: str
    first: Any
    second: Any


@dataclass(frozen=True)
class AnswerPair:
    """A question that both were asked, after how many of the same text, and their answers.

    `asked`: as a smoke query, or as a held-out row, whose `expected` answer is known.
    """

    asked: str
    prompt: str
    first: str
    second: str
    expected: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Two runs, the first run's part first in each pair; `asked_of_one`: questions put to one only."""

    runs: tuple[ComparedRun, ComparedRun]
    recipe: tuple[Difference, ...]
    inputs: tuple[Difference, ...]
    learned: tuple[Learned | None, Learned | None]
    certificate: tuple[Certified | None, Certified | None]
    answers: tuple[AnswerPair, ...]
    asked_of_one: int
    page: Path | None = None


def compare_runs(first: str, second: str, page: Path | None = None) -> Mapping[str, object]:
    """Show two runs side by side, and write a page of it; returns the `Comparison` as JSON.

    Raises `DataError` for what is no run, `RecipeError` for one run named twice.
    """
    directories = find_run(first), find_run(second)
    if directories[0].resolve() == directories[1].resolve():
        raise RecipeError(
            f"{first} and {second} are the same run, {directories[0]}"
            if first != second
            else f"{first} is named twice",
            hint="name two runs; forge runs lists them",
        )
    comparison = _comparison(directories, page)
    _show(comparison)
    if page is not None:
        _write_page(comparison, page)
        report.success(f"wrote {page}")
    plain: Mapping[str, object] = to_plain(comparison)
    return plain


def _comparison(directories: tuple[Path, Path], page: Path | None) -> Comparison:
    first, second = (read_whole_manifest(directory) for directory in directories)
    answers, alone = _answers(first.read_facts(), second.read_facts())
    return Comparison(
        runs=(_compared(directories[0], first), _compared(directories[1], second)),
        recipe=tuple(_differences(_leaves(first), _leaves(second))),
        inputs=tuple(_differences(_inputs(first), _inputs(second))),
        learned=(first.learned, second.learned),
        certificate=(first.read_certificate(), second.read_certificate()),
        answers=answers,
        asked_of_one=alone,
        page=page.absolute() if page else None,
    )


def _compared(directory: Path, manifest: Manifest) -> ComparedRun:
    reason = None if manifest.certificate else manifest.certificate_reason or "none was made"
    return ComparedRun(
        manifest.name,
        directory,
        manifest.base.spec,
        manifest.outcome,
        manifest.written,
        reason,
        figures_of(manifest),
    )


def _leaves(manifest: Manifest) -> Mapping[str, object]:
    """Every field of the recipe but the name, which is another for every run."""
    try:
        recipe = manifest.read_recipe()
    except ValidationError:
        raise DataError(
            f"the recipe of {manifest.name} is of another version of forge", hint="ship it again"
        ) from None
    leaves = values(recipe) if recipe else {}
    return {field: value for field, value in leaves.items() if field != "name"}


def _inputs(manifest: Manifest) -> Mapping[str, object]:
    """What names in the recipe stood for: the same name may have other files by now."""
    return {
        "base.revision": manifest.base.revision,
        "base (sha256)": manifest.base.digest,
        "data (sha256)": manifest.data.digest if manifest.data else None,
        "forge": manifest.forge,
    }


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for field in dict.fromkeys([*first, *second]):
        if first.get(field) != second.get(field):
            yield Difference(field, first.get(field), second.get(field))


def _answers(first: RunView, second: RunView) -> tuple[tuple[AnswerPair, ...], int]:
    """The questions that both were asked, and how many only one was."""
    smoke = _paired(_smoke(first), _smoke(second))
    heldout = _paired(_heldout(first), _heldout(second))
    pairs = [AnswerPair("smoke", key[0], *both) for key, both in smoke.items()]
    pairs += [AnswerPair("held out", key[0], was[0], now[0], was[1]) for key, (was, now) in heldout.items()]
    asked = sum(len(answers) for facts in (first, second) for answers in (_smoke(facts), _heldout(facts)))
    return tuple(pairs), asked - 2 * len(pairs)


_Question = tuple[str, str, int]
"""A question's last turn, all of its turns, and how many of the same text came before."""


def _smoke(facts: RunView) -> dict[_Question, str]:
    return _numbered((asked.prompt, asked.prompt, asked.answer) for asked in facts.smoke.smoke)


def _heldout(facts: RunView) -> dict[_Question, tuple[str, str]]:
    """The answers of the shipped file where it was asked, else of the tuned model, and the expected ones."""
    exact, served = facts.evaluate.exact, facts.smoke.heldout
    answers: Sequence[HeldoutAnswer] = served.answers if served else exact.answers if exact else ()
    return _numbered(
        (
            str(answer.messages[-1].get("content", "")) if answer.messages else "",
            repr(answer.messages),
            (answer.served if isinstance(answer, ServedAnswer) else answer.after, answer.expected),
        )
        for answer in answers
    )


def _numbered(asked: Iterator[tuple[str, str, Value]]) -> dict[_Question, Value]:
    numbered: dict[_Question, Value] = {}
    for prompt, whole, answer in asked:
        number = sum(known[1] == whole for known in numbered)
        numbered[prompt, whole, number] = answer
    return numbered


def _paired(
    first: Mapping[_Question, Value], second: Mapping[_Question, Value]
) -> dict[_Question, tuple[Value, Value]]:
    return {question: (answer, second[question]) for question, answer in first.items() if question in second}


def _rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The figures that one of the two has."""
    first, second = (run.figures for run in comparison.runs)
    rows = [(row.label, row.of(first), row.of(second)) for row in SHOWN]
    types = ("type", first.quant or "", second.quant or "")
    return [row for row in (types, *rows) if row[1] or row[2]]


def _verdicts(comparison: Comparison) -> Sequence[tuple[str, bool, str]]:
    """Of each run its name, whether it has a sound certificate, and the certificate in words."""
    return [
        (
            run.name,
            bool(certificate and certificate.ok),
            certificate.verdict if certificate else f"no certificate: {run.certificate_reason}",
        )
        for run, certificate in zip(comparison.runs, comparison.certificate, strict=True)
    ]


def _show(comparison: Comparison) -> None:
    names = tuple(run.name for run in comparison.runs)
    differences = _all_differences(comparison)
    unlike = [(field.field, short(field.first), short(field.second)) for field in differences]
    if unlike:
        report.table("recipe", ("field", *names), unlike)
    else:
        report.info("recipe: no difference")
    report.table("figures", ("", *names), [("outcome", *_outcomes(comparison)), *_rows(comparison)])
    for name, _, words in _verdicts(comparison):
        report.info(f"{name}: {words}")
    for pair in comparison.answers[:_MOST_ANSWERS]:
        expected = f"\n    expected → {pair.expected}" if pair.expected is not None else ""
        report.info(
            f"  {pair.prompt}{expected}\n    {names[0]} → {pair.first}\n    {names[1]} → {pair.second}"
        )
    left = len(comparison.answers) - _MOST_ANSWERS
    if left > 0:
        report.info(f"{left} more answers: --html PAGE, or --json")
    if not comparison.answers:
        report.info("answers: no question was put to both")
    elif comparison.asked_of_one:
        report.info(f"questions that only one was asked: {comparison.asked_of_one}")


def _all_differences(comparison: Comparison) -> tuple[Difference, ...]:
    return (*comparison.recipe, *comparison.inputs)


def _outcomes(comparison: Comparison) -> Iterator[str]:
    return (run.outcome or "" for run in comparison.runs)


def _write_page(comparison: Comparison, path: Path) -> None:
    text = Path(__file__).with_name("compare.html.jinja").read_text(encoding="utf-8")
    differences = _all_differences(comparison)
    unlike = [(field.field, _whole(field.first), _whole(field.second)) for field in differences]
    page = page_environment().from_string(text)
    written = page.render(
        runs=comparison.runs, unlike=unlike, rows=_rows(comparison), verdicts=_verdicts(comparison),
        answers=comparison.answers, asked_of_one=comparison.asked_of_one,
    )  # fmt: skip
    try:
        write_text(path, written)
    except OSError as failure:
        raise DataError(f"--html: {path} cannot be written: {failure.strerror}") from failure


def _whole(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
