"""What a certificate does not compute twice, and that it comes to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.export import upstream
from forge.model.checkpoint import open_checkpoint
from forge.verify import reference, yardstick
from forge.verify.kept import holds_any, kept_of
from forge.verify.loader import changes_nothing
from forge.verify.measurement import Greedy, VerifyRequest
from forge.verify.rounding import RoundedTypes, rounding_of
from tests.models import PEFT_WARNS, change_tensors
from tests.specimens import Specimen, make_specimen, rewrite
from tests.vocabularies import converters

pytestmark = [pytest.mark.training, pytest.mark.programs, PEFT_WARNS]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    """A small base without an adapter, and its f16."""
    made = make_specimen(tmp_path_factory.mktemp("thrift"), "llama")
    specimen = Specimen(made.base, None, made.rows, made.scratch)
    specimen.f16(made.scratch / "f16")
    return specimen


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"general__name": "another", "tokenizer__chat_template": "{{ messages }}"}, True),
        ({"llama__rope__freq_base": 5000.0}, False),
        ("a tensor", False),
        ("a missing tensor", False),
    ],
)
def test_two_files_compute_the_same_where_tensors_and_settings_are_equal(
    change: Any, same: bool, plain: Specimen, tmp_path: Path
) -> None:
    import gguf
    import numpy as np

    file, metadata, tensors = plain.scratch / "f16" / "model.gguf", {}, {}
    if isinstance(change, dict):
        metadata = change
    else:
        name = "blk.1.attn_output.weight"
        found = next(one for one in gguf.GGUFReader(str(file)).tensors if one.name == name)
        values = np.array(found.data)
        values[-1, -1] += 1
        tensors = {name: None if change == "a missing tensor" else values}
    other = rewrite(file, tmp_path / "other.gguf", tensors, **metadata)
    assert yardstick.computes_the_same(file, other) is same
    assert yardstick.computes_the_same(file, file)


def test_a_base_that_its_type_holds_is_not_rounded(plain: Specimen, tmp_path: Path) -> None:
    """bfloat16 values of usual size are float16's too; one that is too fine for it is not."""
    import shutil

    import torch

    upstream.load_converters(converters())
    rounding = rounding_of(plain.scratch / "f16" / "model.gguf", 2)
    assert not rounding.is_exact and RoundedTypes({"norm": "F32"}, lambda name: name, "F32").is_exact
    base = tmp_path / "base"
    shutil.copytree(plain.base, base)
    checkpoint = open_checkpoint(base)
    name = "model.layers.1.self_attn.o_proj.weight"
    shape = checkpoint.tensors[name].shape
    exact = {key: torch.ones(tuple(spec.shape)) for key, spec in checkpoint.tensors.items()}
    change_tensors(base / "model.safetensors", exact)
    assert changes_nothing(rounding, open_checkpoint(base))
    norm = {"model.norm.weight": torch.full((256,), 1 + 2**-12)}  # a vector, which stays float32
    change_tensors(base / "model.safetensors", norm)
    assert changes_nothing(rounding, open_checkpoint(base))
    fine = torch.ones(tuple(shape))
    fine[0, 0] = 1 + 2**-12
    change_tensors(base / "model.safetensors", {name: fine})
    assert not changes_nothing(rounding, open_checkpoint(base))


def _request(scratch: Path, *, goes_on: bool) -> VerifyRequest:
    nowhere = scratch / "nowhere"
    return VerifyRequest(nowhere, nowhere, nowhere, None, nowhere, nowhere, scratch, goes_on=goes_on)


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_stopped_measurement_made_is_taken_where_it_goes_on(goes_on: bool, tmp_path: Path) -> None:
    """Of whoever does not go on nothing stays, nor is anything taken that somebody else left."""
    request, made = _request(tmp_path, goes_on=goes_on), list[int]()

    def answers() -> Greedy:
        made.append(len(made))
        return Greedy(8, made[-1])

    for _ in range(2):
        with pytest.raises(RuntimeError), kept_of(request) as kept:
            kept.value(Greedy, "greedy", answers)
            raise RuntimeError
        assert holds_any(tmp_path) is goes_on
    with kept_of(_request(tmp_path, goes_on=True)) as kept:
        assert kept.value(Greedy, "greedy", answers) == Greedy(8, 0 if goes_on else 2)
    assert not (tmp_path / "kept").exists()
    with kept_of(request):
        pass  # there was nothing to keep
    (tmp_path / "kept" / "greedy").mkdir(parents=True)
    with pytest.raises(RuntimeError), kept_of(_request(tmp_path, goes_on=False)) as kept:
        assert not kept.directory.exists()
        raise RuntimeError  # before anything was made


