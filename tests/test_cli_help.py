"""What every command says of itself, how fast, and what it does not load. Style rows 2 and 3."""

from __future__ import annotations

import errno
import json
import re
import sys
from pathlib import Path

import click
import pytest

from forge import process
from forge.cli import main as entry
from tests.conftest import ROOT

PARTS = ("adapters list", "adapters merge")
"""Commands of a group, which has no options itself."""
FORGE = [sys.executable, "-m", "forge"]
NOT_LOADED = {
    "torch", "numpy", "pydantic", "httpx", "rich", "transformers", "huggingface_hub", "jinja2", "tokenizers",
    "ruamel", "psutil", "xllamacpp", "llama_cpp", "asyncio", "http", "urllib.request",
}  # fmt: skip


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a command imports."""
    finished = process.run([sys.executable, "-X", "importtime", "-m", "forge", *arguments])
    assert finished.status == 0, finished.output
    return set(re.findall(r"^import time:.*\| +(\S+)$", finished.output, re.MULTILINE))


@pytest.mark.programs
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("ship", "--help")], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert "forge.cli.main" in loaded
    assert {name for name in loaded if name in NOT_LOADED or name.partition(".")[0] in NOT_LOADED} == set()


@pytest.mark.programs
def test_reading_commands_load_no_training_stack(forge_home: Path) -> None:
    loaded = loaded_by("runs")
    assert {"torch", "numpy", "transformers", "rich"} & loaded == set()


def test_every_command_has_its_file_and_its_file_is_thin() -> None:
    # `import` is a word of Python's: its file has an underscore behind it.
    stems = {path.stem for path in (ROOT / "forge" / "cli").glob("*.py")}
    files = {stem if stem == "__init__" else stem.rstrip("_") for stem in stems}
    assert files == {*entry.COMMANDS, "__init__", "main", "options", "stage_of"}
    for name in entry.COMMANDS:
        stem = name if name in stems else f"{name}_"
        text = (ROOT / "forge" / "cli" / f"{stem}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 100 and "open(" not in text.replace("open_store(", ""), name


@pytest.mark.parametrize("name", sorted({*entry.COMMANDS, *PARTS} - {"adapters"}))
def test_the_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run_command([*name.split(), "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"Usage: forge {name} ")
    for option in ("-v", "--offline", "--json", "--help"):
        assert re.search(rf"^  (-h, )?{option} ", shown.out, re.MULTILINE), option
    assert shown.err == ""


def test_every_option_and_argument_is_explained() -> None:
    group = entry.forge
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None and (command.help or command.short_help), name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help or parameter.hidden, f"{name} {parameter.name}"
            elif parameter.human_readable_name not in ("RECIPE",):
                assert parameter.human_readable_name in str(command.help), f"{name} {parameter.name}"


def test_the_first_page_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run_command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^  ([a-z]+) {2,}\S", shown.partition("Commands:")[2], re.MULTILINE) == list(
        entry.COMMANDS
    )


def test_no_command_shows_the_first_page_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run_command([]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("Usage: forge [OPTIONS] COMMAND") and "error" not in shown.err
    assert shown.out == ""


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run_command(["--version"]) == 0
    [declared] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert capsys.readouterr().out == f"forge {declared}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shipp"], "No such command 'shipp'."),
        (["ship"], "Missing argument 'RECIPE'."),
        (["ship", "r.yaml", "--fast"], "No such option '--fast'."),
        (["runs", "much"], "Got unexpected extra argument (much)"),
        (["serve", "x.gguf", "--port", "70000"], "Invalid value for '--port': 70000 is not in the range"),
        (["chat", "x.gguf", "--context", "many"], "Invalid value for '--context': 'many' is not a valid"),
        (["export"], "give a RECIPE, or --out with one of --base and --gguf"),
        (["validate", "--base", "."], "give a RECIPE, or both --base and --adapter"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run_command([*arguments, "--json"]) == 2
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert error["message"].startswith(message)
    assert error["code"] == 2 and error["hint"].startswith("see: forge ") and error["problems"] == []
    assert shown.err.splitlines()[0].startswith(f"error: {message}")


def test_a_bug_is_exit_1_with_its_traceback_at_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("forge.commands.describe.describe_runs", broken)
    assert entry.run_command(["runs"]) == 1
    assert capsys.readouterr().err == (
        "error: a bug in forge: ZeroDivisionError: oh\n"
        "hint: run it again with -v for the traceback, and please report it\n"
    )
    assert entry.run_command(["runs", "-v", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == 1
    assert "Traceback (most recent call last)" in shown.err


def test_a_full_disk_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/manifest.json")

    monkeypatch.setattr("forge.commands.describe.describe_runs", full)
    assert entry.run_command(["runs"]) == 4
    said = capsys.readouterr().err
    assert "error: the disk is full: runs/a/manifest.json could not be written\n" in said
    assert "forge gc" in said and "bug" not in said


def test_a_file_in_the_way_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("forge.commands.describe.describe_runs", tmp_path.read_bytes)
    assert entry.run_command(["runs"]) == 4
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: is a directory\n")


@pytest.mark.programs
def test_a_reader_that_goes_away_is_no_bug(forge_home: Path) -> None:
    finished = process.run(["sh", "-c", f"{sys.executable} -m forge runs 2>&1 >&3 3>&- | cat"])
    assert "Traceback" not in finished.output
    line = f"({sys.executable} -m forge --help; echo status $? >&2) 2>&1 >/dev/full | cat"
    assert "Traceback" not in process.run(["sh", "-c", line]).output
