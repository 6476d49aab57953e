"""Every fault that users meet, in a real file: caught, and put on the stage that caused it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.chat.template import ChatTemplate
from forge.errors import DataError, StageError
from forge.export import proof
from forge.export.run import ADAPTER_FILE, GGUF_FILE
from forge.model.gguf_header import read_gguf
from forge.model.safetensors_header import read_header
from forge.model.tokenizer_files import read_tokenizer, read_vocabulary
from forge.verify.measurement import StopCheck
from forge.verify.pretokenizers import other_pre_tokenizer
from forge.verify.vocabulary import check_vocabulary
from forge.verify.yardstick import make_quantized
from tests.exporting import export_here
from tests.models import PEFT_WARNS, change_json, change_tensors, load, make_adapter
from tests.specimens import Specimen, make_specimen, merged_tensors, rewrite, scaled, source_of
from tests.test_resized import export_of

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500), PEFT_WARNS]


@pytest.fixture(scope="module")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    return make_specimen(tmp_path_factory.mktemp("specimen") / "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def sound(specimen: Specimen) -> Path:
    return specimen.f16(specimen.scratch / "sound")


def _with_weights(specimen: Specimen, sound: Path, base: Path, adapter: Path | None, **options: Any) -> Path:
    return rewrite(sound, specimen.scratch / "broken.gguf", merged_tensors(base, adapter, **options))


def _scaled_by(times: float) -> Callable[[Specimen, Path, Path], Path]:
    def make(specimen: Specimen, sound: Path, scratch: Path) -> Path:
        assert specimen.adapter
        adapter = scaled(specimen.adapter, scratch / "adapter", times)
        return _with_weights(specimen, sound, specimen.base, adapter)

    return make


def _changed_base(specimen: Specimen, scratch: Path, change: Callable[[str, Any], Any]) -> Path:
    """The base with its matrices changed."""
    from safetensors.torch import load_file

    base = scratch / "other"
    shutil.copytree(specimen.base, base)
    tensors = load_file(base / "model.safetensors")
    changed = {name: change(name, one).to(one.dtype) for name, one in tensors.items() if one.dim() == 2}
    change_tensors(base / "model.safetensors", changed)
    return base


def _wrong_revision(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    import torch

    generator = torch.Generator().manual_seed(5)

    def change(name: str, tensor: Any) -> Any:
        return tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return _with_weights(specimen, sound, _changed_base(specimen, scratch, change), specimen.adapter)


def _merged_into_4_bit(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    import bitsandbytes.functional as nf4

    def change(name: str, tensor: Any) -> Any:
        if "proj" not in name:
            return tensor
        packed, state = nf4.quantize_4bit(tensor.float(), quant_type="nf4", compress_statistics=True)
        return nf4.dequantize_4bit(packed, state)

    return _with_weights(specimen, sound, _changed_base(specimen, scratch, change), specimen.adapter)


def _not_applied(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    return _with_weights(specimen, sound, specimen.base, None)


def _stale(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    earlier = make_adapter(specimen.base, scratch / "earlier", seed=77)
    return _with_weights(specimen, sound, specimen.base, earlier)


def _permuted(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    return _with_weights(specimen, sound, specimen.base, specimen.adapter, key_heads=4)


def _without_head(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    """What is left when a head of its own is dropped: llama.cpp takes the embedding instead."""
    return rewrite(sound, scratch / "broken.gguf", {"output.weight": None})


def _lost_rows(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    import numpy as np

    tensors = merged_tensors(specimen.base, specimen.adapter)
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = np.array(tensors[name])
        tensors[name][:3] = 0  # the added tokens of this vocabulary
    return rewrite(sound, scratch / "broken.gguf", tensors)


def _pre_tokenizer(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    return rewrite(sound, scratch / "broken.gguf", tokenizer__ggml__pre="gpt-2")


def _another_template(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    template = (specimen.base / "chat_template.jinja").read_text(encoding="utf-8")
    assert "<|im_start|>" in template
    changed = template.replace("<|im_start|>", "<|im_start|> ")
    return rewrite(sound, scratch / "broken.gguf", tokenizer__chat_template=changed)


def _thinking(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    template = (specimen.base / "chat_template.jinja").read_text(encoding="utf-8")
    switch = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    return rewrite(sound, scratch / "broken.gguf", tokenizer__chat_template=template + switch)


def _bos(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    """The tokenizer puts a BOS before what the template has begun with one."""
    changes: dict[str, Any] = {"tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__add_bos_token": True}
    template = (specimen.base / "chat_template.jinja").read_text(encoding="utf-8")
    changes["tokenizer__chat_template"] = "{{ bos_token }}" + template  # <|im_start|> is its BOS
    return rewrite(sound, scratch / "broken.gguf", **changes)


@pytest.mark.parametrize("key", ["eos", "eot", "eom"])
def test_a_word_that_ends_an_answer_is_named(
    key: str, specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """O1: the end of turn ends it still, by its other id or its name; so does a token of plain text."""
    files = read_tokenizer(specimen.base)
    assert files.chat_template
    template = ChatTemplate(files.chat_template, files.template_tokens)
    asked = [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]]
    ids = read_vocabulary(specimen.base)

    def stops(gguf: Path) -> StopCheck:
        return check_vocabulary(gguf, specimen.base, template, asked, ids["<|im_end|>"]).stops

    assert stops(sound) == StopCheck(True, "<|im_end|>")
    changes: dict[str, Any] = {f"tokenizer__ggml__{key}_token_id": ids["*"]}
    broken = rewrite(sound, tmp_path / "broken.gguf", **changes)
    assert stops(broken) == StopCheck(False, "<|im_end|>", ("*",))


def _swapped(values: list[Any], at: int) -> list[Any]:
    return [*values[:at], values[at + 1], values[at], *values[at + 2 :]]


def _typed(kind: int, at: int) -> Callable[[list[Any]], list[Any]]:
    return lambda types: [kind if number == at else one for number, one in enumerate(types)]


_TABLE: Mapping[str, tuple[str, Any, str]] = {
    "two tokens swapped": ("tokens", lambda tokens: _swapped(tokens, 300), "token 300 is "),
    "a merge dropped": (
        "merges",
        lambda merges: [*merges[:50], *merges[51:]],
        "tokenizer.ggml.merges: merge 50 is ",
    ),
    "the last merge dropped": ("merges", lambda merges: merges[:-1], " merges, the tokenizer has "),
    "a word as control": ("token_type", _typed(3, 300), "is control, in the tokenizer plain text"),
    "a special token as text": ("token_type", _typed(1, 1), "is plain text, in the tokenizer special"),
    "a special token that is shown": (
        "token_type",
        _typed(4, 1),
        "is user-defined, in the tokenizer special",
    ),
    "a word that is read wherever it stands": (
        "token_type",
        _typed(4, 300),
        "is user-defined, in the tokenizer plain text",
    ),
    "a special token as unknown": ("token_type", _typed(2, 1), "is unknown, in the tokenizer special"),
    "another BOS": ("bos_token_id", 300, "bos_token_id: is 300, the base's is none"),
    "a word as PAD": ("padding_token_id", 300, "padding_token_id: is 300, the base's is "),
    "a word as UNK": ("unknown_token_id", 300, "unknown_token_id: is 300, the base's is none"),
}


@pytest.mark.parametrize("fault", _TABLE)
def test_an_entry_that_no_text_has_is_the_tokenizers(
    fault: str, specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    key, value, words = _TABLE[fault]
    if callable(value):
        value = value(list(read_gguf(sound).array(f"tokenizer.ggml.{key}")))
    broken = rewrite(sound, tmp_path / "broken.gguf", **{f"tokenizer__ggml__{key}": value})
    asked = [[{"role": "user", "content": "Hi."}]]
    files = read_tokenizer(specimen.base)
    assert files.chat_template
    template = ChatTemplate(files.chat_template, files.template_tokens)
    assert check_vocabulary(sound, specimen.base, template, asked, 2).tokens.ok
    found = check_vocabulary(broken, specimen.base, template, asked, 2).tokens
    assert not found.ok and words in found.message, found.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"eos_token_id": None, "eot_token_id": None}, None), ({"eot_token_id": 1}, "<|im_start|>")],
    ids=["none named", "a turn's beginning"],
)
def test_llama_cpp_ends_an_answer_only_where_the_base_does(
    changes: dict[str, Any], words: str | None, specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """Where a file names no end llama.cpp takes a token by its number."""
    named: dict[str, Any] = {f"tokenizer__ggml__{key}": value for key, value in changes.items()}
    broken = rewrite(sound, tmp_path / "broken.gguf", **named)
    found = check_vocabulary(broken, specimen.base, None, [], 2).stops
    assert not found.ok and len(found.words) == 1
    assert words is None or found.words == (words,)


@pytest.mark.parametrize("has_f16", [True, False])
def test_metadata_that_no_row_shows_is_a_fault(
    has_f16: bool, specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """Held to llama.cpp's own header, which is made where its file is not.

    The pre-tokenizer takes capitals apart, as no row has them.
    """
    changes: dict[str, Any] = {
        "llama__attention__layer_norm_rms_epsilon": 2e-6,
        "tokenizer__ggml__pre": "gpt-4o",
    }
    beside = {"f16": str(sound)} if has_f16 else {}
    found = specimen.verify(rewrite(sound, tmp_path / "broken.gguf", **changes), **beside)
    assert all(handover["ok"] for handover in found["handovers"])
    assert (found["ok"], found["broken_stage"]) == (False, "convert")
    for words in (
        "epsilon is 2e-06, the base's is 1e-06",
        "tokenizer.ggml.pre is gpt-4o, the base's is qwen2, which reads ",
    ):
        assert words in found["verdict"]


def test_another_pad_is_said_and_no_fault(specimen: Specimen, sound: Path, tmp_path: Path) -> None:
    """Tools that convert choose their own; llama.cpp pads nothing that it answers."""
    found = specimen.verify(rewrite(sound, tmp_path / "other.gguf", tokenizer__ggml__padding_token_id=1))
    assert found["ok"], found["verdict"]
    assert any("padding_token_id is 1, the base's is " in remark for remark in found["warnings"])
    assert not any("padding" in remark for remark in specimen.verify(sound)["warnings"])


def test_another_name_of_the_same_pre_tokenizer_is_no_fault(
    specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """To this vocabulary: it has no token of several digits."""
    other = rewrite(sound, tmp_path / "other.gguf", tokenizer__ggml__pre="llama-bpe")
    assert other_pre_tokenizer(read_gguf(other), read_gguf(sound), specimen.base) is None


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_a_share_of_the_adapter_that_rounding_hides(
    kind: str, specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """0.9 times in all modules; not at all in one of them."""
    assert specimen.adapter
    adapter = scaled(specimen.adapter, tmp_path / "adapter", 0.9)
    name = "blk.1.attn_v.weight"
    without = {name: merged_tensors(specimen.base, None)[name]}
    whole = merged_tensors(specimen.base, adapter)
    for tensors, words in ((whole, "the adapter is in the file 0.9"), (without, f"in {name}")):
        broken = rewrite(sound, tmp_path / "broken.gguf", tensors)
        found = specimen.verify(make_quantized(broken, tmp_path / "file.gguf", kind, 2), f16=str(sound))
        assert (found["ok"], found["broken_stage"]) == (False, "merge")
        assert words in found["verdict"]


def test_a_tensor_that_is_not_as_in_llama_cpps_own(specimen: Specimen, sound: Path, tmp_path: Path) -> None:
    """Of a coarser type than the mixture has, of a finer one, and a norm that is 1 % too large."""
    import gguf

    quantized, coarse, fine = (
        make_quantized(sound, tmp_path / f"{kind}.gguf", kind, 2) for kind in ("q4_k_m", "q4_0", "q8_0")
    )
    name, norm = "blk.0.attn_v.weight", "blk.1.ffn_norm.weight"

    def held(file: Path, name: str) -> Any:
        return next(tensor for tensor in gguf.GGUFReader(str(file)).tensors if tensor.name == name)

    def verified(tensor: Any, name: str) -> Mapping[str, Any]:
        file = rewrite(quantized, tmp_path / "file.gguf", {name: tensor})
        found = specimen.verify(file, f16=str(sound))
        assert all(handover["ok"] for handover in found["handovers"])
        return found

    found = verified(held(coarse, name), name)
    assert (found["ok"], found["broken_stage"]) == (False, "quantize")
    assert f"{name} is Q4_0 in the file, Q4_K in llama.cpp's own" in found["verdict"]
    found = verified(held(fine, name), name)
    assert found["ok"] and f"{name} is Q8_0, there Q4_K" in str(found["warnings"])
    found = verified(held(quantized, norm).data * 1.01, norm)
    assert (found["ok"], found["broken_stage"]) == (False, "convert")
    assert f"1 of 21 tensors ({norm}) are not what" in found["verdict"]


@pytest.mark.parametrize(("branch", "ok"), [("tools", False), ("messages|length > 50", True)])
def test_a_template_of_another_text_is_asked_for_what_no_row_has(
    branch: str, ok: bool, specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """Calls of tools; what is still not asked is said."""
    files = read_tokenizer(specimen.base)
    assert files.chat_template
    other = files.chat_template + f"{{% if {branch} %}}!{{% endif %}}"
    broken = rewrite(sound, tmp_path / "broken.gguf", tokenizer__chat_template=other)
    template = ChatTemplate(files.chat_template, files.template_tokens)
    asked = [[{"role": "user", "content": "Hi."}]]
    assert check_vocabulary(sound, specimen.base, template, asked, 2).prompt.reason == ""
    found = check_vocabulary(broken, specimen.base, template, asked, 2).prompt
    assert found.ok is ok
    assert "their text differs" in found.message if not ok else "is another text" in found.reason


def test_a_template_that_takes_spaces_off_is_another(specimen: Specimen, sound: Path, tmp_path: Path) -> None:
    source = read_tokenizer(specimen.base).chat_template
    assert source and "message['content'] +" in source
    other = source.replace("message['content'] +", "message['content'] | trim +")
    broken = rewrite(sound, tmp_path / "broken.gguf", tokenizer__chat_template=other)
    asked = [[{"role": "user", "content": "Hi."}]]
    assert not check_vocabulary(broken, specimen.base, ChatTemplate(source), asked, 2).prompt.ok


def _numbers(specimen: Specimen, sound: Path, scratch: Path) -> Path:
    changes: dict[str, Any] = {"llama__attention__layer_norm_rms_epsilon": 0.5}
    changes |= {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    return rewrite(sound, scratch / "broken.gguf", **changes)


_IN_METADATA = {_bos, _pre_tokenizer, _another_template, _thinking}
FAULTS = {
    "wrong base revision": (_wrong_revision, "merge", "another base or revision"),
    "scale x 8": (_scaled_by(8), "merge", "times: its scale was computed wrongly"),
    "dropped lm_head": (_without_head, "convert", "lm_head.weight"),
    "double BOS": (_bos, "convert", "BOS"),
    "permuted Q/K": (_permuted, "convert", "attn_k.weight"),
    "lost added rows": (_lost_rows, "convert", "3 rows of"),
    "adapter not applied": (_not_applied, "merge", "the adapter was not applied"),
    "merged twice": (_scaled_by(2), "merge", "merged twice"),
    "merged into 4-bit": (_merged_into_4_bit, "merge", "4-bit"),
    "wrong pre-tokenizer": (_pre_tokenizer, "convert", "tokenizer gives other ids"),
    "another base's numbers": (_numbers, "convert", "epsilon is 0.5, the base's is 1e-"),
    "stale merged directory": (_stale, "merge", "earlier run"),
    "another template": (_another_template, "convert", "chat template"),
    "thinking switched on": (_thinking, "convert", "chat template"),
}


def test_a_sound_file_passes_and_its_quantized_one_too(specimen: Specimen, sound: Path) -> None:
    found = specimen.verify(sound)
    assert found["ok"], found["problems"]
    assert found["broken_stage"] is None
    assert found["logits"]["top1"] > 0.99  # random weights: many near ties
    assert found["prompt"]["compared"] == 2 + 2 * 16  # rows as they are, and up to their answers
    quantized = make_quantized(sound, specimen.scratch / "sound-q4_k_m.gguf", "q4_k_m", 2)
    found = specimen.verify(quantized, trained_in_4bit=True)
    assert found["ok"], found["problems"]
    assert [one["from"] for one in found["handovers"]] == [
        "as trained (NF4 base + adapter)", "fp32 base + adapter", "weights in F16", "GGUF f16",
    ]  # fmt: skip
    assert found["handovers"][-1]["beyond_vendor"] == 1.0


def test_a_file_that_does_not_say_its_type_is_held_against_its_tensors(
    specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """1024: llama.cpp's word for a type that it has guessed. The coarsest mixture of q4_k_m is q4_k_s."""
    quantized = make_quantized(sound, tmp_path / "q4_k_m.gguf", "q4_k_m", 2)
    for file, kind in ((sound, "f16"), (quantized, "q4_k_s")):
        silent = rewrite(file, tmp_path / f"silent-{kind}.gguf", general__file_type=1024)
        found = specimen.verify(silent, f16=str(sound))
        assert found["ok"], found["problems"]
        assert found["handovers"][-1]["to"] == f"GGUF {kind}"
    unadapted = merged_tensors(specimen.base, None)
    broken = rewrite(sound, tmp_path / "broken.gguf", unadapted, general__file_type=1024)
    coarse = make_quantized(broken, tmp_path / "coarse.gguf", "q4_k_m", 2)
    coarse = rewrite(coarse, tmp_path / "silent-coarse.gguf", general__file_type=1024)
    for file in (broken, coarse):
        found = specimen.verify(file, f16=str(sound))
        assert (found["ok"], found["broken_stage"]) == (False, "merge")
        assert "not applied" in found["verdict"]


