"""Adapters that trained embedding and output layer apart on a base that ties them: both are written.

In peft the two are then two tensors, and a merge into the one gives another model (silent wrong 6). What is
right here is peft's own model with the adapter on, not what peft merges.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge import worker
from forge.adapter import vocabulary
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.adapter.vocabulary import saved_whole
from forge.errors import DataError
from forge.export.run import GGUF_FILE, MERGED_DIRECTORY
from forge.model.checkpoint import open_checkpoint
from forge.model.gguf_header import read_gguf
from forge.model.safetensors_header import read_header
from forge.recipe.schema import Train
from forge.train.lora import with_lora
from forge.train.run import train
from forge.verify.loader import Weights
from forge.verify.reference import logits
from forge.verify.sample import Sample
from tests.models import (
    PEFT_WARNS,
    change_json,
    change_tensors,
    load,
    make_adapter,
    make_model,
    make_resized,
    prepare_rows,
)
from tests.specimens import Specimen, rewrite, write_rows
from tests.test_data_tokens import format_of
from tests.test_resized import export_of
from tests.test_train import arguments

pytestmark = [
    pytest.mark.training,
    pytest.mark.programs,
    pytest.mark.timeout(1500),
    PEFT_WARNS,
    # peft says that what is tested here can lead to complications.
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and:UserWarning"),
]

EMBEDDING, HEAD = "embed_tokens", "lm_head"
APART: Mapping[str, dict[str, Any]] = {
    "embedding, whole": {"modules_to_save": [EMBEDDING]},
    "head, whole": {"modules_to_save": [HEAD]},
    "both, whole": {"modules_to_save": [EMBEDDING, HEAD]},
    "embedding, factors": {"target_modules": [EMBEDDING, "q_proj"]},
    "head, factors": {"target_modules": [HEAD, "q_proj"]},
    "both, factors": {"target_modules": [EMBEDDING, HEAD, "q_proj"]},
    "embedding, factors of all": {"target_modules": "all-linear", "modules_to_save": [EMBEDDING]},
    "head, factors, DoRA": {"target_modules": [HEAD, "q_proj"], "use_dora": True},
    "embedding whole, head factors": {"modules_to_save": [EMBEDDING], "target_modules": [HEAD, "q_proj"]},
    "rows of tokens": {"trainable_token_indices": {EMBEDDING: [3, 9], HEAD: [3, 7, 9]}},
    "rows of tokens, head factors": {"trainable_token_indices": [3, 9], "target_modules": [HEAD, "q_proj"]},
    "named by its end": {"modules_to_save": ["tokens"]},
}
TIED: Mapping[str, dict[str, Any]] = {
    "neither": {},
    "one, whole": {"modules_to_save": [EMBEDDING], "ensure_weight_tying": True},
    "both, whole": {"modules_to_save": [EMBEDDING, HEAD], "ensure_weight_tying": True},
    "rows of tokens": {"trainable_token_indices": [3, 9]},
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied") / "base", "llama", "home-made")


@pytest.fixture(scope="module")
def stored_twice(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base; its file has the output layer too, as older tools save it."""
    from safetensors.torch import load_file

    base = tmp_path_factory.mktemp("twice") / "base"
    shutil.copytree(tied, base)
    weights = base / "model.safetensors"
    change_tensors(weights, {"lm_head.weight": load_file(weights)["model.embed_tokens.weight"].clone()})
    return base


