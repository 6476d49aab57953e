"""Bases from the hub, against a stand-in on the loopback: pinned, resumed, offline, and each way to fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from forge import report
from forge.errors import DataError, ForgeError, MissingToolError, StageError
from forge.model.base import BUILTIN, ResolvedBase, fetch_dataset, resolve, resolve_headers
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.runs.manifest import Pins
from forge.store.artifacts import Store
from tests.hub_stand_in import Hub, StandInRepository
from tests.told_sink import Told

pytestmark = pytest.mark.network


def tensors(size: int = 64) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(256)) * (4 * size // 256)


CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "README.md": CARD,
    "model.safetensors": tensors(50_000),
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "pytorch_model.bin": b"never",
    "consolidated.safetensors": b"never",
    "model.fp16.safetensors": b"never",
    "onnx/config.json": b"never",
    "model-q4.gguf": b"never",
}
WANTED = {
    "config.json",
    "tokenizer.json",
    "README.md",
    "model.safetensors",
    "additional_chat_templates/tools.jinja",
}


@pytest.fixture
def told() -> Iterator[Told]:
    sink = Told()
    report.configure(sink=sink)
    yield sink
    report.configure(sink=report.PlainSink(sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr))


@pytest.fixture
def hub(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub({"org/model": StandInRepository(FILES)}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield running
        huggingface_hub.close_session()


def contents(base: ResolvedBase) -> dict[str, bytes]:
    assert base.directory is not None
    root = base.directory
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(kind: type[ForgeError], spec: str, *, offline: bool = False) -> ForgeError:
    with pytest.raises(kind) as caught:
        resolve(spec, offline=offline)
    return caught.value


def test_only_what_is_needed_is_fetched_and_pinned_to_its_commit(hub: Hub) -> None:
    base = resolve("org/model")
    commit = hub.repositories["org/model"].commit
    assert (base.revision, base.licence, base.problems) == (commit, "apache-2.0", ())
    assert contents(base) == {name: FILES[name] for name in WANTED}


def test_a_commit_that_is_here_needs_no_network(hub: Hub) -> None:
    base = resolve("org/model")
    hub.requests.clear()
    again = resolve(f"org/model@{base.revision}")
    assert (again.directory, again.revision, hub.requests) == (base.directory, base.revision, [])


def test_a_branch_moves_only_when_the_hub_is_asked(hub: Hub) -> None:
    before = resolve("org/model")
    hub.repositories["org/model"] = StandInRepository({**FILES, "config.json": b'{"changed": 1}'})
    assert resolve("org/model", offline=True).revision == before.revision
    after = resolve("org/model")
    assert after.revision == hub.repositories["org/model"].commit != before.revision
    assert resolve("org/model", revision=before.revision).revision == before.revision


def test_a_tag_or_branch_is_taken_from_the_spec(hub: Hub) -> None:
    hub.repositories["org/model"] = StandInRepository(FILES, branches=("v2",))
    assert resolve("org/model@v2").revision == hub.repositories["org/model"].commit
    assert "has no revision 'v3'" in refused(DataError, "org/model@v3").message


def test_progress_goes_through_report_in_bytes(
    hub: Hub, told: Told, capfd: pytest.CaptureFixture[str]
) -> None:
    resolve("org/model")
    total = sum(len(FILES[name]) for name in WANTED)
    assert told.texts == [("info", f"fetching org/model from {hub.url}: 5 files, {total / 1e9:.2f} GB")]
    assert told.steps[-1:] == [("download org/model", float(total), float(total))]
    done = [step[1] for step in told.steps]
    assert done == sorted(set(done))
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_broken_connection_is_resumed_where_it_broke(hub: Hub) -> None:
    large = {**FILES, "model.safetensors": tensors(3_000_000)}
    hub.repositories["org/model"] = StandInRepository(large)
    hub.breaks["model.safetensors"] = [11 * 2**20]
    assert contents(resolve("org/model"))["model.safetensors"] == large["model.safetensors"]
    assert hub.ranges == [f"bytes={10 * 2**20}-"]  # huggingface_hub writes 10 MiB at a time


def test_an_interrupt_ends_a_long_download_soon(hub: Hub) -> None:
    large = {**FILES, "model.safetensors": tensors(16 * 2**20)}
    hub.repositories["org/model"] = StandInRepository(large)
    hub.seconds_per_mebibyte = 0.1
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        resolve("org/model")
    assert time.monotonic() - started < 4  # the whole takes more than 6
    hub.seconds_per_mebibyte = 0
    assert contents(resolve("org/model"))["model.safetensors"] == large["model.safetensors"]


def test_half_downloaded_keeps_finished_files_and_goes_on(hub: Hub) -> None:
    hub.breaks["model.safetensors"] = [0] * 9  # more than huggingface_hub tries in one run
    error = refused(MissingToolError, "org/model")
    assert (error.code, error.hint[:39]) == (3, "run it again: finished files are kept; ")
    offline = refused(DataError, "org/model", offline=True)
    assert offline.message == "org/model: the copy in the cache is incomplete: model.safetensors"
    plan = resolve("org/model", fetch=False)
    assert plan.directory is None
    assert "unknown until fetched" in str(plan.problems[0])
    hub.breaks.clear()
    hub.requests.clear()
    assert contents(resolve("org/model")) == {name: FILES[name] for name in WANTED}
    assert hub.downloads() == ["model.safetensors"]


def test_a_hub_that_is_down_is_named(hub: Hub) -> None:
    hub.down = 503
    error = refused(MissingToolError, "org/model")
    assert error.message.startswith(f"the hub at {hub.url} cannot be reached or broke off: ")


def test_a_hub_that_is_down_is_replaced_by_a_whole_copy(hub: Hub, told: Told) -> None:
    base = resolve("org/model")
    hub.down = 503
    assert resolve("org/model") == base
    copy = f"the copy of org/model here (commit {str(base.revision)[:12]})"
    assert told.texts[1:] == [("warning", f"the hub cannot be reached; using {copy}")]


def test_nothing_listens(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused(MissingToolError, "org/model")
    assert "http://127.0.0.1:9 cannot be reached" in error.message
    assert "HF_ENDPOINT" in error.hint


def test_gated_says_where_to_accept_and_a_token_opens_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["meta/gated"] = StandInRepository(FILES, gated=True)
    hub.accepted.add("good")
    error = refused(DataError, "meta/gated")
    assert error.message == "meta/gated is gated: its licence must be accepted first"
    assert error.hint == f"accept it at {hub.url}/meta/gated, then set HF_TOKEN or run `hf auth login`"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refused(DataError, "meta/gated").message == error.message
    monkeypatch.setenv("HF_TOKEN", "good")
    assert contents(resolve("meta/gated"))["config.json"] == FILES["config.json"]


def test_private_or_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/private"] = StandInRepository(FILES, private=True)
    hub.accepted.add("good")
    for spec in ("org/private", "org/nothing"):
        error = refused(DataError, spec)
        assert error.message == f"{spec}: the hub has no such model, or it is private"
        assert "did you mean a directory?" in error.hint
    monkeypatch.setenv("HF_TOKEN", "good")
    assert resolve("org/private").revision


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.bin": b""}, "only pickled PyTorch weights (.bin, .pth) are there; safetensors are needed"),
        ({"m.gguf": b""}, "only GGUF files are there; a base must be an original checkpoint"),
        ({"README.md": b""}, "no weights in safetensors are there; a base must be an original checkpoint"),
    ],
)  # fmt: skip
def test_a_repository_without_weights_is_refused_before_the_download(
    hub: Hub, files: dict[str, bytes], message: str
) -> None:
    hub.repositories["org/bad"] = StandInRepository({"config.json": b"{}", **files})
    assert refused(DataError, "org/bad").message == f"org/bad: {message}"
    assert hub.downloads() == []


def test_no_disk_space_is_said_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=600 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    resolve("org/model")
    hub.repositories["org/model"] = StandInRepository({**FILES, "model.safetensors": tensors(70_016)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full._replace(free=512 * 2**20))
    hub.requests.clear()
    error = refused(StageError, "org/model")
    assert error.message.startswith("no disk space for org/model: 0.00 GB to download, 0.54 GB free in ")
    assert hub.downloads() == []


def test_offline_and_plan_ask_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = resolve("org/model", fetch=False)
    assert (plan.directory, plan.revision) == (None, None)
    assert [str(problem) for problem in plan.problems] == ["base: org/model: unknown until fetched"]
    assert "the hub may not be asked (offline)" in refused(DataError, "org/model", offline=True).message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "the hub may not be asked (offline)" in refused(DataError, "org/model").message
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetched = resolve("org/model")
    hub.requests.clear()
    assert resolve("org/model", fetch=False) == resolve("org/model", offline=True) == fetched
    assert hub.requests == []


def test_an_adapter_is_resolved_the_same_way(hub: Hub) -> None:
    files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": tensors(),
        "training_args.bin": b"never",
    }
    hub.repositories["org/adapter"] = StandInRepository(files)
    assert set(contents(resolve("org/adapter"))) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_data_set_brings_its_data_files(hub: Hub) -> None:
    files = {"data/train.jsonl": b"{}\n", "README.md": b"", "image.png": b"never", "load.py": b"never"}
    hub.repositories["datasets/org/rows"] = StandInRepository(files)
    directory = fetch_dataset("org/rows")
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert found == {"data/train.jsonl", "README.md"}
    hub.repositories["datasets/org/images"] = StandInRepository({"image.png": b""})
    with pytest.raises(DataError, match="org/images: no data there as"):
        fetch_dataset("org/images")


def test_headers_are_read_without_the_weights(hub: Hub) -> None:
    many = {"model.safetensors": tensors(1_000_000)}
    hub.repositories["org/large"] = StandInRepository({**FILES, **many})
    base, headers = resolve_headers("org/large")
    assert set(contents(base)) == WANTED - {"model.safetensors"}
    assert [(name, spec.dtype, spec.shape, spec.bytes) for name, spec in headers.items()] == [
        ("w", "F32", (1_000_000,), 4_000_000)
    ]
    assert hub.ranges == ["bytes=0-100000"]
    assert resolve("org/large", fetch=False).directory is None
    whole = resolve("org/large")
    assert contents(whole)["model.safetensors"] == many["model.safetensors"]
    hub.requests.clear()
    here, local = resolve_headers("org/large", revision=whole.revision)
    assert (here, {name: spec.bytes for name, spec in local.items()}) == (whole, {"w": 4_000_000})
    assert hub.requests == []


def test_headers_that_are_none(hub: Hub) -> None:
    hub.repositories["org/bad"] = StandInRepository({**FILES, "model.safetensors": b"PK" * 99})
    with pytest.raises(DataError, match=r"^org/bad: model\.safetensors is not a safetensors file"):
        resolve_headers("org/bad")


def test_something_that_is_no_id(hub: Hub) -> None:
    assert (
        refused(DataError, "what is this?").message == "'what is this?' is neither a directory nor a hub id"
    )
    assert hub.requests == []


def test_a_ships_base_stays_at_the_commit_of_its_last_ship(hub: Hub, tmp_path: Path) -> None:
    """A hub name without revision: what was trained on once is what the next ship finds."""
    files = {path.name: path.read_bytes() for path in (BUILTIN / "tiny").iterdir() if path.is_file()}
    hub.repositories["org/chat"] = StandInRepository(files)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mini\nbase: org/chat\ndata: {source: builtin:yoda}\n")

    def resolved(pins: Pins) -> str | None:
        place = Store(tmp_path / "home"), tmp_path / "runs" / "mini"
        return resolve_recipe(load(recipe), *place, pins=pins).base.revision

    before = resolved(Pins())
    assert before == hub.repositories["org/chat"].commit
    hub.repositories["org/chat"] = StandInRepository({**files, "README.md": b"moved on"})
    assert resolved(Pins("org/chat", before)) == before
    assert resolved(Pins("org/other", before)) not in (None, before)


def test_a_ships_data_set_stays_at_the_commit_of_its_last_ship(hub: Hub, tmp_path: Path) -> None:
    """As a base does; a revision in the recipe stands over it, and pins nothing."""
    row = b'{"prompt": "a", "completion": "b"}\n'
    hub.repositories["datasets/org/rows"] = StandInRepository({"train.jsonl": row})
    recipe = tmp_path / "recipe.yaml"

    def resolved(source: str, pins: Pins) -> Pins:
        recipe.write_text(f"name: mini\nbase: builtin:tiny\ndata: {{source: {source}}}\n")
        place = Store(tmp_path / "home"), tmp_path / "runs" / "mini"
        return resolve_recipe(load(recipe), *place, pins=pins).pins()

    first = resolved("org/rows", Pins())
    assert first.data == {"org/rows": hub.repositories["datasets/org/rows"].commit}
    hub.repositories["datasets/org/rows"] = StandInRepository({"train.jsonl": row * 2})
    assert resolved("org/rows", first) == first
    assert resolved("org/rows", Pins()).data != first.data
    assert resolved("org/rows@main", first).data == {}
