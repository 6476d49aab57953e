"""`forge bundle`: one archive, the same bytes each time, that answers in a container without network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge import process, report
from forge.commands.bundle import _licence, _smoke, bundle
from forge.errors import DataError, MissingToolError, RecipeError
from forge.runs.manifest import BaseMade, Manifest
from forge.serve.bundle import Contents, write_bundle
from forge.tools.native import libraries
from tests.docker_daemon import load_image
from tests.servers import llama_server
from tests.tiny_gguf import REPLY, write_tiny_gguf

QUESTION = "There is bacon in this sandwich."


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    model = write_tiny_gguf(tmp_path / "yoda.gguf")
    modelfile = tmp_path / "Modelfile"
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


@pytest.mark.programs
def test_holds_the_model_the_server_and_how_to_start_it(contents: Contents, tmp_path: Path) -> None:
    """R5, U: GGUF, Modelfiles, start script, licence, checksums, smoke test; the same bytes again."""
    out = tmp_path / "out" / "yoda.tar"
    size = write_bundle(contents, out, program="/bin/ls")
    assert size == out.stat().st_size
    again = tmp_path / "again.tar"
    write_bundle(contents, again, program="/bin/ls")
    assert again.read_bytes() == out.read_bytes()
    root = _unpacked(out, tmp_path / "there")
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    native = {f"linux/lib/{name}" for name in libraries(Path("/bin/ls"))}
    assert found == native | {
        "yoda.gguf", "Modelfile", "linux/llama-server", "start.sh", "smoke.sh", "smoke.json", "smoke.expect",
        "README.txt", "LICENCES.txt", "SHA256SUMS",
    }  # fmt: skip
    assert (root / "yoda.gguf").read_bytes() == contents.model.read_bytes()
    assert os.access(root / "start.sh", os.X_OK)
    started = (root / "start.sh").read_text()
    assert '--model "$here/yoda.gguf" --alias yoda --ctx-size 1024 --parallel 1' in started
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
    for name in found - {"SHA256SUMS"}:
        assert sums[name] == hashlib.sha256((root / name).read_bytes()).hexdigest()
    assert process.run([str(root / "smoke.sh"), "files"]).output == "files: as they were packed"
    (root / "smoke.json").write_text("{}")
    assert process.run([str(root / "smoke.sh"), "files"]).status != 0
    assert not list(out.parent.glob(".*"))


@pytest.mark.programs
def test_smoke_test_without_sha256sum(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has shasum; the README promises the test to no other system than these two."""
    if not shutil.which("shasum"):
        pytest.skip("there is no shasum (Perl's)")
    write_bundle(contents, tmp_path / "yoda.tar", program="/bin/ls")
    root = _unpacked(tmp_path / "yoda.tar", tmp_path / "there")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "dirname", "shasum", "perl"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    assert process.run([str(root / "smoke.sh"), "files"]).output == "files: as they were packed"
    (root / "smoke.json").write_text("{}")
    assert process.run([str(root / "smoke.sh"), "files"]).status != 0
    assert "./smoke.sh files checks the files on macOS too" in (root / "README.txt").read_text()


_OPENER = r"""
#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(void) {  /* as ggml looks for its backends: by name, beside the running program */
    char self[4096] = {0}, path[8192];
    if (readlink("/proc/self/exe", self, sizeof self - 1) < 0) return 1;
    *strrchr(self, '/') = 0;
    DIR *directory = opendir(self);
    for (struct dirent *one; (one = readdir(directory));) {
        if (strncmp(one->d_name, "libggml-", 8)) continue;
        snprintf(path, sizeof path, "%s/%s", self, one->d_name);
        void *backend = dlopen(path, RTLD_NOW);
        int (*score)(void) = backend ? (int (*)(void))dlsym(backend, "score") : NULL;
        printf("%s %s\n", one->d_name, score ? "answers" : dlerror());
    }
    return 0;
}
"""


def _compiled(source: str, out: Path, *flags: str) -> Path:
    file = out.with_suffix(".c")
    file.write_text(source)
    finished = process.run(["gcc", "-fPIC", str(file), "-o", str(out), *flags])
    assert finished.status == 0, finished.output
    return out


