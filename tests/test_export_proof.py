"""The vocabulary of the GGUF is proved on rendered prompts, for real vocabularies and for seeded faults."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge.chat.template import ChatTemplate, Message
from forge.errors import CheckError, StageError
from forge.export import pretokenizer, proof
from forge.export.request import ExportRequest, Ingredients
from forge.export.run import _choose
from forge.export.tokenizer import repair_tokenizer
from forge.export.upstream import Choices
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import open_tokenizer, read_tokenizer
from forge.verify.vocabulary import check_vocabulary
from tests.specimens import rewrite
from tests.vocabularies import HUB, converters, home_made_tokenizer, write_tokenizer
from tests.vocabulary_gguf import vocabulary_gguf

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500)]

ARCHITECTURES = {
    "phi-3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma-3": "Gemma3ForCausalLM", "deepseek-v3": "DeepseekV3ForCausalLM", "gpt-oss": "GptOssForCausalLM",
}  # fmt: skip
KINDS = {"gemma-3": "gemma3_text", "deepseek-v3": "deepseek_v3", "gpt-oss": "gpt_oss"}
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v3": {
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "kv_lora_rank": 64,
        "q_lora_rank": 64, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 256, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    "gpt-oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
}  # fmt: skip
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "head_dim": 64,
    "original_max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


def directory_of(path: Path, vocabulary: str) -> Path:
    """A checkpoint's files without weights: all that the vocabulary's conversion reads."""
    rows = -(-write_tokenizer(path, vocabulary) // 64) * 64
    architecture = ARCHITECTURES.get(vocabulary, "LlamaForCausalLM")
    kind = KINDS.get(vocabulary, architecture.removesuffix("ForCausalLM").lower())
    fields = {"architectures": [architecture], "model_type": kind, "vocab_size": rows}
    config = {**SIZES, **fields, **FIELDS.get(vocabulary, {})}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if vocabulary in HUB:
        repair_tokenizer(path, rows)
    return path


def template_of(directory: Path) -> ChatTemplate:
    files = read_tokenizer(directory)
    assert files.chat_template
    return ChatTemplate(files.chat_template, files.template_tokens)


def convert(directory: Path, name: str = "yoda", **changes: Any) -> Path:
    """The vocabulary as GGUF, with forge's decisions; `changes` seed faults."""
    template = template_of(directory)
    bos = read_tokenizer(directory).tokens.get("bos")
    start = template.render([{"role": "user", "content": "x"}])
    decided = {
        "pre_tokenizer": pretokenizer.pretokenizer_of(pretokenizer.read_stated(directory)),
        "adds_bos": bool(bos and start.startswith(bos)),
        "space_prefix": pretokenizer.space_prefix(pretokenizer.read_stated(directory)),
    }
    choices = Choices(**{**decided, **changes})
    return vocabulary_gguf(converters(), directory, directory / "vocabulary.gguf", choices, name)


def compare(
    directory: Path, vocabulary: Path, conversations: Sequence[Sequence[Message]] = ()
) -> proof.ComparedIds:
    tried = proof.cases(template_of(directory), proof.test_strings(), conversations)
    return proof.compare_ids(directory, vocabulary, tried)


EXPECTED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "llama-spm": ("", ()),
    "llama-bpe": ("llama-bpe", ()),
    "qwen2": (
        "qwen2",
        (
            "text with </s>, which llama.cpp reads as a special token",
            "text that is not in Unicode normal form C",
        ),
    ),
    "phi-3": ("", ("a message that begins with white space other than ASCII's",)),
    "home-made": ("qwen2", ()),
    "qwen3": (
        "qwen2",
        (
            "text with </s>, which llama.cpp reads as a special token",
            "text that is not in Unicode normal form C",
        ),
    ),
    "gemma-3": ("", ()),
    "llama-3.1": ("llama-bpe", ()),
    "llama-2": ("", ()),
    "deepseek-v3": ("", ()),
    "gpt-oss": ("", ()),
}
BEGINS_WITH_BOS = {"llama-bpe", "gemma-3", "llama-3.1", "llama-2", "deepseek-v3"}


