"""What every test gets: a clean environment, its own store, a guard against strays, and the real pieces.

The converters and the sources of the vocabularies are looked for where `make` has put them
(`FORGE_HOME`, by default `.forge` of the clone); tests that need them fail without, they do not skip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from forge import report
from forge.errors import ForgeError
from forge.export.compiled import library_file
from forge.model.base import BUILTIN
from forge.tools.llama_cpp import converters_directory, find_converters

pytest_plugins = [
    "tests.guard", "tests.servers", "tests.shipping", "tests.ollama_servers", "tests.docker_daemon",
    "tests.real.smollm2",
]  # fmt: skip

ROOT = Path(__file__).parent.parent
# Where this session's own pieces lie; the tests' FORGE_HOME is another one. Kept in the environment
# because the workers of pytest-xdist come after it was changed.
SESSION_HOME = Path(
    os.environ.setdefault("FORGE_TESTS_HOME", os.environ.get("FORGE_HOME") or str(ROOT / ".forge"))
).absolute()

_FOREIGN = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_COLOR")


def pytest_configure(config: pytest.Config) -> None:
    """No test sees the user's stores, caches and tokens. For this process, so for its programs too."""
    # A shell's background job inherits an ignored SIGINT, and then no Ctrl-C of the tests would arrive.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    away = Path(tempfile.mkdtemp(prefix="forge-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(away, ignore_errors=True))
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ |= {"FORGE_HOME": str(away / "store"), "HF_HOME": str(away / "huggingface"), "TERM": "dumb"}
    # Some tests export in this process, and llama.cpp's converters want the gguf-py of their own tree, of
    # which a process can have one: it is the one for all.
    with contextlib.suppress(ForgeError):
        sys.path.insert(0, str(find_converters(SESSION_HOME) / "gguf-py"))
    # Read when huggingface_hub is imported, and by some test before the one that asks the stand-in.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, by the time that those may take: what is short fills up the end."""
    longest: dict[Path, float] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            limit = item.get_closest_marker("timeout")
            longest[item.path] = max(longest.get(item.path, 0), limit.args[0] if limit else 900)
    items.sort(key=lambda item: -longest.get(item.path, 0))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The name of what failed, at once: a run that is stopped has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.stderr.write(f"\nFAILED {report.nodeid} ({report.when})\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With FORGE_NO_SKIPS (continuous integration) only what needs a GPU or a live Ollama may be skipped."""
    told = yield
    may_skip = any(item.get_closest_marker(mark) for mark in ("gpu", "ollama"))
    if told.skipped and os.environ.get("FORGE_NO_SKIPS") and not may_skip:
        told.outcome = "failed"
        told.longrepr = f"skipped, but FORGE_NO_SKIPS is set: {told.longrepr}"
    return told


@pytest.fixture(autouse=True)
def _quiet_afterwards() -> Iterator[None]:
    """A sink that one test configured is not spoken to by the next."""
    yield
    report.configure()


@pytest.fixture
def forge_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of the test's own, with the session's converters."""
    home = tmp_path / "forge-home"
    link_converters(home)
    monkeypatch.setenv("FORGE_HOME", str(home))
    return home


def link_converters(home: Path) -> Path:
    """Give the store `home` the session's converters and kernels; fails where `forge setup` has not run."""
    converters = converters_directory(home)
    converters.parent.mkdir(parents=True)
    converters.symlink_to(find_converters(SESSION_HOME))
    kernels = library_file(SESSION_HOME / "tools")
    if kernels.is_file():
        (converters.parent / kernels.name).symlink_to(kernels)
    return home


def copy_of_tiny(directory: Path) -> Path:
    """A copy of `builtin:tiny` that a test may change and break."""
    shutil.copytree(BUILTIN / "tiny", directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything under `root`: path -> content, None for a directory."""
    found = sorted(root.rglob("*"))
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights, where a module has no base of its own."""
    from tests.models import make_model

    return make_model(tmp_path_factory.mktemp("base") / "base", "llama", "home-made")


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that it is trained on, prepared."""
    from tests.models import prepare_rows

    return prepare_rows(base, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real Go's text/template; see `tests.real_go`."""
    from tests import real_go

    return real_go.build(tmp_path_factory.mktemp("oracle"))
