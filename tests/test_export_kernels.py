"""The compiled kernels of Q4_K and Q6_K give ggml's bytes, and where they do not, ggml's own are used.

Not covered: processors without AVX-512, but for their way through the code, which runs here too.
`python -m bench kernels` compares a hundred times as many blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.kernels import FUZZ, differing, fuzzed
from forge import process, report
from forge.cli.main import run_command
from forge.errors import StageError
from forge.export import compiled
from forge.export.kernels import (
    CHOICE,
    Kernel,
    choose_kernels,
    compiled_kernels,
    ggml_kernel,
    quantize_rows,
    quantized,
)
from forge.model.base import BUILTIN
from tests.told_sink import Told

pytestmark = [pytest.mark.training, pytest.mark.programs]

KINDS = ("Q4_K", "Q6_K")
LANES = (16, 8, 4)
# Not even, so that a last block is alone; with all distributions, kinds and lanes 10^5 blocks.
BLOCKS = 877


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tools with the library in it."""
    directory = tmp_path_factory.mktemp("tools")
    compiled.compile_kernels(directory)
    return directory


@pytest.fixture(scope="module", params=LANES)
def kernels(request: pytest.FixtureRequest, tools: Path) -> Mapping[str, Kernel]:
    return compiled_kernels(compiled.library_file(tools), request.param)


@pytest.mark.parametrize("name", FUZZ)
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_has_ggmls_bytes(kernels: Mapping[str, Kernel], kind: str, name: str) -> None:
    import numpy as np

    values = fuzzed(name, np.random.default_rng(len(name)), BLOCKS)
    assert np.isfinite(values).all()
    assert differing(kind, values, kernels[kind], ggml_kernel(kind)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_as_ggml_has_it(kernels: Mapping[str, Kernel], kind: str, bad: float) -> None:
    """Reading refuses such weights. Were one to come this far, ggml would refuse it in a Q4_K alone."""
    import numpy as np

    values = fuzzed("normal", np.random.default_rng(0), 256)
    values[range(256), range(256)] = bad
    assert differing(kind, values, kernels[kind], ggml_kernel(kind)) == 0
    if kind == "Q4_K" and not np.isnan(bad):
        with pytest.raises(StageError, match=f"^blk has values that {kind} cannot hold$"):
            quantize_rows("blk", kind, values, kernels)


def test_one_other_bit_is_seen(kernels: Mapping[str, Kernel]) -> None:
    """So that equal bytes prove something."""
    import numpy as np

    def wrong(values: Any, made: Any) -> None:
        kernels["Q4_K"](values, made)
        made[144 * 3 + 20] ^= 1

    values = fuzzed("normal", np.random.default_rng(0), 8)
    assert differing("Q4_K", values, wrong, ggml_kernel("Q4_K")) == 1


def test_they_are_chosen_where_they_agree(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*choose_kernels(tools, ["F32", "Q6_K", "Q5_K", "Q4_K", "Q6_K"])] == ["Q4_K", "Q6_K"]
    assert [*choose_kernels(tools, ["Q6_K"])] == ["Q6_K"]
    monkeypatch.setenv(CHOICE, "ggml")
    assert choose_kernels(tools, KINDS) == {}


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF and no more"])
def test_without_a_whole_library_ggml_does_it(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        compiled.library_file(tmp_path).write_bytes(content)
    assert choose_kernels(tmp_path, KINDS) == {}


def test_kernels_of_other_bytes_are_not_used(tmp_path: Path) -> None:
    """Real ones: the same sources, but with products and sums fused, as a compiler may do by itself."""
    import numpy as np

    library, source = compiled.library_file(tmp_path), Path(compiled.__file__).with_name("kernels.cpp")
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w"]
    assert process.run(["c++", *flags, str(source), "-o", str(library)]).status == 0
    values = fuzzed("normal", np.random.default_rng(0), 1000)
    for kind, kernel in compiled_kernels(library).items():
        assert differing(kind, values, kernel, ggml_kernel(kind)) > 10
    told = Told()
    report.configure(sink=told)
    assert choose_kernels(tmp_path, KINDS) == {}
    [(how, text)] = told.texts
    assert how == "info" and "kernels of Q4_K, Q6_K do not give the bytes of this ggml" in text


def test_rows_are_quantized_by_what_is_chosen() -> None:
    import numpy as np

    def zeros(values: Any, made: Any) -> None:
        made[:] = 0

    values = fuzzed("normal", np.random.default_rng(0), 4)
    assert not quantize_rows("blk", "Q4_K", values, {"Q4_K": zeros}).any()
    expected = quantized("Q4_K", values, ggml_kernel("Q4_K"))
    assert (quantize_rows("blk", "Q4_K", values, {"Q6_K": zeros}) == expected).all()


def test_an_export_uses_them(forge_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That the file's bytes stay llama.cpp's is what test_export_bytes.py holds."""
    compiled.compile_kernels(forge_home / "tools")
    assert (
        run_command(["export", "--base", str(BUILTIN / "tiny"), "--out", str(tmp_path / "a.gguf"), "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["compiled_kernels"] == ["Q4_K", "Q6_K"]


def test_setup_compiles_them_once(
    forge_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = compiled.library_file(forge_home / "tools")
    library.unlink(missing_ok=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run_command(["setup", "--json"]) == 0
    caught = capsys.readouterr()
    assert json.loads(caught.out)["kernels"] is None
    assert "there is no program no-such-compiler" in caught.err
    monkeypatch.setenv("CXX", "c++ --no-such-flag")
    assert run_command(["setup", "--json"]) == 0
    caught = capsys.readouterr()
    assert json.loads(caught.out)["kernels"] is None
    assert "c++ could not compile the kernels: " in caught.err and "no-such-flag" in caught.err
    assert [path.name for path in library.parent.iterdir() if "kernels" in path.name] == []
    monkeypatch.delenv("CXX")
    assert run_command(["setup", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == str(library)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run_command(["setup", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == str(library)