@pytest.mark.parametrize(
    "vocabulary",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("llama-bpe", "qwen2", *HUB) else [])
        for name in EXPECTED
    ],
)
def test_real_vocabularies_are_proved(vocabulary: str, tmp_path: Path) -> None:
    """Pitfalls 48 and 49: one BOS or none as in training; the same ids for some 280 hard texts."""
    directory = directory_of(tmp_path / "base", vocabulary)
    decided, limits = EXPECTED[vocabulary]
    assert pretokenizer.pretokenizer_of(pretokenizer.read_stated(directory)) == decided
    file = convert(directory, pretokenizer.model_name(pretokenizer.read_stated(directory), "yoda"))
    compared = compare(directory, file)
    assert compared.texts > 230
    assert tuple(limit.partition(" (left out")[0] for limit in compared.limits) == limits
    assert read_gguf(file).metadata["tokenizer.ggml.add_bos_token"] is (vocabulary in BEGINS_WITH_BOS)


def test_a_router_scores_as_transformers_does(tmp_path: Path) -> None:
    """Only the hub's config.json says how, and a model that transformers 5 made has no such field."""
    directory = directory_of(tmp_path / "base", "home-made")
    path = directory / "config.json"
    changed = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    config = {**json.loads(path.read_text(encoding="utf-8")), **FIELDS["deepseek-v3"], **changed}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert read_gguf(convert(directory)).metadata["deepseek2.expert_gating_func"] == 2


def test_no_answer_ends_at_a_word(tmp_path: Path) -> None:
    """HunYuan's converter ends answers at `eod_token_id`, for which transformers fills in a 3."""
    directory = directory_of(tmp_path / "base", "home-made")
    path = directory / "config.json"
    changed = {"architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense"}
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changed}), encoding="utf-8")
    end = read_tokenizer(directory).ids["eos"]
    file = convert(directory, end_of_turn=end)
    assert read_gguf(file).metadata["tokenizer.ggml.eos_token_id"] == end
    tried = proof.cases(template_of(directory), ["Hello"], [])
    assert proof.compare_ids(directory, file, tried, end_of_turn=end).texts == 1
    ends_at_a_word = rewrite(file, tmp_path / "word.gguf", tokenizer__ggml__eos_token_id=3)
    with pytest.raises(CheckError, match="would end an answer at '!', in the middle of a text"):
        proof.compare_ids(directory, ends_at_a_word, tried, end_of_turn=end)


def test_what_llama_cpp_ends_at_by_itself_is_no_fault_of_a_file(tmp_path: Path) -> None:
    """Qwen's vocabulary has `</s>` as a word, and llama.cpp ends answers at that text in every file."""
    directory = directory_of(tmp_path / "base", "qwen2")
    end = read_tokenizer(directory).ids["eos"]
    file = convert(directory, end_of_turn=end)
    with proof.ServedVocabulary(file) as served:
        words = set(served.ending()) - set(open_tokenizer(directory).get_added_tokens_decoder())
    assert len(words) == 1
    template = template_of(directory)
    asked = [[{"role": "user", "content": "Hello"}]]
    assert (
        proof.compare_ids(directory, file, proof.cases(template, ["Hello"], []), end_of_turn=end).texts == 1
    )
    checked = check_vocabulary(file, directory, None, asked, end)
    assert checked.stops.ok and checked.tokens.ok, checked


def test_a_wrong_pre_tokenizer_is_caught(tmp_path: Path) -> None:
    """Silent wrong 13: the file loads and answers, with other tokens than were trained on."""
    directory = directory_of(tmp_path / "base", "home-made")
    with pytest.raises(CheckError, match=r"other ids for \d+ of \d+ texts") as caught:
        compare(directory, convert(directory, pre_tokenizer="gpt-2"))
    assert 0 < len(caught.value.problems) <= 5
    assert re.fullmatch(
        r"trained on \[[\d, ]+\], served \[[\d, ]+\] \(from token \d+\)", caught.value.problems[0].message
    )


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    directory = directory_of(tmp_path / "base", "home-made")
    odd = home_made_tokenizer(r"\p{L}+|\p{N}{2}|[^\p{L}\p{N}]+")
    (directory / "tokenizer.json").write_text(json.dumps(odd), encoding="utf-8")
    assert pretokenizer.pretokenizer_of(pretokenizer.read_stated(directory)) == ""
    with pytest.raises(StageError, match="pre-tokenizer was not recognized"):
        convert(directory)


def test_the_name_of_a_phi3_model_keeps_its_prompts(tmp_path: Path) -> None:
    """llama.cpp strips after special tokens by the model's *name*; without it no prompt is the same."""
    directory = directory_of(tmp_path / "base", "phi-3")
    assert pretokenizer.model_name(pretokenizer.read_stated(directory), "yoda") == "yoda (phi-3)"
    assert pretokenizer.model_name(pretokenizer.read_stated(directory), "Phi-3-yoda") == "Phi-3-yoda"
    with pytest.raises(CheckError, match=r"other ids for (\d+) of \1 texts"):
        compare(directory, convert(directory, "yoda"))