@pytest.mark.programs
@pytest.mark.parametrize("below", [".", "ggml/backends"])
def test_backends_that_are_opened_by_name_come_with_all_that_they_need(
    contents: Contents, tmp_path: Path, below: str
) -> None:
    """What ldd does not name: libggml-cpu-*.so, and the libraries of those; one without its driver stays."""
    built, elsewhere = tmp_path / "built", tmp_path / "elsewhere"
    backends = built / below
    for directory in (backends, elsewhere):
        directory.mkdir(parents=True, exist_ok=True)
    needed = ("-shared", f"-L{elsewhere}", f"-Wl,-rpath,{elsewhere}")
    _compiled("int best(void) { return 1; }", elsewhere / "libmath.so", "-shared")
    driver = _compiled("int device(void) { return 1; }", elsewhere / "libdriver.so", "-shared")
    uses = "int {0}(void); int score(void) {{ return {0}(); }}"
    _compiled(uses.format("best"), backends / "libggml-cpu-x.so", *needed, "-lmath")
    _compiled(uses.format("device"), backends / "libggml-gpu.so", *needed, "-ldriver")
    driver.unlink()
    program = _compiled(_OPENER, built / "llama-server", "-ldl")
    said = io.StringIO()
    with report.copied_to(said):
        write_bundle(contents, tmp_path / "b.tar", program=str(program))
    assert re.search(r"left out .*libggml-gpu\.so needs libdriver\.so, which is not here", said.getvalue())
    shutil.rmtree(built)
    shutil.rmtree(elsewhere)
    root = _unpacked(tmp_path / "b.tar", tmp_path / "there")
    assert process.run([str(root / "start.sh")]).output == "libggml-cpu-x.so answers"


@pytest.mark.programs
def test_what_cannot_be_packed_is_said_and_leaves_nothing(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"a bundle is a \.tar or \.tar\.gz file"):
        write_bundle(contents, tmp_path / "yoda.zip")
    with pytest.raises(MissingToolError, match="no program /nowhere/llama-server to put into"):
        write_bundle(contents, tmp_path / "yoda.tar", program="/nowhere/llama-server")
    text = tmp_path / "text"
    text.write_text("#!/bin/sh\n")
    text.chmod(0o755)
    with pytest.raises(DataError, match="no Linux program with shared libraries"):
        write_bundle(contents, tmp_path / "yoda.tar", program=str(text))

    def none() -> None:
        raise MissingToolError("this processor lacks avx2")

    monkeypatch.setattr("forge.tools.xllamacpp.check", none)
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
@pytest.mark.parametrize(
    ("server", "expect"),
    [("program", "In this sandwich"), ("program", "something else"), ("wheel", "In this sandwich")],
)
def test_answers_in_a_clean_container_without_network(
    docker_daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, expect: str
) -> None:
    """R5: nothing but a shell is there, no network, nothing can be written; the smoke test passes.

    With a llama-server program, and with the server that the wheel carries, as after `make ship`.
    """
    import forge.commands.bundle

    monkeypatch.setattr(forge.commands.bundle, "_smoke", lambda manifest: (QUESTION, expect))
    model = write_tiny_gguf(tmp_path / "yoda.gguf")
    program = str(llama_server()) if server == "program" else None
    fields = bundle(str(model), tmp_path / "yoda.tar.gz", program, context=1024)
    assert fields == {"bundle": str(tmp_path / "yoda.tar.gz"), "bytes": fields["bytes"]}
    root = _unpacked(tmp_path / "yoda.tar.gz", tmp_path / "there")
    busybox = Path("/bin/busybox")
    words = ("sh", "cat", "dirname", "sha256sum", "sleep", "wget")
    load_image(docker_daemon, "clean:1", {f"bin/{word}": busybox for word in words}, ["ENV PATH=/bin"])
    container = docker_daemon.containers.run(
        "clean:1",
        ["sh", "-c", "/bundle/start.sh 2>/dev/null & /bundle/smoke.sh"],
        detach=True, network_mode="none", read_only=True, cap_drop=["ALL"], user="10001:10001",
        volumes={str(root): {"bind": "/bundle", "mode": "ro"}},
    )  # fmt: skip
    try:
        status = container.wait(timeout=120)["StatusCode"]
        said = container.logs().decode()
    finally:
        container.remove(force=True)
    first, answer, last = said.strip().splitlines()
    assert first == "files: as they were packed"
    assert json.loads(answer)["choices"][0]["message"]["content"] == REPLY
    if expect in REPLY:
        assert (status, last) == (0, "smoke test: passed")
    else:
        assert (status, last) == (1, "smoke test: the answer is not the expected one")
