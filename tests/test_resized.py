"""Adapters that brought tokens of their own: each form that peft saves is right, or refused with words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.read import read_adapter
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.adapter.vocabulary import check_tokenizer, fit
from forge.errors import DataError
from forge.export.run import GGUF_FILE, MERGED_DIRECTORY
from forge.model.checkpoint import open_checkpoint
from forge.model.config import read_configuration
from forge.model.gguf_header import read_gguf
from forge.verify.inputs import file_facts
from forge.verify.loader import Weights
from forge.verify.reference import logits
from forge.verify.sample import Sample
from tests.exporting import export_here
from tests.models import PEFT_WARNS, change_json, change_tensors, load, make_adapter, make_model, make_resized
from tests.specimens import Specimen, merged_tensors, rewrite, write_rows
from tests.test_data_tokens import format_of
from tests.vocabularies import converters

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500), PEFT_WARNS]

BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "untied": make_model(root / "untied", "llama", "home-made", tie_word_embeddings=False),
        "tied": make_model(root / "tied", "llama", "home-made"),
        "gpt2": make_model(root / "gpt2", "gpt2", "home-made", intermediate_size=1024),
    }


def tokens_of(base: Path) -> int:
    import transformers

    return len(transformers.AutoTokenizer.from_pretrained(base))


def more(base: Path) -> list[str]:
    """Tokens for which the base's padding has no room."""
    rows = read_configuration(base).vocabulary_size
    assert rows
    return ["<|turn|>", "<|stop|>", *(f"<|{number}|>" for number in range(rows - tokens_of(base)))]


CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "untied": ("untied", {}),
    "tied": ("tied", {}),
    "conv1d": ("gpt2", {"fan_in_fan_out": True}),
    "modules to save": ("untied", {"modules_to_save": BOTH}),
    "modules to save, kept tied": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "rows of tokens": ("untied", {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 7, 9]}}),
    "rows of tokens, tied": ("tied", {"trainable_token_indices": [3, 9]}),
    "fewer": ("untied", {"added": (), "multiple": 1}),
    "fewer, tied": ("tied", {"added": (), "multiple": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tuned_model_is_peft_s(case: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    """K3; pitfalls 6, 7 and 32: the merged checkpoint, the streamed reference and the GGUF have every row."""
    import numpy as np
    import torch

    kind, options = CASES[case]
    base = bases[kind]
    adapter = make_resized(base, tmp_path / "adapter", **{"added": more(base), **options})
    rows = -(-tokens_of(adapter) // options.get("multiple", 64)) * options.get("multiple", 64)
    before = read_configuration(base).vocabulary_size
    assert before and (rows < before if case.startswith("fewer") else rows > before)
    told = validate_adapter(ValidateRequest(base, adapter))
    assert (told.ok, told.vocabulary_rows, told.exports) == (True, rows, ("merged",))

    expected = load(base, adapter, rows=rows)
    merged = export_of(base, adapter, tmp_path / "out") / MERGED_DIRECTORY
    ours, theirs = load(merged).state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    header = read_gguf(tmp_path / "out" / GGUF_FILE)
    assert rows in header.tensors["token_embd.weight"].shape
    assert file_facts(tmp_path / "out" / GGUF_FILE, header).vocabulary == rows

    last = tokens_of(adapter) - 1
    sample = Sample(((5, 9, last, 31, 7, last),), tuple((0, at) for at in range(5)), (True,) * 5, 1)
    with torch.inference_mode():
        wanted = expected(torch.tensor([sample.rows[0]])).logits[0, :5].numpy()
    found = logits(Weights(base, adapter), sample, "tuned")
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)


def export_of(
    base: Path, adapter: Path, out: Path, *, tokenizer: Path | None = None, quant: str = "f16"
) -> Path:
    """A file of the type `quant`, and the merged checkpoint, with the adapter's tokenizer."""
    out.mkdir()
    export_here(
        base=str(base),
        adapter=str(adapter),
        tokenizer=str(tokenizer or adapter),
        chat_template=(base / "chat_template.jinja").read_text(encoding="utf-8"),
        data=None,
        out=str(out),
        converters=str(converters()),
        settings={"name": "yoda", "quant": quant, "keep_merged": True, "threads": 2, "end_of_turn_id": 2},
    )
    return out


def test_an_output_layer_left_behind_is_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """What peft saves where the embedding has factors too: it leaves out the head that was resized along."""
    base = bases["untied"]
    adapter = make_resized(base, tmp_path / "a", added=more(base), target_modules=["embed_tokens", "q_proj"])
    for of in (
        lambda: validate_adapter(ValidateRequest(base, adapter)),
        lambda: export_of(base, adapter, tmp_path / "out"),
    ):
        with pytest.raises(DataError, match="resized only the embedding or only the output layer") as refused:
            of()
        assert "both in modules_to_save" in refused.value.hint


def test_factors_of_a_resized_embedding(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """With the head beside them they are right."""
    import torch

    base = bases["untied"]
    targets = ["embed_tokens", "q_proj"]
    adapter = make_resized(
        base, tmp_path / "a", added=more(base), target_modules=targets, modules_to_save=["lm_head"]
    )
    rows = validate_adapter(ValidateRequest(base, adapter)).vocabulary_rows
    ours = load(export_of(base, adapter, tmp_path / "out") / MERGED_DIRECTORY).state_dict()
    for name, tensor in load(base, adapter, rows=rows).state_dict().items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-5)


def test_tokens_without_rows_and_rows_without_tokens(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base = bases["tied"]
    adapter = make_resized(base, tmp_path / "a", added=more(base))
    lost = shutil.copytree(adapter, tmp_path / "lost")
    names = [f"base_model.model.{name}" for name in read_adapter(lost).replaced]
    change_tensors(lost / "adapter_model.safetensors", dict.fromkeys(names))
    with pytest.raises(DataError, match="it was saved without those that were added"):
        export_of(base, lost, tmp_path / "first")
    with pytest.raises(DataError, match=r"has no tokenizer\.json: nothing says which tokens were added"):
        export_of(base, adapter, tmp_path / "second", tokenizer=base)


def test_a_token_without_a_row_that_the_base_has_too_was_not_added(tmp_path: Path) -> None:
    """Gemma 3's tokenizer names an image token, for which its text models have no row."""
    base = make_model(tmp_path / "base", "llama", "home-made")
    rows = read_configuration(base).vocabulary_size
    assert rows
    image = {"id": rows, "content": "<image_soft_token>", "special": True, "single_word": False}
    image |= {"lstrip": False, "rstrip": False, "normalized": False}
    added = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    change_json(base / "tokenizer.json", added_tokens=[*added, image])
    adapter = make_adapter(base, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, adapter / name)
    fitted = fit(read_adapter(adapter), open_checkpoint(base))
    check_tokenizer(fitted, adapter)
    change_json(base / "tokenizer.json", added_tokens=added)
    with pytest.raises(DataError, match=f"has {rows + 1} tokens, the embedding {rows} rows"):
        check_tokenizer(fitted, adapter)


@pytest.mark.parametrize("change", [{"trainable_token_indices": [3]}, {"trainable_token_indices": None}])
def test_rows_of_nobody_are_refused(
    change: dict[str, Any], bases: Mapping[str, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(bases["tied"], tmp_path / "a", trainable_token_indices=[3, 9])
    assert "it carries rows of tokens: model.embed_tokens.weight" in read_adapter(adapter).impurities
    change_json(adapter / "adapter_config.json", **change)
    with pytest.raises(DataError, match=r"model\.embed_tokens: the configuration"):
        read_adapter(adapter)


def test_the_certificate_sees_lost_rows(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """The sound file, one with zeros for the tokens that came, and one with the base's rows alone."""
    import numpy as np

    base = bases["untied"]
    adapter = make_resized(base, tmp_path / "adapter", added=more(base))
    specimen = Specimen(base, adapter, write_rows(base, tmp_path), tmp_path)
    owns = {"tokenizer": str(adapter), "end_of_turn_id": format_of(base).end_of_turn_id}
    sound = export_of(base, adapter, tmp_path / "sound") / GGUF_FILE
    found = specimen.verify(sound, **owns)
    assert found["ok"], found["problems"]
    assert found["base"]["kl_mean"] > 1e-4

    rows = read_configuration(base).vocabulary_size
    tensors = dict(
        merged_tensors(base, adapter, rows=validate_adapter(ValidateRequest(base, adapter)).vocabulary_rows)
    )
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = np.array(tensors[name])
        tensors[name][rows:] = 0
    zeros = rewrite(sound, tmp_path / "zeros.gguf", tensors)
    found = specimen.verify(zeros, f16=str(sound), **owns)
    assert (found["ok"], found["broken_stage"]) == (False, "convert"), found["verdict"]
    assert "added tokens were lost" in found["verdict"]

    alone = shutil.copytree(adapter, tmp_path / "alone")
    names = [f"base_model.model.{name}" for name in read_adapter(alone).replaced]
    change_tensors(alone / "adapter_model.safetensors", dict.fromkeys(names))
    short = export_of(base, alone, tmp_path / "short", tokenizer=base) / GGUF_FILE
    found = specimen.verify(short, f16=str(sound), **owns)
    assert (found["ok"], found["broken_stage"]) == (False, "convert"), found["verdict"]
