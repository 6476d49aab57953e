"""The converter's imports without torch's compiler: sooner done, and the same description is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forge import process
from tests.models import make_model
from tests.vocabularies import converters

pytestmark = [pytest.mark.training, pytest.mark.programs]

# Programs of their own: this session may have imported all of it.
LIGHT = """
import sys
from pathlib import Path
import torch
from forge.export.imports import import_converter
from forge.export.upstream import load
tree, description = map(Path, sys.argv[1:])
disable, is_available = torch.compiler.disable, torch.distributed.is_available
import_converter(tree, description)
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
assert "torch.distributed.tensor" not in sys.modules, "distributed tensors were imported"
assert (torch.compiler.disable, torch.distributed.is_available) == (disable, is_available)
print(load(tree).base.ModelBase.load_hparams(description, False))
import transformers
model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(description))
assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()
"""
PLAIN = """
import sys
from pathlib import Path
from forge.export.upstream import load
tree, description = map(Path, sys.argv[1:])
print(load(tree).base.ModelBase.load_hparams(description, False))
"""
WHOLE = """
import sys
from forge.export.run import export
converters, base, out = sys.argv[1:]
settings = {"name": "x", "quant": "q8_0", "keep_merged": False, "threads": 1, "end_of_turn_id": None}
export(base, None, base, None, None, out, converters, settings)
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
"""
WITHOUT_RECIPES = """
import sys
import forge.cli.main, forge.cli.export, forge.commands.export
assert not {"pydantic", "ruamel.yaml", "torch"} & sys.modules.keys()
"""
BROKEN = """
import sys
from pathlib import Path
sys.modules["transformers.activations"] = None
from forge.export.imports import import_converter
import_converter(*map(Path, sys.argv[1:]))
"""


def run(program: str, *paths: Path) -> process.Finished:
    command = [sys.executable, "-W", "ignore", "-c", program, str(converters()), *map(str, paths)]
    return process.run(command, directory=Path(__file__).parent.parent)


def test_the_same_description_is_read_and_models_run_still(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    light, plain = run(LIGHT, base), run(PLAIN, base)
    assert light.status == 0, light.output
    told = [line for line in plain.output.splitlines() if line.startswith("{")]
    assert len(told) == 1
    assert told[0] in light.output.splitlines()


def test_what_cannot_be_imported_is_told(tmp_path: Path) -> None:
    """The converter alone would take it for a configuration that transformers does not know."""
    broken = run(BROKEN, make_model(tmp_path / "base"))
    assert broken.status == 1
    assert "transformers.activations" in broken.output


def test_a_whole_export_goes_without_the_compiler(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    made = run(WHOLE, base, tmp_path / "out")
    assert made.status == 0, made.output


def test_an_export_of_files_reads_no_recipe(tmp_path: Path) -> None:
    """pydantic and the recipe's schema take longer to import than an export's options to read."""
    started = run(WITHOUT_RECIPES, tmp_path)
    assert started.status == 0, started.output
