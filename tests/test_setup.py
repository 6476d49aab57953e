"""`forge setup`: the pinned converters, whole and from the pinned archive alone."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from forge.cli.main import run_command
from forge.errors import DataError, MissingToolError
from forge.export.compiled import library_file
from forge.tools import llama_cpp
from tests.conftest import SESSION_HOME, tree

ARCHIVE = SESSION_HOME / "downloads" / f"llama_cpp_python-{llama_cpp.VERSION}.tar.gz"


def wanted_in(archive: Path) -> set[str]:
    """The files of the archive that belong to the converters, told by tarfile."""
    inside = f"llama_cpp_python-{llama_cpp.VERSION}/vendor/llama.cpp/"
    parts = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "LICENSE", "conversion/", "gguf-py/")
    with tarfile.open(archive) as tar:
        names = {member.name.removeprefix(inside) for member in tar if member.isfile()}
    return {name for name in names if name.startswith(parts)}


@pytest.mark.programs
def test_the_converters_are_unpacked_whole_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """N1, N2: the scripts, their modules and the tree's own gguf-py; pitfall 60: one pinned commit."""
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))
    assert run_command(["setup", "--from", str(ARCHIVE), "--json"]) == 0
    directory = tmp_path / "home" / "tools" / f"llama.cpp-{llama_cpp.LLAMA_CPP_COMMIT}"
    kernels = library_file(directory.parent)
    told = {"ready": True, "converters": str(directory), "kernels": str(kernels)}
    assert json.loads(capsys.readouterr().out) == told
    files = {name for name, content in tree(directory).items() if content is not None}
    assert files == wanted_in(ARCHIVE)
    assert {*directory.parent.iterdir()} == {directory, kernels}, "scratch is left"
    assert llama_cpp.find_converters(tmp_path / "home") == directory
    # The second time nothing is needed, and nothing changes.
    before = tree(directory)
    assert run_command(["setup", "--from", str(tmp_path / "no archive"), "--json"]) == 0
    assert tree(directory) == before


def test_half_a_directory_of_an_older_setup_is_replaced(tmp_path: Path) -> None:
    directory = llama_cpp.converters_directory(tmp_path)
    directory.mkdir(parents=True)
    (directory / "half").write_text("")
    with pytest.raises(MissingToolError, match="not here yet") as caught:
        llama_cpp.find_converters(tmp_path)
    assert caught.value.hint == "run: forge setup"
    assert llama_cpp.install_converters(tmp_path, ARCHIVE) == directory
    assert not (directory / "half").exists() and (directory / llama_cpp.CONVERT_SCRIPT).is_file()


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.tar.gz"
    other.write_bytes(ARCHIVE.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match=r"is not the source archive of llama-cpp-python") as caught:
        llama_cpp.install_converters(tmp_path / "home", other)
    assert caught.value.hint == f"expected {llama_cpp.SDIST_SHA256}"
    with pytest.raises(DataError, match="does not exist"):
        llama_cpp.install_converters(tmp_path / "home", tmp_path / "none.tar.gz")
    assert tree(tmp_path / "home") == {"tools": None}


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(DataError, match="cannot be written: ") as caught:
        llama_cpp.install_converters(tmp_path / "home", ARCHIVE)
    assert "FORGE_HOME" in caught.value.hint


@pytest.mark.programs
def test_without_a_network_it_says_how_to_bring_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(MissingToolError, match=r"pip could not fetch llama-cpp-python .*: ERROR: ") as caught:
        llama_cpp.install_converters(tmp_path / "home")
    assert "forge setup --from FILE" in caught.value.hint and caught.value.code == 3
    assert tree(tmp_path / "home") == {"tools": None}
