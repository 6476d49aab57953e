"""`forge bundle`: one archive, the same bytes each time, that answers in a container without network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge import process
from forge.commands.bundle import _licence, _smoke, bundle
from forge.errors import MissingToolError, RecipeError
from forge.runs.manifest import BaseMade, Manifest
from forge.serve import bundle_python
from forge.serve.bundle import Contents, write_bundle
from forge.tools.native import libraries
from tests.docker_daemon import load_image
from tests.tiny_gguf import REPLY, write_tiny_gguf

QUESTION = "There is bacon in this sandwich."


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return _contents(tmp_path)


def _contents(place: Path) -> Contents:
    model = write_tiny_gguf(place / "yoda.gguf")
    modelfile = place / "Modelfile"
    modelfile.write_text("FROM ./yoda.gguf\n")
    files = {"Modelfile": modelfile}
    return Contents("yoda", model, 1024, "yoda.gguf: apache-2.0", QUESTION, "In this sandwich", files)


def _unpacked(archive: Path, where: Path) -> Path:
    with tarfile.open(archive) as opened:
        opened.extractall(where, filter="data")
    return where / "yoda"


@pytest.mark.parametrize("name", ["$(id).gguf", 'a".gguf', "a\nb.gguf", "`id`.gguf"])
def test_a_name_that_a_script_would_run_is_refused(name: str, contents: Contents, tmp_path: Path) -> None:
    model = contents.model.rename(tmp_path / name)
    with pytest.raises(RecipeError, match="a start script cannot say this name"):
        write_bundle(replace(contents, model=model), tmp_path / "out.tar")
    assert not list(tmp_path.glob("*out.tar*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, packed once for the tests that only look at it."""
    place = tmp_path_factory.mktemp("bundle")
    write_bundle(_contents(place), place / "yoda.tar")
    return place / "yoda.tar"


def test_packed_again_later_it_is_the_same_bytes(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_python, "files", lambda settings: ({}, "ld.so"))
    write_bundle(contents, tmp_path / "now.tar.gz")
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 1000)
    write_bundle(contents, tmp_path / "later.tgz")
    assert (tmp_path / "now.tar.gz").read_bytes() == (tmp_path / "later.tgz").read_bytes()
    assert (_unpacked(tmp_path / "later.tgz", tmp_path) / "yoda.gguf").is_file()