def test_a_file_that_calls_itself_coarser_than_it_is_gets_no_allowance(
    specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """10 is Q2_K, which may lose a hundred times what Q8_0 or F16 may."""
    claimed = rewrite(sound, tmp_path / "claimed.gguf", general__file_type=10)
    found = specimen.verify(claimed, f16=str(sound))
    assert found["ok"] and found["file"]["type"] == "f16"
    unadapted = rewrite(sound, tmp_path / "unadapted.gguf", merged_tensors(specimen.base, None))
    eight = make_quantized(unadapted, tmp_path / "q8_0.gguf", "q8_0", 2)
    for file, kind in ((unadapted, "f16"), (eight, "q8_0")):
        claimed = rewrite(file, tmp_path / f"claimed-{kind}.gguf", general__file_type=10)
        found = specimen.verify(claimed, f16=str(sound))
        assert (found["ok"], found["broken_stage"], found["file"]["type"]) == (False, "merge", kind)
        assert (
            f"the file says that it is q2_k, its weights are {kind}: held against that" in found["warnings"]
        )


@pytest.mark.slow
def test_a_file_that_calls_itself_finer_than_it_is_is_held_to_its_word(
    specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """18 is Q6_K: what Q4_K loses is too much for it, though base and adapter are right."""
    quantized = make_quantized(sound, tmp_path / "q4_k_m.gguf", "q4_k_m", 2)
    claimed = rewrite(quantized, tmp_path / "claimed.gguf", general__file_type=18)
    found = specimen.verify(claimed, f16=str(sound))
    assert (found["ok"], found["broken_stage"], found["file"]["type"]) == (False, "quantize", "q6_k")
    remark = (
        "the file says that it is q6_k, its weights are mostly Q4_K, those of llama.cpp's own mostly Q6_K"
    )
    assert found["verdict"] == remark and remark in found["warnings"]


def test_a_type_that_llama_cpp_does_not_make_is_not_certified(
    specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """IQ2_XXS asks for an importance matrix: there is nothing to hold the file against, told early."""
    quantized = make_quantized(sound, tmp_path / "q4_k_m.gguf", "q4_k_m", 2)
    claimed = rewrite(quantized, tmp_path / "claimed.gguf", general__file_type=19)
    with pytest.raises(DataError, match=r"makes iq2_xxs files .* with an importance matrix only") as refused:
        specimen.verify(claimed, f16=str(sound))
    assert str(refused.value.problems[-1]).startswith("it failed at: the file's header")
    assert "--imatrix" in refused.value.hint
    with pytest.raises(StageError, match="makes no files of type mxfp4"):
        make_quantized(sound, tmp_path / "none.gguf", "mxfp4", 1)


# Of the weights, so to be told from what quantizing does to them.
IN_WEIGHTS = [name for name, fault in FAULTS.items() if fault[0] not in _IN_METADATA]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind"), [*((name, "f16") for name in FAULTS), *((name, "q4_k_m") for name in IN_WEIGHTS)]
)
def test_fault(fault: str, kind: str, specimen: Specimen, sound: Path, tmp_path: Path) -> None:
    make, stage, words = FAULTS[fault]
    broken = make(specimen, sound, tmp_path)
    if kind != "f16":
        broken = make_quantized(broken, tmp_path / "quantized.gguf", kind, 2)
    found = specimen.verify(broken, f16=str(sound))
    assert not found["ok"]
    assert (found["broken_stage"], words) == (stage, words if words in found["verdict"] else found["verdict"])
    assert found["remedy"]


def test_a_scale_in_bf16_is_named(specimen: Specimen, tmp_path: Path) -> None:
    """Beside llama.cpp's own bf16; beside its f16 the rounding alone would look like another adapter's."""
    assert specimen.adapter
    adapter = scaled(specimen.adapter, tmp_path / "adapter", 3)
    export_of(specimen.base, adapter, tmp_path / "out", tokenizer=specimen.base, quant="bf16")
    found = specimen.verify(tmp_path / "out" / GGUF_FILE)
    assert (found["ok"], found["broken_stage"]) == (False, "merge")
    assert found["verdict"].startswith("the adapter is in the file 3 times")


@pytest.mark.parametrize("fault", ["another template", "wrong pre-tokenizer", "another day"])
def test_a_prompt_that_differs_is_shown(fault: str, specimen: Specimen, sound: Path, tmp_path: Path) -> None:
    """As text, or as ids where the text is the same."""
    files = read_tokenizer(specimen.base)
    assert files.chat_template
    if fault == "another day":
        dated = "{% if strftime_now('%Y') == '2001' %}!{% endif %}"
        broken = rewrite(sound, tmp_path / "m.gguf", tokenizer__chat_template=files.chat_template + dated)
    else:
        broken = FAULTS[fault][0](specimen, sound, tmp_path)
    template = ChatTemplate(files.chat_template, files.template_tokens)
    asked = [[{"role": "user", "content": text}] for text in proof.test_strings() if text.strip()]
    found = check_vocabulary(broken, specimen.base, template, asked, None).prompt
    assert (found.ok, found.compared) == (False, len(asked))
    example = found.examples[0]
    assert ("ids" in example) is (fault == "wrong pre-tokenizer")
    assert example["trained"] != example["file"]
    assert (example["file"] == "a text that depends on the day") is (fault == "another day")


def test_an_adapter_that_learned_nothing(specimen: Specimen, tmp_path: Path) -> None:
    """Its B is zero, as before the first step: every file of it is the base."""
    from safetensors.torch import load_file

    assert specimen.adapter
    adapter = tmp_path / "adapter"
    shutil.copytree(specimen.adapter, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    zeros = {name: one * 0 for name, one in weights.items() if "lora_B" in name}
    change_tensors(adapter / "adapter_model.safetensors", zeros)
    empty = Specimen(specimen.base, adapter, specimen.rows, tmp_path)
    found = empty.verify(empty.f16(tmp_path / "f16"))
    assert found["broken_stage"] == "train"
    assert "changes nothing" in found["verdict"]


def test_dora_is_certified_and_missed(specimen: Specimen, sound: Path, tmp_path: Path) -> None:
    """A merge that is sound; the same factors merged without their magnitudes; the base alone."""
    adapter = make_adapter(specimen.base, tmp_path / "adapter", use_dora=True)
    tuned = Specimen(specimen.base, adapter, specimen.rows, tmp_path)
    file = tuned.f16(tmp_path / "f16")
    found = tuned.verify(file)
    assert found["ok"], found["problems"]
    magnitudes = [name for name in read_header(adapter / "adapter_model.safetensors") if "magnitude" in name]
    plain = tmp_path / "plain"
    shutil.copytree(adapter, plain)
    change_tensors(plain / "adapter_model.safetensors", dict.fromkeys(magnitudes))
    change_json(plain / "adapter_config.json", use_dora=False)
    for other, words in ((plain, "another adapter"), (None, "not applied")):
        broken = _with_weights(tuned, sound, tuned.base, other)
        found = tuned.verify(broken, f16=str(file))
        assert (found["ok"], found["broken_stage"]) == (False, "merge")
        assert words in found["verdict"]


@pytest.mark.slow
def test_a_stale_merged_directory_beside_a_sound_file(
    specimen: Specimen, sound: Path, tmp_path: Path
) -> None:
    """`--merged`: the hand-over to the merged checkpoint is measured on its own."""
    earlier = make_adapter(specimen.base, tmp_path / "earlier", seed=77)
    for adapter, ok in ((specimen.adapter, True), (earlier, False)):
        merged = tmp_path / f"merged-{ok}"
        load(specimen.base, adapter).save_pretrained(merged)
        found = specimen.verify(sound, merged=str(merged))
        assert found["ok"] is ok, found["problems"]
        assert found["broken_stage"] == (None if ok else "merge")
        assert found["handovers"][0]["to"] == "merged"


def test_an_adapter_beside_its_base(specimen: Specimen, tmp_path: Path) -> None:
    """The two are the tuned model together, and not the base's file by itself."""
    (tmp_path / "pair").mkdir()
    pair = {**source_of(specimen), "data": None, "out": str(tmp_path / "pair")}
    chosen = {"name": "yoda", "quant": "f16", "keep_merged": False, "threads": 2, "end_of_turn_id": 2}
    export_here(**pair, settings={**chosen, "mode": "adapter"})
    base, lora = tmp_path / "pair" / GGUF_FILE, tmp_path / "pair" / ADAPTER_FILE
    assert specimen.verify(base, lora=str(lora))["ok"]
    assert "not applied" in specimen.verify(base)["verdict"]


@pytest.mark.slow
def test_a_merge_into_nf4(specimen: Specimen, tmp_path: Path) -> None:
    """It is what it should be when it is said to be that, and a fault otherwise."""
    file = specimen.f16(tmp_path / "nf4", merge_base="nf4")
    found = specimen.verify(file, merge_base="nf4", trained_in_4bit=True)
    assert found["ok"], found["problems"]
    assert found["handovers"][0]["from"] == "NF4 base + adapter"
    assert "4-bit" in specimen.verify(file)["verdict"]


@pytest.mark.slow
def test_faults_of_a_mixture_of_experts_are_no_near_ties(tmp_path: Path) -> None:
    """Its sound file passes, beyond the limits at a fifth of the positions; these are so at most."""
    import gguf
    import numpy as np

    changes = {"num_local_experts": 8, "num_hidden_layers": 6}
    mixture = make_specimen(tmp_path / "mixtral", "mixtral", seed=27, **changes)
    sound = mixture.f16(tmp_path / "f16")
    found = mixture.verify(sound, f16=str(sound))
    assert found["ok"], found["verdict"]
    assert any("near ties between experts" in warning for warning in found["warnings"])
    assert mixture.adapter
    other = replace(mixture, adapter=scaled(mixture.adapter, tmp_path / "scaled", 2))
    found = other.verify(sound, f16=str(sound))
    assert (found["broken_stage"], "near ties" in str(found["warnings"])) == ("merge", False)
    quantized = make_quantized(sound, tmp_path / "q4_k_m.gguf", "q4_k_m", 2)
    assert mixture.verify(quantized, f16=str(sound))["ok"]
    # Four bits alone put it nearly as far from f16: the weights tell.
    assert other.verify(quantized)["broken_stage"] == "merge"
    name = "blk.2.ffn_down_exps.weight"
    down = next(one for one in gguf.GGUFReader(str(sound)).tensors if one.name == name)
    turned = {name: np.roll(np.array(down.data), 1, axis=0)}
    found = mixture.verify(rewrite(sound, tmp_path / "turned.gguf", turned), f16=str(sound))
    assert found["broken_stage"] == "convert"
