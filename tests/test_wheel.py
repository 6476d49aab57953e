"""The package without a clone: a wheel is built, installed into an empty environment, and used from there.

The empty environment gets forge and its base dependencies by pip (some 100 MB; from the directory
FORGE_TEST_WHEELS where that is set). The training stack is too large to install once more: for the
ship, the development environment's packages are put behind the new environment's own, so forge
comes from the wheel and torch and its kin from there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from forge import process
from forge.model.gguf_header import read_gguf
from forge.serve.client import Client, find
from tests.conftest import ROOT, link_converters
from tests.shipping import PURE, STAGES, Workshop
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [
    pytest.mark.programs,
    pytest.mark.network,
    pytest.mark.training,
    pytest.mark.timeout(1500),
]


def do(*command: str | Path, directory: Path, **environment: str) -> process.Finished:
    finished = process.run(list(map(str, command)), directory=directory, environment=environment)
    assert finished.status == 0, finished.output
    return finished


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    isolated = [] if importlib.util.find_spec("hatchling") is None else ["--no-isolation"]
    do(sys.executable, "-m", "build", "--wheel", *isolated, "--outdir", out, ROOT, directory=out)
    [made] = out.glob("*.whl")
    return made


@dataclass(frozen=True)
class Installed(Workshop):
    """A workshop whose forge is that of an environment of its own."""

    environment: Path = Path()

    @property
    def program(self) -> Path:
        return self.environment / "bin" / "forge"

    @property
    def command(self) -> list[str]:
        return [str(self.program)]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    root = tmp_path_factory.mktemp("installed")
    environment, directory = root / "venv", root / "work"
    directory.mkdir()
    do(sys.executable, "-m", "venv", environment, directory=root)
    wheels = os.environ.get("FORGE_TEST_WHEELS")
    options = ["--find-links", wheels] if wheels else []
    do(environment / "bin" / "pip", "install", "--quiet", *options, wheel, directory=root)
    yield Installed(directory, link_converters(root / "home"), environment)


def test_the_wheel_holds_the_package_and_what_ships_with_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    [information] = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "forge").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for shipped in ("templates", "docker"):
        files = [path for path in (ROOT / shipped).rglob("*") if path.is_file()]
        expected |= {f"forge/_shipped/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert {name for name in names if not name.startswith(information)} == expected
    for needed in (
        "model/builtin/tiny/model.safetensors",
        "data/builtin/yoda.jsonl",
        "ship/page.html.jinja",
        "stages/verify.html.jinja",
    ):
        assert f"forge/{needed}" in names
    assert f"{information}/licenses/LICENSE" in names
    assert not any(name.startswith("tests") for name in names)


def test_it_works_without_the_training_stack(installed: Installed) -> None:
    """`init`, `plan`, `serve`, `generate` and `chat`; a ship says what is missing before it starts."""
    # Without the remark that pip has a newer version, which stands behind the JSON.
    pip = (installed.environment / "bin" / "pip", "--disable-pip-version-check", "list", "--format=json")
    packages = json.loads(do(*pip, directory=installed.directory).output)
    assert not {"torch", "transformers", "numpy", "gguf"} & {package["name"] for package in packages}
    [declared] = {package["version"] for package in packages if package["name"] == "forge-ship"}
    version = do(installed.program, "--version", directory=installed.directory)
    assert version.output == f"forge {declared}"

    assert installed.forge("init").fields["path"] == "quickstart.yaml"
    planned = installed.forge("plan", "quickstart.yaml")
    assert planned.code == 0
    assert [stage["name"] for stage in planned.fields["stages"]] == list(STAGES)
    error = installed.forge("ship", "quickstart.yaml")
    assert error.code == 3 and "pip install 'forge-ship[train]'" in error.fields["error"]["hint"]
    assert not (installed.directory / "runs").exists()

    model = write_tiny_gguf(installed.directory / "tiny.gguf")
    with installed.start("serve", str(model), "--port", "0", "--json") as child:
        lines = child.lines()
        endpoint = json.loads(next(lines))["endpoint"]
        with Client(find(endpoint)) as client:
            assert client.chat([{"role": "user", "content": "Hello"}]).text == REPLY
        (installed.directory / "prompts.jsonl").write_text('{"id": "1", "prompt": "Hello"}\n')
        generated = installed.forge("generate", "prompts.jsonl", "out.jsonl", "--endpoint", endpoint)
        assert generated.code == 0
        assert json.loads((installed.directory / "out.jsonl").read_text())["text"] == REPLY
        os.kill(child.pid, signal.SIGINT)
        list(lines)
        assert child.wait(60) == 130
    assert installed.forge("chat", str(model), typed="Hello\n/quit\n").code == 0


def test_it_ships(installed: Installed) -> None:
    [packages] = (installed.environment / "lib").glob("python*/site-packages")
    development = Path(pytest.__file__).parent.parent
    (packages / "development.pth").write_text(f"{development}\n")
    where = "import forge, forge.errors, torch; print(forge.__path__[0], torch.__path__[0])"
    found = do(installed.environment / "bin" / "python", "-c", where, directory=installed.directory).output
    assert found == f"{packages / 'forge'} {development / 'torch'}"

    installed.recipe()
    answer = installed.ship()
    assert list(answer.cached) == list(STAGES)
    assert answer.fields["smoke"][0]["answer"]
    assert read_gguf(Path(answer.fields["gguf"])).architecture == "llama"
    assert installed.ship().cached == {stage: stage in PURE for stage in STAGES}
