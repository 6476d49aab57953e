"""Runs that the store knows, publication of files into them, and what `forge gc` may remove."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from forge.store import collect, runs
from forge.store.artifacts import Artifact, Facts, Store
from forge.store.digest import digest
from forge.store.lock import hold_lock
from forge.store.runs import publish
from tests.test_pipeline_stages import listen

LARGE = bytes(range(256)) * 8192  # 2 MiB with NUL bytes


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def request(stage: str, value: str) -> dict[str, str]:
    return {"stage": stage, "value": value}


def made(store: Store, stage: str, value: str, size: int = 100) -> Artifact:
    def build(out: Path) -> Facts:
        (out / "output").write_bytes(b"x" * size)
        return {}

    asked = request(stage, value)
    return store.build(stage, digest(asked), asked, build)


def run_directory(tmp_path: Path, name: str) -> Path:
    directory = tmp_path / "runs" / name
    directory.mkdir(parents=True)
    return directory


def test_the_store_knows_its_runs(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.runs(store) == []
    yoda, luke, gone = (run_directory(tmp_path, name) for name in ("yoda", "luke", "gone"))
    runs.register(store, gone)
    runs.remember(store, yoda, {"train": request("train", "a")})
    monkeypatch.chdir(tmp_path)
    runs.register(store, Path("runs/luke"))
    runs.register(store, Path("runs/yoda"))
    gone.rmdir()
    assert runs.runs(store) == [
        runs.Run(luke, {}),
        runs.Run(yoda, {"train": request("train", "a")}),
    ]
    assert runs.requests(store, Path("runs/yoda")) == {"train": request("train", "a")}
    assert runs.requests(store, tmp_path) == {}


def test_a_corrupt_record_of_a_run_is_written_anew(store: Store, tmp_path: Path) -> None:
    yoda = run_directory(tmp_path, "yoda")
    runs.register(store, yoda)
    (record,) = (store.root / "runs").glob("*.json")
    for text in ("", "[]", '{"directory": 1, "requests": {}}', "\x00"):
        record.write_text(text)
        assert runs.runs(store) == [] and runs.requests(store, yoda) == {}
    runs.remember(store, yoda, {})
    assert runs.runs(store) == [runs.Run(yoda, {})]


def test_the_second_ship_into_a_run_waits(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = listen(monkeypatch)
    yoda = run_directory(tmp_path, "yoda")
    order: list[str] = []

    def second() -> None:
        with runs.hold_run(store, yoda):
            order.append("second")

    with runs.hold_run(store, yoda):
        thread = threading.Thread(target=second)
        thread.start()
        while not said.lines:
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert said.lines[0].startswith(f"yoda: waiting for process {os.getpid()} (run yoda, since ")


def test_text_and_small_files_are_copied_and_large_ones_shared(tmp_path: Path) -> None:
    text, small, large = tmp_path / "tokenizer.json", tmp_path / "small.bin", tmp_path / "model.gguf"
    text.write_text("a" * 2_000_000)
    small.write_bytes(b"\0")
    large.write_bytes(LARGE)
    for path in (text, small, large):
        path.chmod(0o444)
    target = tmp_path / "runs" / "yoda"
    assert publish(text, target / "tokenizer.json") == {"copied"}
    assert publish(small, target / "small.bin") == {"copied"}
    shared = publish(large, target / "yoda-q4_k_m.gguf")
    assert shared in ({"linked"}, {"reflinked"})
    assert (target / "tokenizer.json").read_text() == "a" * 2_000_000
    assert (target / "tokenizer.json").stat().st_mode & 0o200, "a person may edit it"
    published = target / "yoda-q4_k_m.gguf"
    assert published.read_bytes() == LARGE
    if shared == {"linked"}:
        assert published.samefile(large) and published.stat().st_mode & 0o777 == 0o444
    else:
        assert not published.samefile(large)
    assert sorted(path.name for path in target.iterdir()) == [
        "small.bin",
        "tokenizer.json",
        "yoda-q4_k_m.gguf",
    ]


def test_where_links_are_refused_a_large_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(LARGE)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    how = publish(tmp_path / "model.gguf", tmp_path / "run" / "model.gguf")
    assert how in ({"copied"}, {"reflinked"})
    assert (tmp_path / "run" / "model.gguf").read_bytes() == LARGE


def test_a_published_directory_has_the_sources_files_and_no_others(tmp_path: Path) -> None:
    """pitfall 16: what an earlier run left in the directory is not reused."""
    source, target = tmp_path / "adapter", tmp_path / "run" / "adapter"
    (source / "deep").mkdir(parents=True)
    (source / "adapter_config.json").write_text("{}")
    (source / "deep" / "weights").write_bytes(LARGE)
    target.mkdir(parents=True)
    (target / "old_shard").write_text("of an earlier run")
    assert publish(source, target) - {"reflinked", "linked"} == {"copied"}
    assert {path.relative_to(target).as_posix() for path in target.rglob("*")} == {
        "adapter_config.json",
        "deep",
        "deep/weights",
    }
    publish(source / "adapter_config.json", target)  # a file in a directory's place
    assert target.read_text() == "{}"
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]


def test_publishing_over_a_read_only_link_leaves_the_artifact_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(LARGE)
    second.write_bytes(LARGE[::-1])
    publish(first, tmp_path / "model")
    publish(second, tmp_path / "model")
    assert first.read_bytes() == LARGE and (tmp_path / "model").read_bytes() == LARGE[::-1]


def found(garbage: collect.Garbage) -> set[tuple[str, str, str]]:
    return {(item.kind, item.stage, item.path.name) for item in garbage.items}


@pytest.fixture
def used(store: Store, tmp_path: Path) -> dict[str, Artifact]:
    """Two runs' artifacts, named by their manifest or by the store's record, and unused ones."""
    artifacts = {
        f"{stage} {value}": made(store, stage, value)
        for stage in ("train", "export")
        for value in ("recorded", "named", "unused")
    }
    runs.remember(
        store,
        run_directory(tmp_path, "yoda"),
        {stage: request(stage, "recorded") for stage in ("train", "export")},
    )
    luke = run_directory(tmp_path, "luke")
    runs.register(store, luke)
    named = {stage: {"key": artifacts[f"{stage} named"].key} for stage in ("train", "export")}
    (luke / "manifest.json").write_text(json.dumps({"artifacts": {**named, "odd": {}, "broken": None}}))
    return artifacts


def test_what_no_run_uses_is_shown_and_nothing_removed(store: Store, used: dict[str, Artifact]) -> None:
    before = sorted(store.root.rglob("*"))
    garbage = collect.find_garbage(store)
    train, export = used["train unused"], used["export unused"]
    assert found(garbage) == {("adapter", "train", train.key), ("artifact", "export", export.key)}
    sizes = {item.key: item.bytes for item in garbage.items}
    manifest = (export.path / "artifact.json").stat().st_size
    assert sizes[export.key] == 100 + manifest
    assert garbage.bytes("artifact") == sizes[export.key]
    assert garbage.bytes() == sizes[export.key] + sizes[train.key]
    assert garbage.used_bytes > 400
    assert sorted(store.root.rglob("*")) == before


def test_an_adapter_goes_only_when_told(store: Store, used: dict[str, Artifact]) -> None:
    assert found(collect.collect(store)) == {("artifact", "export", used["export unused"].key)}
    left = {name for name, artifact in used.items() if store.find(artifact.stage, artifact.key)}
    assert left == {*used} - {"export unused"}
    assert found(collect.collect(store, adapters=True)) == {("adapter", "train", used["train unused"].key)}
    assert found(collect.collect(store, adapters=True, partials=True)) == set()
    assert {path.name for _, _, path in store.directories()} == {
        artifact.key for name, artifact in used.items() if "unused" not in name
    }


def test_a_removed_run_uses_nothing(store: Store, used: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "runs" / "luke" / "manifest.json").unlink()
    (tmp_path / "runs" / "yoda").rename(tmp_path / "runs" / "moved")
    assert {item.key for item in collect.find_garbage(store).items} == {
        artifact.key for artifact in used.values()
    }


def test_partial_directories_are_listed_apart(store: Store, used: dict[str, Artifact]) -> None:
    train = used["train recorded"]
    (store.partial("train", train.key) / "work").mkdir(parents=True)
    (store.partial("train", train.key) / "work" / "checkpoint").write_text("12345")
    garbage = collect.find_garbage(store)
    assert [(item.kind, item.bytes) for item in garbage.items if item.kind == "partial"] == [("partial", 5)]
    collect.collect(store, adapters=True)
    assert store.partial("train", train.key).exists()
    assert found(collect.collect(store, partials=True)) == {("partial", "train", train.key + ".partial")}
    assert store.find("train", train.key) == train


def test_what_is_locked_is_not_touched(store: Store, used: dict[str, Artifact]) -> None:
    export = used["export unused"]
    store.partial("export", export.key).mkdir()
    with hold_lock(store.lock("export", export.key), what="export"):
        assert "export" not in {item.stage for item in collect.find_garbage(store).items}
        assert found(collect.collect(store, partials=True)) == set()
    assert len(collect.collect(store, partials=True).items) == 2


def test_what_a_ship_took_up_since_the_plan_stays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = made(store, "export", "a")
    earlier = collect.find_garbage(store)
    monkeypatch.setattr(collect, "find_garbage", lambda store: earlier)
    runs.remember(store, run_directory(tmp_path, "yoda"), {"export": request("export", "a")})
    assert found(collect.collect(store)) == set()
    assert store.find("export", artifact.key) == artifact


def test_bytes_shared_with_a_run_by_a_hard_link_would_not_be_freed(store: Store, tmp_path: Path) -> None:
    artifact = made(store, "export", "a", size=5000)
    (tmp_path / "kept.gguf").hardlink_to(artifact.path / "output")
    (item,) = collect.find_garbage(store).items
    assert item.bytes == (artifact.path / "artifact.json").stat().st_size


def test_an_unfinished_removal_is_finished_later(store: Store) -> None:
    artifact = made(store, "export", "a")
    artifact.path.rename(artifact.path.with_name(artifact.key + ".deleted"))
    assert [item.kind for item in collect.find_garbage(store).items] == ["partial"]
    collect.collect(store, partials=True)
    assert list(store.directories()) == []
