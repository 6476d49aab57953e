"""`forge verify` on files alone, as the user types it: a verdict in JSON, and bad input told in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge.model.base import BUILTIN
from tests.conftest import copy_of_tiny, link_converters
from tests.makers.tokenizer import VOCABULARY
from tests.models import PEFT_WARNS, change_json, change_tensors, make_adapter, make_model
from tests.shipping import Answer, Workshop
from tests.specimens import Specimen, make_specimen, rewrite, write_rows

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500), PEFT_WARNS]

TINY = BUILTIN / "tiny"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("alone")
    home = link_converters(root / "home")
    (root / "here").mkdir()
    return Workshop(root / "here", home)


@pytest.fixture(scope="module")
def tuned(workshop: Workshop) -> Specimen:
    """builtin:tiny with an adapter of random factors, and its f16 GGUF."""
    adapter = make_adapter(TINY, workshop.directory / "adapter")
    specimen = Specimen(TINY, adapter, write_rows(TINY, workshop.directory), workshop.directory)
    specimen.f16(workshop.directory / "f16")
    return specimen


def _verify(
    workshop: Workshop, specimen: Specimen, gguf: Path, *more: str, base: str = "builtin:tiny"
) -> Answer:
    files = ("--base", base, "--adapter", str(specimen.adapter), "--gguf", str(gguf))
    return workshop.forge("verify", *files, *more)


def _f16(specimen: Specimen) -> Path:
    return specimen.scratch / "f16" / "model.gguf"


def test_a_sound_file_has_the_contracts_fields(workshop: Workshop, tuned: Specimen) -> None:
    """On built-in rows; the fields that others read."""
    answer = _verify(workshop, tuned, _f16(tuned))
    assert answer.code == 0, answer.said
    found = answer.fields
    assert found["ok"] is True and found["broken_stage"] is None and found["problems"] == []
    assert found["tokens"]["ok"] and found["prompt"]["ok"] and found["stops"]["ok"]
    figures = {"nmse", "kl_mean", "kl_max", "top1"}
    assert found["logits"].keys() == figures | {"perplexity_reference", "perplexity_gguf"}
    rounding, handover = found["handovers"]
    assert {"from", "to", "ok", *figures} <= handover.keys()
    assert (rounding["from"], rounding["to"]) == ("fp32 base + adapter", "weights in F16")
    assert (handover["from"], handover["to"]) == ("weights in F16", "GGUF f16")
    assert "verified: " in answer.said and "KL mean" in answer.said


def test_what_four_bits_shifted_is_shown_where_it_is_told(workshop: Workshop, tuned: Specimen) -> None:
    answer = _verify(workshop, tuned, _f16(tuned), "--trained-in-4bit")
    assert answer.code == 0, answer.said
    first = answer.fields["handovers"][0]
    assert (first["from"], first["to"]) == ("as trained (NF4 base + adapter)", "fp32 base + adapter")
    assert first["kl_mean"] > 1e-4
    assert any("training saw the NF4 base" in warning for warning in answer.fields["warnings"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--max-kl", value) for value in ("nan", "inf", "0", "-1")),
        *(("--min-top1", value) for value in ("nan", "1.5", "0", "-inf")),
        *(("--minutes", value) for value in ("nan", "inf", "0", "-1")),
    ],
)
def test_a_limit_that_would_let_every_file_pass(
    workshop: Workshop, tuned: Specimen, option: str, value: str
) -> None:
    told = _told(_error(_verify(workshop, tuned, _f16(tuned), option, value)))
    assert told.startswith(f"Invalid value for '{option}': {value}") and told.endswith(
        ("is not finite.", "is not in the range x>0.", "is not in the range 0<x<=1.")
    )


@pytest.mark.slow
def test_a_broken_file_is_exit_5_with_its_stage(workshop: Workshop, tuned: Specimen, tmp_path: Path) -> None:
    """On the user's own rows: the base's file, to which no adapter was applied."""
    plain = Specimen(TINY, None, tuned.rows, tmp_path)
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"Is there a {thing}?", "completion": f"Yes, a {thing}."}
        for thing in ("fox", "cat", "hat")
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = _verify(workshop, tuned, plain.f16(tmp_path / "base"), "--data", str(rows))
    assert answer.code == 5
    assert answer.fields["broken_stage"] == "merge"
    assert answer.fields["error"]["message"].startswith("merge broke it: the adapter was not applied")
    assert answer.fields["error"]["hint"]
    assert answer.fields["sample"]["rows_given"] == 3


def _error(answer: Answer, code: int = 2) -> dict[str, Any]:
    assert answer.code == code, answer.said
    error: dict[str, Any] = answer.fields["error"]
    assert error["hint"]
    return error


def _told(error: dict[str, Any]) -> str:
    return " ".join([error["message"], *(str(problem["message"]) for problem in error["problems"])])


@pytest.mark.slow
def test_bad_input_says_what_was_compared(workshop: Workshop, tuned: Specimen, tmp_path: Path) -> None:
    """Another model, another vocabulary, damaged files: each in words, with how far it got."""
    # Another model, by its size and by its words.
    larger = make_specimen(tmp_path / "larger", "llama", num_hidden_layers=3)
    told = _told(_error(_verify(workshop, tuned, larger.f16(tmp_path / "f16-larger"))))
    assert "another model's" in told and "3 in the file, 4 in the base" in told
    assert "it failed at: the file's header; compared before: nothing" in told

    fewer = make_model(
        tmp_path / "fewer", "llama", "home-made", num_hidden_layers=4, intermediate_size=768,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=VOCABULARY - 100,
    )  # fmt: skip
    told = _told(
        _error(
            _verify(workshop, tuned, Specimen(fewer, None, tuned.rows, tmp_path).f16(tmp_path / "f16-fewer"))
        )
    )
    assert f"another vocabulary: it has {VOCABULARY - 100} tokens, the rows have ids up to" in told

    # Truncated.
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(_f16(tuned).read_bytes()[:-100_000])
    assert "truncated" in _told(_error(_verify(workshop, tuned, cut)))

    # NaN in the file, and in the base.
    import numpy as np

    nan: Any = np.full((256, 256), np.nan, dtype=np.float16)
    broken = rewrite(_f16(tuned), tmp_path / "nan.gguf", {"blk.1.attn_output.weight": nan})
    told = _told(_error(_verify(workshop, tuned, broken)))
    assert "not finite" in told and "compared before: the file's header, token ids, prompt and stops" in told
    import torch

    base = copy_of_tiny(tmp_path / "tiny")
    change_tensors(base / "model.safetensors", {"model.norm.weight": torch.full((256,), float("nan"))})
    told = _told(_error(_verify(workshop, tuned, _f16(tuned), base=str(base))))
    assert "model.norm.weight has values that are not finite" in told


@pytest.mark.slow
def test_another_vocabulary_is_the_converters_fault(
    workshop: Workshop, tuned: Specimen, tmp_path: Path
) -> None:
    """The same sizes, other tokens: caught by ids, whatever the logits say."""
    other = make_model(
        tmp_path / "other", "llama", "home-made", num_hidden_layers=4, intermediate_size=768,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=VOCABULARY,
    )  # fmt: skip
    specimen = Specimen(other, None, tuned.rows, tmp_path)
    answer = _verify(workshop, tuned, specimen.f16(tmp_path / "f16"))
    assert answer.code == 5, answer.said
    assert answer.fields["broken_stage"] == "convert"
    assert not answer.fields["tokens"]["ok"]


def test_rows_and_files_that_are_no_use(workshop: Workshop, tuned: Specimen, tmp_path: Path) -> None:
    """Told before anything is loaded."""
    empty, long = tmp_path / "empty.jsonl", tmp_path / "long.jsonl"
    empty.write_text("")
    long.write_text(json.dumps({"prompt": "word " * 3000, "completion": "yes"}) + "\n")
    file = _f16(tuned)
    assert "no rows" in _told(_error(_verify(workshop, tuned, file, "--data", str(empty))))
    assert "tokens" in _told(_error(_verify(workshop, tuned, file, "--data", str(long))))
    _error(_verify(workshop, tuned, file, "--data", str(tmp_path / "none.jsonl")))
    _error(_verify(workshop, tuned, tmp_path / "none.gguf"))
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    _error(_verify(workshop, tuned, text))
    assert workshop.forge("verify", "--base", "builtin:tiny").code == 2
    alone = ("--base", "builtin:tiny", "--gguf", str(file), "--trained-in-4bit")
    assert "speaks of an adapter" in _told(_error(workshop.forge("verify", *alone)))
    assert "is no importance matrix" in _told(_error(_verify(workshop, tuned, file, "--imatrix", str(file))))
    quantized = tmp_path / "quantized"
    shutil.copytree(TINY, quantized)
    change_json(quantized / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    assert "already quantized" in _told(_error(_verify(workshop, tuned, file, base=str(quantized))))
