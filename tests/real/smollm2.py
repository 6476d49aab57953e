"""SmolLM2-135M-Instruct as a checkpoint, for tests on a real model; a plugin with the fixture `smollm2`.

The checkpoint is that of `builtin:smollm2`, in any type. It is made once, in a few seconds, and kept under
FORGE_TESTS_HOME: treat it as read-only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import filelock
import pytest

from forge.model.smollm2 import VERSION, MakeRequest, make_smollm2, packaged_gguf


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A read-only checkpoint directory of SmolLM2-135M-Instruct in bfloat16."""
    return smollm2_as("bfloat16")


def smollm2_as(dtype: str) -> Path:
    """The checkpoint in `dtype`, by torch's name (float32, float16, bfloat16); made where it is not there."""
    from tests.conftest import SESSION_HOME

    target = SESSION_HOME / "tests" / f"smollm2-{dtype}-{VERSION}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
                made = Path(unfinished) / target.name
                made.mkdir()
                make_smollm2(MakeRequest(packaged_gguf(), made, dtype))
                for path in made.iterdir():
                    path.chmod(0o444)
                made.rename(target)
    return target