@pytest.mark.programs
def test_holds_the_model_the_server_and_how_to_start_it(
    made: Path, contents: Contents, tmp_path: Path
) -> None:
    """R5, U: GGUF, Modelfiles, start script, licence, checksums, smoke test; the same bytes again."""
    again = tmp_path / "out" / "again.tar"
    size = write_bundle(contents, again)
    assert size == again.stat().st_size
    assert again.read_bytes() == made.read_bytes()
    assert not list(again.parent.glob(".*"))
    root = _unpacked(made, tmp_path / "there")
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {name for name in present if not name.startswith("linux/lib/")} == {
        "yoda.gguf", "Modelfile", "linux/bin/python3", "linux/serve.py", "start.sh", "smoke.sh", "smoke.json",
        "smoke.expect", "README.txt", "LICENCES.txt", "SHA256SUMS",
    }  # fmt: skip
    assert {f"linux/lib/{name}" for name in libraries(Path(sys.executable).resolve())} <= present
    assert (root / "yoda.gguf").read_bytes() == contents.model.read_bytes()
    assert os.access(root / "start.sh", os.X_OK)
    assert [line for line in (root / "README.txt").read_text().splitlines() if "yoda.gguf" in line] == [
        "  llama.cpp's own release: llama-server -m yoda.gguf -c 1024",
        "  LM Studio: lms import --user-repo forge/yoda yoda.gguf",
    ]
    assert "ollama create yoda -f Modelfile; ollama run yoda" in (root / "README.txt").read_text()
    assert "Modelfile.jinja" not in (root / "README.txt").read_text()  # there is none in this bundle
    assert "apache-2.0" in (root / "LICENCES.txt").read_text()
    assert "MIT licence" in (root / "LICENCES.txt").read_text()
    lines = (root / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    for name in present - {"SHA256SUMS"}:
        assert sums[name] == hashlib.sha256((root / name).read_bytes()).hexdigest()
    assert process.run([str(root / "smoke.sh"), "files"]).output == "files: as they were packed"
    (root / "smoke.json").write_text("{}")
    assert process.run([str(root / "smoke.sh"), "files"]).status != 0


@pytest.mark.programs
def test_smoke_test_without_sha256sum(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has shasum; the README promises the test to no other system than these two."""
    if not shutil.which("shasum"):
        pytest.skip("there is no shasum (Perl's)")
    root = _unpacked(made, tmp_path / "there")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "dirname", "shasum", "perl"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    assert process.run([str(root / "smoke.sh"), "files"]).output == "files: as they were packed"
    (root / "smoke.json").write_text("{}")
    assert process.run([str(root / "smoke.sh"), "files"]).status != 0
    assert "./smoke.sh files checks the files on macOS too" in (root / "README.txt").read_text()


@pytest.mark.programs
def test_what_cannot_be_packed_is_said_and_leaves_nothing(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"a bundle is a \.tar or \.tar\.gz file"):
        write_bundle(contents, tmp_path / "yoda.zip")

    def none() -> None:
        raise MissingToolError("this processor lacks avx2")

    monkeypatch.setattr("forge.tools.xllamacpp.check_processor", none)
    with pytest.raises(MissingToolError, match="lacks avx2"):
        write_bundle(contents, tmp_path / "yoda.tar")
    assert not list(tmp_path.glob("*.tar*"))
    assert not list(tmp_path.glob(".*"))


def test_smoke_question_is_one_that_the_run_answered() -> None:
    def asked(*rows: tuple[str, str, bool]) -> Manifest:
        told = [{"prompt": prompt, "answer": answer, "ok": ok} for prompt, answer, ok in rows]
        return Manifest(facts={"smoke": {"smoke": told}})

    assert _smoke(Manifest()) == ("Hello!", "")
    assert _smoke(asked(("a", "wrong", False), ("b", "right, it is", True))) == ("b", "right, it is")
    assert _smoke(asked(("a", '"quoted"', True))) == ("Hello!", "")
    assert _smoke(asked(("a", "x" * 99 + "\n", True))) == ("a", "x" * 40)


def test_licence_is_the_bases_or_the_files(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "m.gguf")
    assert _licence(Manifest(), model) == "m.gguf: its licence is not known; ask whoever made the base"
    known = Manifest(base=BaseMade(licence="mit", spec="microsoft/Phi-3"))
    assert _licence(known, model) == "m.gguf, made from microsoft/Phi-3: mit"


@pytest.mark.docker
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_answers_in_a_clean_container_without_network(
    docker_daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R5: nothing but a shell is there, no network, nothing can be written; the smoke test passes.

    And it fails where the answer is not the expected one.
    """
    import forge.commands.bundle

    monkeypatch.setattr(forge.commands.bundle, "_smoke", lambda manifest: (QUESTION, "In this sandwich"))
    model = write_tiny_gguf(tmp_path / "yoda.gguf")
    fields = bundle(str(model), tmp_path / "yoda.tar.gz", context=1024)
    assert fields == {"bundle": str(tmp_path / "yoda.tar.gz"), "bytes": fields["bytes"]}
    root = _unpacked(tmp_path / "yoda.tar.gz", tmp_path / "there")
    busybox = Path("/bin/busybox")
    words = ("sh", "cat", "dirname", "sha256sum", "sleep", "wget")
    load_image(docker_daemon, "clean:1", {f"bin/{word}": busybox for word in words}, ["ENV PATH=/bin"])

    def smoke() -> tuple[int, list[str]]:
        container = docker_daemon.containers.run(
            "clean:1",
            ["sh", "-c", "/bundle/start.sh 2>/dev/null & /bundle/smoke.sh 2>&1"],
            detach=True, network_mode="none", read_only=True, cap_drop=["ALL"], user="10001:10001",
            volumes={str(root): {"bind": "/bundle", "mode": "ro"}},
        )  # fmt: skip
        try:
            return container.wait(timeout=120)["StatusCode"], container.logs().decode().strip().splitlines()
        finally:
            container.remove(force=True)

    status, (files, answer, verdict) = smoke()
    assert (status, files, verdict) == (0, "files: as they were packed", "smoke test: passed")
    assert json.loads(answer)["choices"][0]["message"]["content"] == REPLY
    (root / "smoke.expect").write_text("something else")
    sums = (root / "SHA256SUMS").read_text().splitlines(keepends=True)
    (root / "SHA256SUMS").write_text("".join(line for line in sums if "smoke.expect" not in line))
    status, lines = smoke()
    assert (status, lines[-1]) == (1, "smoke test: the answer is not the expected one")
