"""An export of files starts without what only recipes need."""

from __future__ import annotations

import sys

import pytest

from forge import process

pytestmark = pytest.mark.programs

WITHOUT_RECIPES = """
import sys
import forge.cli.main, forge.cli.export, forge.commands.export
assert not {"pydantic", "ruamel.yaml", "torch"} & sys.modules.keys()
"""


def test_an_export_of_files_reads_no_recipe() -> None:
    """pydantic and the recipe's schema take longer to import than an export's options to read."""
    started = process.run([sys.executable, "-c", WITHOUT_RECIPES])
    assert started.status == 0, started.output