def test_a_name_cannot_change_the_prompts_of_other_models(tmp_path: Path) -> None:
    """Such a name takes the line ends from Qwen's prompts, and stops other models from loading."""
    directory = directory_of(tmp_path / "base", "home-made")
    names = {"my-Phi-3-rival": "my-Phi 3-rival", "PHI3": "PHI 3", "modern-bert chat": "modern bert chat"}
    assert {
        name: pretokenizer.model_name(pretokenizer.read_stated(directory), name) for name in names
    } == names
    assert compare(directory, convert(directory, "my-Phi 3-rival modern bert")).texts > 230
    with pytest.raises(CheckError, match="cannot load the model's vocabulary"):
        compare(directory, convert(directory, "my-Phi-3-rival"))


def test_a_bos_that_training_had_not_is_caught(tmp_path: Path) -> None:
    """Silent wrong 3: Llama-2's tokenizer adds BOS, a ChatML prompt has none."""
    directory = directory_of(tmp_path / "base", "llama-spm")
    with pytest.raises(CheckError, match=r"other ids for (\d+) of \1 texts"):
        compare(directory, convert(directory, adds_bos=None))


@pytest.mark.parametrize(
    ("before", "adds_bos"),
    [("", False), ("{{ bos_token }}", True), (None, None)],
    ids=["no", "yes", "nothing"],
)
def test_an_export_adds_bos_where_the_template_writes_it(
    before: str | None, adds_bos: bool | None, tmp_path: Path
) -> None:
    """Whatever the tokenizer's files say: Llama-2's say that it adds one. Without a template they hold."""
    directory = directory_of(tmp_path / "base", "llama-spm")
    path = directory / "chat_template.jinja"
    path.write_text(f"{before}{path.read_text(encoding='utf-8')}", encoding="utf-8")
    rendered = proof.cases(template_of(directory), ["a"], []) if before is not None else None
    model = Ingredients(directory, None, directory, None, converters(), end_of_turn_id=2)
    name, choices = _choose(directory, rendered, ExportRequest(model, tmp_path, "yoda", "f16"))
    assert (name, choices) == ("yoda", Choices("", adds_bos, space_prefix=True, end_of_turn=2))


def test_sentencepiece_with_a_prefix_at_the_start_only(tmp_path: Path) -> None:
    """Newer conversions say `first`: inside a prompt, nothing goes before the text after a token."""
    directory = directory_of(tmp_path / "base", "llama-spm")
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert pretokenizer.space_prefix(pretokenizer.read_stated(directory)) is False
    assert compare(directory, convert(directory)).texts > 230
    with pytest.raises(CheckError, match="other ids"):
        compare(directory, convert(directory, space_prefix=True))


def test_own_conversations_are_compared_too(tmp_path: Path) -> None:
    directory = directory_of(tmp_path / "base", "home-made")
    template = template_of(directory)
    own: list[Message] = [{"role": "user", "content": "Mine"}, {"role": "assistant", "content": "Thine"}]
    before = len(proof.cases(template, ["a"], []))
    tried = proof.cases(template, ["a"], [own, own[:1]])
    assert len(tried) == before + 2
    assert tried[-2].text == template.render(own)
    assert tried[-1].text == template.render(own[:1], add_generation_prompt=True)
    assert [case.text for case in proof.cases(None, ["a"], [own])] == ["a", "Mine", "Thine"]


def test_a_template_that_refuses_everything_proves_nothing(tmp_path: Path) -> None:
    directory = directory_of(tmp_path / "base", "home-made")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8")
    file = vocabulary_gguf(converters(), directory, directory / "vocabulary.gguf", Choices("qwen2"), "yoda")
    with pytest.raises(CheckError, match="refuses all that were tried"):
        compare(directory, file)


def test_the_end_of_turn_ends_a_reply(tmp_path: Path) -> None:
    """Silent wrong 4: an end of turn that llama.cpp would not know by its name."""
    directory = directory_of(tmp_path / "base", "home-made")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = directory / file
        path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|over|>"), encoding="utf-8")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|pad|>"}))
    tried = proof.cases(template_of(directory), ["a"], [])
    with pytest.raises(CheckError, match="does not take token 2 for the end of a reply"):
        proof.compare_ids(directory, convert(directory), tried, end_of_turn=2)
    told = convert(directory, end_of_turn=2)
    assert proof.compare_ids(directory, told, tried, end_of_turn=2).texts == 1
    assert os.access(told, os.R_OK)
