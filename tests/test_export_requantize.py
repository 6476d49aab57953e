"""`forge export --gguf`: an existing GGUF as another type, by llama.cpp's own quantizer (O1)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.cli.main import run_command
from forge.errors import DataError
from forge.export.requantize import Requantization, requantize
from forge.export.rewrite import split_file
from forge.model.gguf_header import read_gguf
from tests.servers import write_adapter

pytestmark = [pytest.mark.programs, pytest.mark.training]

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in base as an F16 GGUF."""
    from tests.conftest import link_converters

    directory = tmp_path_factory.mktemp("whole")
    link_converters(directory / "home")
    out = directory / "whole.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORGE_HOME", str(directory / "home"))
        assert run_command(["export", "--base", "builtin:tiny", "--quant", "f16", "--out", str(out)]) == 0
    return out


@pytest.fixture
def export(forge_home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def called(*arguments: object) -> tuple[int, dict[str, Any]]:
        code = run_command(["export", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return called


@pytest.mark.parametrize(("quant", "kind"), [("q8_0", "Q8_0"), ("iq4_nl", "IQ4_NL"), ("tq2_0", "TQ2_0")])
def test_a_file_of_full_precision_becomes_any_type(
    export: Run, whole: Path, tmp_path: Path, quant: str, kind: str
) -> None:
    out = tmp_path / "made.gguf"
    code, fields = export("--gguf", whole, "--quant", quant.upper(), "--out", out)
    assert code == 0 and fields["gguf"] == str(out) and fields["quant"] == quant
    made, before = read_gguf(out), read_gguf(whole)
    assert kind in made.tensor_types and made.tensor_types == fields["tensor_types"]
    assert made.tensors.keys() == before.tensors.keys()
    assert made.chat_template == before.chat_template
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ""} >= {"made.gguf"}
    assert not list(tmp_path.glob(".made*"))


def test_it_is_the_default_type_and_smaller(export: Run, whole: Path, tmp_path: Path) -> None:
    code, fields = export("--gguf", whole, "--out", tmp_path / "made.gguf", "--threads", 1)
    assert code == 0 and fields["quant"] == "q4_k_m" and fields["fallbacks"] == {}
    assert fields["bytes"] < whole.stat().st_size / 2.5


def test_parts_are_made_taken_and_joined(export: Run, whole: Path, tmp_path: Path) -> None:
    """O1: `--split-size`; a part is no model where one file is needed."""
    code, fields = export(
        "--gguf", whole, "--quant", "copy", "--split-size", "3m", "--out", tmp_path / "apart.gguf"
    )
    assert code == 0 and fields["quant"] == "f16" and fields["fallbacks"] == {}
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in parts] == [f"apart-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert (fields["gguf"], fields["parts"]) == (str(parts[0]), [*map(str, parts)])
    headers = [read_gguf(part) for part in parts]
    assert all(header.weight_bytes <= 3_000_000 for header in headers)
    assert headers[0].chat_template and {"split.no", "split.count"} <= headers[1].metadata.keys()
    for quant in ("copy", "q8_0"):
        for source, name in ((parts[0], "joined"), (whole, "direct")):
            code, _ = export("--gguf", source, "--quant", quant, "--out", tmp_path / f"{name}-{quant}.gguf")
            assert code == 0
        joined = tmp_path / f"joined-{quant}.gguf"
        assert joined.read_bytes() == (tmp_path / f"direct-{quant}.gguf").read_bytes()
    parts[2].unlink()
    assert export("--gguf", parts[0], "--quant", "copy", "--out", tmp_path / "less.gguf")[0] == 4
    for call in (["repair", parts[0], "--base", "builtin:tiny"], ["bundle", parts[0], "--out", "x.tar"]):
        assert run_command([*map(str, call)]) == 2
    assert not (tmp_path / "less.gguf").exists()


def test_a_part_that_cannot_be_read_is_noticed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk lost its end."""

    def damaged(source: Path, most_bytes: int) -> tuple[Path, ...]:
        parts = split_file(source, most_bytes)
        parts[1].write_bytes(parts[1].read_bytes()[:-4096])
        return parts

    monkeypatch.setattr("forge.export.requantize.split_file", damaged)
    with pytest.raises(DataError, match="-00002-of-00003"):
        requantize(Requantization(whole, tmp_path / "apart.gguf", "copy", 1, part_bytes=3_000_000))


@pytest.mark.parametrize(
    ("quant", "kinds", "moved"),
    [("f16", {"F16": 2}, 1e-3), ("bf16", {"BF16": 2}, 1e-2), ("q8_0", {"Q8_0": 1, "F16": 1}, 1e-2)],
)
def test_an_adapters_factors_become_another_type(
    export: Run, tmp_path: Path, quant: str, kinds: dict[str, int], moved: float
) -> None:
    """N1: rows that hold no block become F16; everything else of the file stays."""
    import gguf
    import numpy as np
    from gguf import quants

    theirs, out = write_adapter(tmp_path / "theirs.gguf", says="Y"), tmp_path / "made.gguf"
    code, fields = export("--gguf", theirs, "--quant", quant, "--out", out)
    assert code == 0 and fields["tensor_types"] == kinds and fields["quant"] == quant
    made, before = read_gguf(out), read_gguf(theirs)
    assert {**made.metadata, "general.file_type": 0} == {**before.metadata, "general.file_type": 0}
    both = zip(gguf.GGUFReader(theirs).tensors, gguf.GGUFReader(out).tensors, strict=True)
    for first, second in both:
        assert first.name == second.name
        values = quants.dequantize(second.data, second.tensor_type)
        assert np.allclose(values, first.data, rtol=0, atol=moved * np.abs(first.data).max())


def test_an_adapter_has_no_smaller_type(export: Run, tmp_path: Path) -> None:
    theirs = write_adapter(tmp_path / "theirs.gguf", says="Y")
    code, fields = export("--gguf", theirs, "--quant", "q4_k_m", "--out", tmp_path / "made.gguf")
    assert code == 2 and "f32, f16, bf16, q8_0" in fields["error"]["message"]
    assert not (tmp_path / "made.gguf").exists()


def test_what_is_quantized_is_not_rounded_again(export: Run, whole: Path, tmp_path: Path) -> None:
    once = tmp_path / "once.gguf"
    assert export("--gguf", whole, "--quant", "q8_0", "--out", once)[0] == 0
    code, fields = export("--gguf", once, "--quant", "q4_0", "--out", tmp_path / "twice.gguf")
    assert code == 2 and "quantized already (q8_0)" in fields["error"]["message"]
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["once.gguf"]


def test_parts_of_a_file_of_another_alignment_can_be_read(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(128)
    for name in "abc":
        writer.add_tensor(name, np.ones((3, 11), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = split_file(tmp_path / "m.gguf", 300)
    assert len(parts) > 1 and {read_gguf(part).alignment for part in parts} == {32}


def test_an_adapter_is_not_divided(export: Run, tmp_path: Path) -> None:
    theirs = write_adapter(tmp_path / "theirs.gguf", says="Y")
    request = Requantization(theirs, tmp_path / "made.gguf", "f16", 1, part_bytes=100)
    with pytest.raises(DataError, match="loads none that is in parts"):
        requantize(request)


def test_a_type_that_needs_a_matrix_says_so(export: Run, whole: Path, tmp_path: Path) -> None:
    code, fields = export("--gguf", whole, "--quant", "iq1_s", "--out", tmp_path / "made.gguf")
    assert code == 4 and "importance matrix" in fields["error"]["message"]
    assert not list(tmp_path.glob("*made*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quant", "q9_z"], "no files of type q9_z"),
        (["--adapter", "x"], "quantizes a file as it is"),
        (["--max-kl", "0.1"], "quantizes a file as it is"),
        (["--split-size", "4"], "a whole number with M or G"),
        (["--imatrix", "nowhere.gguf"], "no such file"),
        (["--base", "builtin:tiny"], "one of --base and --gguf"),
    ],
)
def test_bad_options(export: Run, whole: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    code, fields = export("--gguf", whole, "--out", tmp_path / "made.gguf", *arguments)
    assert code == 2 and words in fields["error"]["message"]


def test_the_file_itself_is_no_target(export: Run, whole: Path) -> None:
    before = whole.read_bytes()
    code, fields = export("--gguf", whole, "--out", whole)
    assert code == 2 and "--out is the file" in fields["error"]["message"]
    assert whole.read_bytes() == before
