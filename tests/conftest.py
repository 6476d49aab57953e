"""What every test gets: a clean environment, its own store, a guard against strays, and the real pieces.

The converters and the sources of the vocabularies are looked for where `make` has put them
(`FORGE_HOME`, by default `.forge` of the clone); tests that need them fail without, they do not skip.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge import report
from forge.tools.llama_cpp import converters_directory, find_converters

pytest_plugins = ["tests.guard"]

ROOT = Path(__file__).parent.parent
# Where this session's own pieces lie; the tests' FORGE_HOME is another one.
SESSION_HOME = Path(os.environ.get("FORGE_HOME") or ROOT / ".forge").absolute()

_FOREIGN = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_COLOR")


def pytest_configure(config: pytest.Config) -> None:
    """No test sees the user's stores, caches and tokens. For this process, so for its programs too."""
    away = Path(tempfile.mkdtemp(prefix="forge-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(away, ignore_errors=True))
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ |= {"FORGE_HOME": str(away / "store"), "HF_HOME": str(away / "huggingface"), "TERM": "dumb"}


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
    """Give the store `home` the session's converters; fails where `forge setup` has not run."""
    converters = converters_directory(home)
    converters.parent.mkdir(parents=True)
    converters.symlink_to(find_converters(SESSION_HOME))
    return home