def test_what_was_left_half_made_is_made_anew(tmp_path: Path) -> None:
    def make(out: Path) -> None:
        assert not any(out.iterdir())
        (out / "whole").touch()

    with kept_of(_request(tmp_path, goes_on=True)) as kept:
        half = kept.directory / "files.partial"
        half.mkdir(parents=True)
        (half / "a half").touch()
        assert not holds_any(tmp_path)
        made = kept.folder("files", make)
        assert [path.name for path in made.iterdir()] == ["whole"]
        kept.forget("files")
        assert not made.exists()
        kept.forget("files")


def test_little_time_bounds_the_first_look_too(plain: Specimen) -> None:
    """A few positions first, whose time says whether more fit; with enough of it, until all is decided."""
    file = plain.scratch / "f16" / "model.gguf"
    short, enough, unbounded = (plain.measure(file, minutes=given).sample for given in (1e-6, 60, None))
    assert (short.looks, short.positions <= 96) == (1, True)
    assert enough.looks == 1 or enough.positions > short.positions
    assert unbounded.positions > 96
    near = plain.measure(file, minutes=1e-6, min_top1=1.0).sample
    assert (near.positions, near.undecided) == (short.positions, ("verify.min_top1",))
    assert plain.measure(file, minutes=60, min_top1=1.0).sample.positions > 96


def test_files_of_two_types_share_what_they_are_held_against(
    plain: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's own f16 is made once, and so is what the reference says of it; the figures are the same."""
    made, computed = list[Path](), list[str]()
    export_f16, logits = yardstick.export_f16, reference.logits

    def counted(weights: Any, sample: Any, label: str, *more: Any) -> Any:
        computed.append(label)
        return logits(weights, sample, label, *more)

    monkeypatch.setattr(yardstick, "export_f16", lambda model, out: made.append(export_f16(model, out)))
    monkeypatch.setattr(reference, "logits", counted)
    f16 = plain.scratch / "f16" / "model.gguf"
    files = [yardstick.make_quantized(f16, tmp_path / f"{kind}.gguf", kind, 1) for kind in ("q8_0", "q4_0")]
    legs = [plain.measure(file, shared=str(tmp_path / "shared"), minutes=1e-6).legs for file in files]
    assert len(made) == 1 and computed.count("the reference, in 16 bits") == 1
    alone = plain.measure(files[1], minutes=1e-6).legs
    assert len(made) == 2
    assert legs[1].conversion == alone.conversion == legs[0].conversion
    assert legs[1].vendor == alone.vendor != legs[0].vendor


@pytest.mark.slow
def test_what_is_computed_once_is_what_both_would_be(
    plain: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain base in a quantized type, with every short cut and without any: the same figures."""
    file = yardstick.make_quantized(plain.scratch / "f16" / "model.gguf", tmp_path / "q8.gguf", "q8_0", 1)
    short = plain.measure(file)
    monkeypatch.setattr(yardstick, "computes_the_same", lambda *_: False)
    monkeypatch.setattr("forge.verify.measure.changes_nothing", lambda *_: False)
    whole = plain.measure(file)
    assert short.legs.file == whole.legs.file and short.legs.vendor == whole.legs.vendor
    assert short.weights.vendor == whole.weights.vendor and short.weights.file == whole.weights.file
    assert whole.legs.beyond_vendor is not None and whole.legs.beyond_vendor <= 1
    assert short.legs.conversion.nmse == pytest.approx(whole.legs.conversion.nmse, rel=1e-3)
