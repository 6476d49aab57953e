"""The store: what counts as an artifact, publication, what killed runs leave, its format."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge.codec import Json
from forge.errors import DataError
from forge.pipeline.stage import Result
from forge.store.artifacts import Artifact, Build, Facts, Store, open_store
from forge.store.digest import digest, tree_digest
from forge.store.lock import hold_lock
from tests.test_pipeline_stages import listen

REQUEST: dict[str, Json] = {"stage": "export", "params": {"quant": "q4_k_m"}}
KEY = digest(REQUEST)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write(out: Path) -> Facts:
    (out / "model.gguf").write_bytes(b"GGUF")
    (out / "more").mkdir()
    (out / "more" / "tokens.txt").write_text("a b")
    (out / "logs").mkdir()
    (out / "logs" / "export.log").write_text(os.urandom(8).hex())
    return {"rows": [1, 2], "loss": 0.25}


def made(store: Store, build: Build = write, **options: Any) -> Artifact:
    return store.build("export", KEY, REQUEST, build, **options)


def refuse(out: Path) -> Facts:
    raise AssertionError("built although it is there")


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def test_what_was_built_is_found(store: Store) -> None:
    artifact = made(store, recorded={"torch": "2.13.0"})
    assert store.find("export", KEY) == artifact == made(store, refuse)
    assert artifact.path == store.root / "artifacts" / "export" / KEY
    assert files(artifact.path) == {"artifact.json", "model.gguf", "more/tokens.txt", "logs/export.log"}
    assert artifact.facts == {"rows": [1, 2], "loss": 0.25}
    assert (artifact.request, artifact.recorded) == (REQUEST, {"torch": "2.13.0"})
    assert {name: output.bytes for name, output in artifact.outputs.items()} == {
        "model.gguf": 4,
        "more/tokens.txt": 3,
    }
    assert artifact.digest == tree_digest(artifact.path, ["model.gguf", "more/tokens.txt"])
    assert store.find("validate", KEY) is None and store.find("export", "0" * 64) is None


def test_outputs_can_be_read_by_all_and_written_by_none(store: Store) -> None:
    def private(out: Path) -> Facts:
        (out / "adapter.safetensors").touch(mode=0o600)
        return {}

    artifact = made(store, private)
    assert (artifact.path / "adapter.safetensors").stat().st_mode & 0o777 == 0o444


def test_the_digest_is_over_outputs_alone(store: Store) -> None:
    first = made(store)
    assert made(store, replace=True).digest == first.digest, "logs and times are no part of it"

    def other(out: Path) -> Facts:
        write(out)
        (out / "more" / "tokens.txt").write_text("a c")
        return {}

    assert made(store, other, replace=True).digest != first.digest
    assert files(store.root / "artifacts" / "export") == {f"{KEY}/{name}" for name in files(first.path)}


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads((path / "artifact.json").read_text())
        change(content)
        (path / "artifact.json").write_text(json.dumps(content))

    return damage


def rewrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "artifact.json").unlink(),
        lambda path: (path / "model.gguf").unlink(),
        rewrite("artifact.json", b""),
        rewrite("artifact.json", b"\xff"),
        rewrite("artifact.json", b"[1]"),
        rewrite("artifact.json", b"[" * 100_000),
        rewrite("artifact.json", b'{"outputs": []}'),
        rewrite("model.gguf", b"GGU"),
        manifest(lambda content: content.pop("facts")),
        manifest(lambda content: content.update(facts={"changed": 1})),
        manifest(lambda content: content["recorded"].update(torch="0")),
        manifest(lambda content: content.update(format=2)),
        manifest(lambda content: content.update(stage="train")),
        manifest(lambda content: content["request"].update(params={})),
        manifest(lambda content: content["outputs"].pop("model.gguf")),
        manifest(lambda content: content["outputs"]["model.gguf"].update(sha256="0" * 64)),
        manifest(lambda content: content["outputs"]["model.gguf"].update(bytes="4")),
    ],
)
def test_a_directory_that_is_not_whole_is_no_artifact_and_is_replaced(
    store: Store, damage: Callable[[Path], None]
) -> None:
    artifact = made(store)
    damage(artifact.path)
    assert store.find("export", KEY) is None
    again = made(store)
    assert again.digest == artifact.digest and store.find("export", KEY) == again
    assert files(again.path) == {"artifact.json", "model.gguf", "more/tokens.txt", "logs/export.log"}
    assert [name for _, name, _ in store.directories()] == [KEY]


def test_an_empty_directory_of_the_right_name_is_no_artifact(store: Store) -> None:
    store.path("export", KEY).mkdir(parents=True)
    assert store.find("export", KEY) is None
    assert made(store).facts["loss"] == 0.25


def fail(*, work: bool) -> Callable[[Path], Facts]:
    def build(out: Path) -> Facts:
        (out / "model.gguf").write_bytes(b"half")
        (out / "more").mkdir()
        (out / "work").mkdir(exist_ok=True)
        if work:
            (out / "work" / "checkpoint").write_text("7")
        raise RuntimeError("stopped")

    return build


def test_a_failed_build_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        made(store, fail(work=False))
    assert list(store.directories()) == []
    assert not store.work("export", KEY).exists()


def test_a_failed_build_leaves_its_work_for_the_next(store: Store) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        made(store, fail(work=True))
    assert files(store.partial("export", KEY)) == {"work/checkpoint"}
    assert any(store.work("export", KEY).iterdir()) and store.find("export", KEY) is None

    def resume(out: Path) -> Facts:
        assert files(out) == {"work/checkpoint"}
        (out / "model.gguf").write_text((out / "work" / "checkpoint").read_text())
        return {}

    artifact = made(store, resume)
    assert files(artifact.path) == {"artifact.json", "model.gguf"}
    assert [name for _, name, _ in store.directories()] == [KEY]


def test_what_was_finished_but_not_published_is_published(store: Store) -> None:
    """A process killed between its manifest and the rename."""
    artifact = made(store)
    partial = store.partial("export", KEY)
    artifact.path.rename(partial)
    (partial / "work").mkdir()
    (partial / "work" / "checkpoint").write_text("7")
    assert made(store, refuse) == artifact
    assert not (artifact.path / "work").exists() and not partial.exists()
    artifact.path.rename(partial)
    older = made(Store(store.root.with_name("other")), lambda out: {})
    older.path.rename(artifact.path)
    assert made(store, refuse) == artifact, "it was to replace the older one"


def test_a_replacement_that_was_cut_short_is_finished(store: Store) -> None:
    """A process killed between the two renames that put a new artifact in the place of an old one."""
    artifact = made(store)
    aside = artifact.path.with_name(KEY + ".replaced")
    artifact.path.rename(aside)
    assert made(store, refuse) == artifact
    artifact.path.rename(aside)
    made(store, lambda out: {}, replace=True)
    assert store.find("export", KEY) != artifact
    assert [name for _, name, _ in store.directories()] == [KEY]


@pytest.mark.parametrize("facts", [{"loss": float("nan")}, {"thing": object()}])
def test_facts_that_are_no_json_are_a_bug_and_lose_no_work(store: Store, facts: Facts) -> None:
    def build(out: Path) -> Facts:
        (out / "work").mkdir()
        (out / "work" / "checkpoint").touch()
        return facts

    with pytest.raises((ValueError, TypeError)):
        made(store, build)
    assert files(store.partial("export", KEY)) == {"work/checkpoint"}


@dataclass(frozen=True)
class Loss:
    """The facts of a stage that measures."""

    loss: float
    rows: int = 0


@pytest.mark.parametrize(
    ("facts", "reason"),
    [({"loss": 1.0, "row": 4}, "has no row"), ({"rows": 4}, "lacks loss"), ({"loss": "low"}, "str")],
)
def test_facts_are_read_as_their_class_or_refused(store: Store, facts: Facts, reason: str) -> None:
    """A key that the class does not have is no value that was left out."""
    artifact = made(store, lambda out: facts)
    with pytest.raises(ValueError, match=reason):
        artifact.read(Loss)
    with pytest.raises(ValueError, match=reason):
        Result("measure", True, 0.0, artifact.facts).read(Loss)
    assert made(store, lambda out: Loss(1.0, 4), replace=True).read(Loss) == Loss(1.0, 4)


def test_an_output_that_is_a_link_is_refused(store: Store, tmp_path: Path) -> None:
    def build(out: Path) -> Facts:
        (out / "model.gguf").symlink_to(tmp_path / "elsewhere")
        return {}

    with pytest.raises(ValueError, match=r"model\.gguf: an output must be a file"):
        made(store, build)


def test_a_key_of_another_request_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="not the digest"):
        store.build("export", "0" * 64, REQUEST, write)


def test_two_builders_of_one_key_build_once(store: Store) -> None:
    built: list[int] = []
    inside = threading.Event()

    def slow(out: Path) -> Facts:
        built.append(1)
        inside.wait(0.3)
        return write(out)

    found: list[Artifact] = []
    threads = [threading.Thread(target=lambda: found.append(made(store, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert len(found) == 4 and all(artifact == found[0] for artifact in found)


def test_who_holds_a_lock_is_said_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listen(monkeypatch)
    store.prepare()
    with hold_lock(store.lock("export", KEY), what="export", run="yoda"):
        waiting = threading.Thread(target=lambda: made(store))
        waiting.start()
        while not said.lines:
            waiting.join(0.01)
        waiting.join(0.3)
    waiting.join()
    assert len(said.lines) == 1
    assert said.lines[0].startswith(f"export: waiting for process {os.getpid()} (run yoda, since 20")


def test_the_format_has_a_number(store: Store) -> None:
    made(store)
    assert (store.root / "FORMAT").read_text() == "1\n"
    (store.root / "FORMAT").write_text("2\n")
    with pytest.raises(DataError, match="has format 2; this forge knows formats up to 1") as caught:
        Store(store.root)
    assert caught.value.hint == "upgrade forge, or set FORGE_HOME to another directory"
    for text in ("one", "", "-1"):
        (store.root / "FORMAT").write_text(text)
        with pytest.raises(DataError, match="not a number"):
            Store(store.root)


def test_opening_and_looking_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))
    store = open_store(read_only=True)
    assert store.root == tmp_path / "home"
    assert store.find("export", KEY) is None and list(store.directories()) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="read only"):
        made(store)


def test_without_forge_home_the_platforms_directory_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORGE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    root = open_store().root
    assert root.name == "forge" and root.is_relative_to(tmp_path)


def test_a_store_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a directory") as caught:
        made(Store(tmp_path / "file"))
    assert "FORGE_HOME" in caught.value.hint