def check(base: Path, adapter: Path, out: Path, *, rows: int | None = None, owns: bool = False) -> None:
    """Peft's logits against those of the reference, of the merged checkpoint and of the GGUF in llama.cpp."""
    import llama_cpp
    import numpy as np
    import torch

    ids = [5, 9, 3, 31, 7, 60]
    with torch.inference_mode():
        wanted = load(base, adapter, merge=False, rows=rows)(torch.tensor([ids])).logits[0].numpy()
        plain = load(base)(torch.tensor([ids])).logits[0].numpy()
    sample = Sample((tuple(ids),), tuple((0, at) for at in range(6)), (True,) * 6, 1)
    found = logits(Weights(base, adapter), sample, "tuned")
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)
    export_of(base, adapter, out, tokenizer=adapter if owns else base)
    with torch.inference_mode():
        merged = load(out / MERGED_DIRECTORY)(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(merged, wanted, atol=2e-4, rtol=1e-4)
    model = llama_cpp.Llama(str(out / GGUF_FILE), logits_all=True, n_ctx=64, verbose=False, n_threads=1)
    try:
        model.eval(ids)
        served = np.array(model.scores[: len(ids), : wanted.shape[1]])
    finally:
        model.close()
    count = plain.shape[1]
    moved = float(((plain - wanted[:, :count]) ** 2).mean())
    assert float(((served - wanted) ** 2).mean()) < min(1e-5 * wanted.var(), 0.02 * moved)


@pytest.mark.parametrize("case", APART)
def test_trained_apart_is_written_apart(case: str, tied: Path, tmp_path: Path) -> None:
    """Pitfall 23, silent wrong 6, D7."""
    adapter = make_adapter(tied, tmp_path / "adapter", **APART[case])
    told = validate_adapter(ValidateRequest(tied, adapter))
    assert (told.ok, told.untied, told.exports) == (True, True, ("merged",))
    assert "it trained embedding and output layer apart, which the base ties" in told.impurities
    check(tied, adapter, tmp_path / "out")
    assert "output.weight" in read_gguf(tmp_path / "out" / GGUF_FILE).tensors
    configuration = json.loads((tmp_path / "out" / MERGED_DIRECTORY / "config.json").read_text())
    assert configuration["tie_word_embeddings"] is False


@pytest.mark.parametrize("case", TIED)
def test_trained_as_one_is_written_as_one(case: str, tied: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tied, tmp_path / "adapter", **TIED[case])
    assert validate_adapter(ValidateRequest(tied, adapter)).untied is False
    check(tied, adapter, tmp_path / "out")
    assert "output.weight" not in read_gguf(tmp_path / "out" / GGUF_FILE).tensors


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("named", [(EMBEDDING,), (HEAD,), ("tokens", HEAD)])
def test_forge_trains_the_two_as_one(named: tuple[str, ...], method: str, tied: Path, tmp_path: Path) -> None:
    """`train.lora.modules_to_save` of a tied base: D7, pitfall 23."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    prepare_rows(tied, data)
    lora = {"r": 8, "alpha": 16, "modules_to_save": named}
    request = arguments(tied, data, out, method=method, lora=lora, max_steps=8)
    worker.perform(train, request, log=tmp_path / "log.txt")
    told = validate_adapter(ValidateRequest(tied, out))
    assert (told.untied, told.exports) == (False, ("merged",))
    check(tied, out, tmp_path / "exported")
    curve = (out / "logs" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(curve[-1])["loss"] < json.loads(curve[0])["loss"]


def test_forge_does_not_train_what_peft_does_not_tie(tmp_path: Path) -> None:
    """peft ties what is called embed_tokens or lm_head; of GPT-2's it warns, and trains them apart."""
    base = make_model(tmp_path / "base", "gpt2", "home-made")
    lora = {"r": 8, "alpha": 16, "modules_to_save": ("wte",)}
    (tmp_path / "data").mkdir()
    data = prepare_rows(base, tmp_path / "data")
    with pytest.raises(
        DataError, match=r"train\.lora\.modules_to_save: .* these are lm_head, transformer.wte"
    ):
        train(arguments(base, data, tmp_path / "out", method="lora", lora=lora))


def test_what_peft_was_asked_to_tie_in_vain(tmp_path: Path) -> None:
    """GPT-2's embedding: the configuration says tied, the file has a copy that was trained apart."""
    base = make_model(tmp_path / "base", "gpt2", "home-made", intermediate_size=1024)
    options: dict[str, Any] = {
        "modules_to_save": ["wte"],
        "ensure_weight_tying": True,
        "fan_in_fan_out": True,
    }
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    check(base, adapter, tmp_path / "out")
    assert "output.weight" in read_gguf(tmp_path / "out" / GGUF_FILE).tensors


@pytest.mark.parametrize("named", [EMBEDDING, HEAD])
def test_factors_that_are_kept_tied(named: str, tied: Path, tmp_path: Path) -> None:
    """peft puts the embedding's factors on the output layer too, turned around."""
    adapter = make_adapter(
        tied, tmp_path / "adapter", target_modules=[named, "q_proj"], ensure_weight_tying=True
    )
    assert validate_adapter(ValidateRequest(tied, adapter)).ok
    check(tied, adapter, tmp_path / "out")


@pytest.mark.parametrize("options", [TIED["one, whole"], APART["embedding, whole"], APART["both, whole"]])
def test_a_tied_base_that_stores_both(options: dict[str, Any], stored_twice: Path, tmp_path: Path) -> None:
    """The second tensor is the first for transformers, whatever a converter makes of it."""
    check(stored_twice, make_adapter(stored_twice, tmp_path / "adapter", **options), tmp_path / "out")


def test_both_resized_and_trained_apart(tied: Path, tmp_path: Path) -> None:
    """What trl's users do who add tokens: modules_to_save of both, on a small base."""
    adapter = make_resized(tied, tmp_path / "adapter", modules_to_save=[EMBEDDING, HEAD], multiple=128)
    told = validate_adapter(ValidateRequest(tied, adapter))
    assert told.untied and told.vocabulary_rows
    check(tied, adapter, tmp_path / "out", rows=told.vocabulary_rows, owns=True)


def test_factors_of_an_embedding_that_is_saved_without_its_weight(tmp_path: Path) -> None:
    """peft saves the weight beside the factors of embed_tokens, and of no other name."""
    base = make_model(tmp_path / "base", "gpt2", "home-made", intermediate_size=1024)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    assert validate_adapter(ValidateRequest(base, adapter)).ok
    check(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", family, "home-made", intermediate_size=1024)
    both = ["wte" if family == "gpt2" else EMBEDDING, HEAD]
    fields = {"fan_in_fan_out": True} if family == "gpt2" else {}
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=both, **fields)
    check(base, adapter, tmp_path / "out")


@pytest.fixture(scope="module")
def differing(stored_twice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose configuration says tied, and whose file has two tensors that differ."""
    import torch
    from safetensors.torch import load_file

    base = shutil.copytree(stored_twice, tmp_path_factory.mktemp("differing") / "base")
    weights = base / "model.safetensors"
    head = load_file(weights)["lm_head.weight"].float()
    change_tensors(weights, {"lm_head.weight": torch.flip(head, [0]).to(torch.bfloat16)})
    return base


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"trainable_token_indices": [3, 9]},
        {"modules_to_save": [EMBEDDING]},
        {"target_modules": [EMBEDDING, "q_proj"]},
    ],
)
def test_a_head_that_differs_is_not_tied(options: dict[str, Any], differing: Path, tmp_path: Path) -> None:
    """transformers ties no two tensors that differ; peft ties rows of tokens by the configuration."""
    adapter = make_adapter(differing, tmp_path / "adapter", **options)
    told = validate_adapter(ValidateRequest(differing, adapter))
    pure = options == {"target_modules": ["q_proj"]}
    assert (told.untied, told.exports) == (False, ("merged", "adapter") if pure else ("merged",))
    check(differing, adapter, tmp_path / "out")


@pytest.mark.parametrize("name", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_training_leaves_a_head_that_differs(name: tuple[str, ...], differing: Path) -> None:
    import torch

    model, ids = load(differing), torch.tensor([[5, 9, 3]])
    with torch.inference_mode():
        before = model(ids).logits
        lora = Train.model_validate({"lora": {"modules_to_save": name}}).lora
        after = with_lora(model, lora, quantized=False, checkpointing=False)(ids).logits
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj"]}, {"trainable_token_indices": [3, 9]}, APART["both, whole"]]
)
def test_a_configuration_that_is_silent(options: dict[str, Any], stored_twice: Path, tmp_path: Path) -> None:
    """A Llama that does not say whether it ties has two tensors for transformers 5, equal or not."""
    base = shutil.copytree(stored_twice, tmp_path / "base")
    change_json(base / "config.json", tie_word_embeddings=None)
    check(base, make_adapter(base, tmp_path / "adapter", **options), tmp_path / "out")


def test_rows_named_by_the_ends_of_modules(tied: Path, tmp_path: Path) -> None:
    rows = {"tokens": [3, 9], "head": [5, 31]}
    check(tied, make_adapter(tied, tmp_path / "adapter", trainable_token_indices=rows), tmp_path / "out")


def test_what_is_saved_whole_is_counted(tied: Path, tmp_path: Path) -> None:
    """The most room that an adapter can take: a tied embedding is saved for both."""
    tensors = open_checkpoint(tied).tensors
    both = 2 * tensors["model.embed_tokens.weight"].numel
    found = {named: saved_whole(tensors, [named]) for named in (EMBEDDING, HEAD, "norm", "mlp")}
    assert (found[EMBEDDING], found[HEAD]) == (both, both)
    assert (found["norm"], found["mlp"]) == (5 * 256, 2 * 3 * 256 * 512)
    adapter = make_adapter(tied, tmp_path / "adapter", **TIED["both, whole"])
    saved = read_header(adapter / "adapter_model.safetensors").items()
    assert both == sum(spec.numel for name, spec in saved if "lora" not in name)


def test_an_embedding_that_is_scaled(tmp_path: Path) -> None:
    """Gemma 3 multiplies what it looks up, and its GGUF has a place for an output layer."""
    import numpy as np
    import torch

    base = make_model(tmp_path / "base", "gemma3_text", "gemma-spm")
    for kind, options in {"whole": {"modules_to_save": [EMBEDDING]}, "rows": TIED["rows of tokens"]}.items():
        adapter = make_adapter(base, tmp_path / kind, **options)
        ids = [5, 9, 3, 31, 7, 60]
        sample = Sample((tuple(ids),), tuple((0, at) for at in range(6)), (True,) * 6, 1)
        with torch.inference_mode():
            wanted = load(base, adapter, merge=False)(torch.tensor([ids])).logits[0].numpy()
        found = logits(Weights(base, adapter), sample, "tuned")
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "vocabulary", "name"),
    [("gemma2", "gemma-spm", "gemma2"), ("cohere", "home-made", "command-r")],
)
def test_a_family_that_has_one_tensor_only_is_refused(
    family: str, vocabulary: str, name: str, tmp_path: Path
) -> None:
    """llama.cpp has no output layer of their own for these: nothing could hold the second tensor."""
    base = make_model(tmp_path / "base", family, vocabulary)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=[EMBEDDING])
    with pytest.raises(DataError, match=f"has one tensor for the two in {name}") as refused:
        export_of(base, adapter, tmp_path / "out", tokenizer=base)
    assert "ensure_weight_tying" in refused.value.hint
    assert not (tmp_path / "out" / GGUF_FILE).exists()


def test_the_certificate_sees_a_retied_head(tied: Path, tmp_path: Path) -> None:
    """The sound file, and what is left of it without its output layer: llama.cpp takes the embedding."""
    adapter = make_adapter(tied, tmp_path / "adapter", modules_to_save=[EMBEDDING, HEAD])
    specimen = Specimen(tied, adapter, write_rows(tied, tmp_path), tmp_path)
    owns = {"end_of_turn_id": format_of(tied).end_of_turn_id}
    export_of(tied, adapter, tmp_path / "out", tokenizer=tied)
    sound = tmp_path / "out" / GGUF_FILE
    found = specimen.verify(sound, **owns)
    assert found["ok"], found["problems"]
    broken = rewrite(sound, tmp_path / "broken.gguf", {"output.weight": None})
    found = specimen.verify(broken, f16=str(sound), **owns)
    assert (found["ok"], found["broken_stage"]) == (False, "convert"), found["verdict"]
    assert "missing from the file, such as lm_head.weight" in found["verdict"]


@pytest.mark.parametrize("case", ["embedding, whole", "both, whole", "embedding, factors"])
def test_what_is_read_otherwise_than_peft_has_it_is_refused(
    case: str, tied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The export that ties what was trained apart; the reference is peft's, and shares nothing with it."""
    adapter = make_adapter(tied, tmp_path / "adapter", **APART[case])
    specimen = Specimen(tied, adapter, write_rows(tied, tmp_path), tmp_path)
    owns = {"end_of_turn_id": format_of(tied).end_of_turn_id}
    export_of(tied, adapter, tmp_path / "sound", tokenizer=tied)
    sound = specimen.verify(tmp_path / "sound" / GGUF_FILE, **owns)
    assert sound["ok"], sound["problems"]
    monkeypatch.setattr(vocabulary, "_moves_embedding_alone", lambda adapter: False)
    monkeypatch.setattr(vocabulary, "_heads", lambda adapter: iter(()))
    monkeypatch.setattr(vocabulary, "is_copy", lambda one, other: True)
    export_of(tied, adapter, tmp_path / "out", tokenizer=tied)
    found = specimen.verify(tmp_path / "out" / GGUF_FILE, **owns)
    assert not found["ok"]
    # The output layer's rows by themselves say so, whatever the logits are held against.
    assert any("output.weight of the file" in one or "missing" in one for one in found["problems"]), found
