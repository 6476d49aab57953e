"""A small pipeline of real stages that write real files, for the tests of the runner; and `select`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from forge import report
from forge.codec import Json
from forge.errors import CheckError, ForgeError, RecipeError
from forge.pipeline.stage import Action, Result, Stage, Step, select
from forge.store.artifacts import Artifact, Facts


def note(journal: Path, name: str) -> None:
    with journal.open("a") as stream:
        stream.write(name + "\n")


@dataclass(frozen=True)
class Noted(Stage):
    """A stage that notes in a journal, outside the store, that it was built."""

    journal: Path
    version: int = 1
    fails: BaseException | None = None

    def note(self, out: Path) -> None:
        note(self.journal, self.name)
        if self.fails:
            (out / "half").write_text("half")
            raise self.fails


@dataclass(frozen=True)
class Train(Noted):
    """Copies letters one by one, with a checkpoint after each; goes on from the last one."""

    learning_rate: float = 2e-4
    text: str = "yoda"
    comment: str = ""
    torch: str = "2.12.0"
    stops_after: int = 99
    name = "train"

    def params(self) -> Mapping[str, Json]:
        return {"train.learning_rate": self.learning_rate, "data.source": self.text}

    def recorded(self) -> Mapping[str, str]:
        return {"torch": self.torch}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Facts:
        work = out / "work"
        work.mkdir(exist_ok=True)
        checkpoint = work / "checkpoint"
        resumed = checkpoint.read_text() if checkpoint.exists() else ""
        self.note(out)
        for count in range(len(resumed), len(self.text)):
            if count == self.stops_after:
                raise KeyboardInterrupt
            checkpoint.write_text(self.text[: count + 1])
        (out / "logs").mkdir()
        (out / "logs" / "train.log").write_text(f"{os.urandom(8).hex()}\n")
        # As with real training, small differences of the rate need not change the bytes.
        (out / "adapter.txt").write_text(f"{self.text} {self.learning_rate:.0e}")
        return {"resumed": len(resumed), "steps": len(self.text)}


@dataclass(frozen=True)
class Export(Noted):
    llama: str = "0.3.35"
    bytes_free: int = 0
    name = "export"
    needs = ("train",)

    def params(self) -> Mapping[str, Json]:
        return {"export.quant": "q4_k_m"}

    def tools(self) -> Mapping[str, str]:
        return {"llama-cpp-python": self.llama}

    def bytes_needed(self, inputs: Mapping[str, Artifact]) -> int:
        return self.bytes_free or inputs["train"].outputs["adapter.txt"].bytes

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Facts:
        self.note(out)
        (out / "model.gguf").write_text((inputs["train"].path / "adapter.txt").read_text().upper())
        return {}


@dataclass(frozen=True)
class Verify(Noted):
    """Measures once; its limit is no part of the request."""

    least_letters: int = 1
    name = "verify"
    needs = ("train", "export")

    def params(self) -> Mapping[str, Json]:
        return {}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Facts:
        self.note(out)
        letters = len((inputs["export"].path / "model.gguf").read_text().split()[0])
        (out / "certificate.txt").write_text(str(letters))
        return {"letters": letters}

    def judge(self, artifact: Artifact) -> ForgeError | None:
        letters = artifact.facts["letters"]
        if isinstance(letters, int) and letters < self.least_letters:
            return CheckError(f"only {letters} letters")
        return None


@dataclass(frozen=True)
class Deploy(Action):
    journal: Path
    name = "deploy"
    needs = ("export",)

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> Facts:
        artifact = results["export"].artifact
        assert artifact is not None
        note(self.journal, self.name)
        stack.callback(note, self.journal, "stopped")
        return {"served": (artifact.path / "model.gguf").read_text()}


@dataclass(frozen=True)
class Smoke(Action):
    journal: Path
    name = "smoke"
    needs = ("deploy",)

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> Facts:
        note(self.journal, self.name)
        return {"answer": results["deploy"].facts["served"]}


@dataclass(frozen=True)
class Pipeline:
    """The stages of one small recipe, and the journal of what was built since it was last read."""

    journal: Path

    def stages(self, **changed: object) -> tuple[Step, ...]:
        """All stages; `train_text="x"` sets the field `text` of the stage train."""
        stages: Sequence[Step] = (
            Train(self.journal),
            Export(self.journal),
            Verify(self.journal),
            Deploy(self.journal),
            Smoke(self.journal),
        )
        given: dict[str, dict[str, object]] = {stage.name: {} for stage in stages}
        for key, value in changed.items():
            stage, _, name = key.partition("_")
            given[stage][name] = value
        return tuple(dataclasses.replace(stage, **given[stage.name]) for stage in stages)  # type: ignore[type-var]

    def built(self) -> list[str]:
        names = self.journal.read_text().split() if self.journal.exists() else []
        self.journal.unlink(missing_ok=True)
        return names


class Said:
    """A sink that keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def text(self, kind: str, text: str) -> None:
        self.lines.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[report.Cell]]) -> None:
        self.lines.append(title)

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        self.lines.append(label)


def listen(monkeypatch: pytest.MonkeyPatch) -> Said:
    """Keep what is said for the rest of a test."""
    said = Said()
    monkeypatch.setattr(report, "_sink", said)
    return said


def names(stages: Sequence[Step]) -> list[str]:
    return [stage.name for stage in stages]


def test_select_stops_behind_until_and_forces_from_a_stage_on(tmp_path: Path) -> None:
    stages = Pipeline(tmp_path / "journal").stages()
    assert names(select(stages).stages) == ["train", "export", "verify", "deploy", "smoke"]
    chosen = select(stages, from_stage="export", until="verify", force=frozenset({"train"}))
    assert names(chosen.stages) == ["train", "export", "verify"]
    assert chosen.forced == {
        "train": "forced by --retrain",
        "export": "forced by --from export",
        "verify": "forced by --from export",
    }


@pytest.mark.parametrize(
    ("first", "last", "message", "hint"),
    [
        ("exprot", None, "--from exprot: this recipe has no such stage", "did you mean export?"),
        (
            None,
            "x",
            "--until x: this recipe has no such stage",
            "its stages are train, export, verify, deploy, smoke",
        ),
        ("verify", "train", "--from verify comes after --until train: nothing would run", ""),
    ],
)
def test_a_name_that_is_no_stage_is_an_error_of_the_arguments(
    tmp_path: Path, first: str | None, last: str | None, message: str, hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        select(Pipeline(tmp_path / "journal").stages(), first, last)
    assert (caught.value.message, caught.value.hint, caught.value.code) == (message, hint, 2)


def test_stages_in_an_impossible_order_are_a_bug(tmp_path: Path) -> None:
    train, export, verify, deploy, smoke = Pipeline(tmp_path / "journal").stages()
    for wrong in [(export, train), (train, train), (train, deploy), (train, export, smoke), (verify,)]:
        with pytest.raises(ValueError, match="may need"):
            select(wrong)
