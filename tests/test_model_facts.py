"""What a base's configuration says of it, and whether its architecture can be shipped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.model.architectures import (
    LIST,
    MODEL_TYPES,
    check_exportable,
    check_trainable,
    convertible,
    needs_own_code,
    own_code_note,
    reason_against,
    registered,
    table_text,
    text_of_model_types,
)
from forge.model.config import check_unquantized, configuration_of, read_configuration
from forge.tools.llama_cpp import find_converters
from tests.conftest import SESSION_HOME

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def architecture(name: str, **more: Any) -> str | None:
    return reason_against(configuration_of({"architectures": [name], **more}))


def test_a_configuration_under_todays_names() -> None:
    facts = configuration_of(LLAMA)
    assert (facts.architecture, facts.model_type, facts.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    sizes = (facts.hidden_size, facts.layers, facts.heads, facts.key_value_heads, facts.head_size)
    assert sizes == (256, 4, 8, 2, 32)
    assert (facts.intermediate_size, facts.vocabulary_size, facts.max_positions) == (768, 2048, 512)
    assert (facts.tied_embeddings, facts.quantization, facts.remote_code) == (False, None, False)


def test_a_configuration_under_older_names() -> None:
    facts = configuration_of(GPT2)
    sizes = (facts.hidden_size, facts.layers, facts.heads, facts.key_value_heads, facts.head_size)
    assert sizes == (768, 12, 12, 12, 64)
    assert (facts.intermediate_size, facts.vocabulary_size, facts.max_positions) == (3072, 50257, 1024)
    assert facts.tied_embeddings
    falcon = {"architectures": ["FalconForCausalLM"], "n_head": 71, "hidden_size": 4544, "multi_query": True}
    assert configuration_of(falcon).key_value_heads == 1


def test_falcon_has_a_context_that_its_file_leaves_out() -> None:
    """Served with more than the GGUF was made for, it would not start."""
    assert configuration_of(HUB["tiiuae--falcon-7b--reduced"]).max_positions == 2048


def test_a_nested_configuration() -> None:
    text = {name: value for name, value in LLAMA.items() if name not in ("architectures", "torch_dtype")}
    facts = configuration_of(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "dtype": "float16"}
    )
    assert (facts.architecture, facts.hidden_size, facts.dtype) == (
        "Gemma3ForConditionalGeneration",
        256,
        "float16",
    )
    assert not facts.tied_embeddings


@pytest.mark.parametrize(
    ("fields", "experts"),
    [
        ({}, None),
        ({"num_local_experts": 8}, 8),
        ({"num_experts": 128}, 128),
        ({"n_routed_experts": 64, "n_shared_experts": 2}, 64),
        ({"moe_num_experts": 64}, 64),
        ({"ffn_config": {"moe_num_experts": 16}}, 16),
        ({"num_local_experts": 0}, None),
        ({"text_config": {"num_experts": 16}}, 16),
    ],
)
def test_experts_have_many_names(fields: dict[str, Any], experts: int | None) -> None:
    """Mixtral, Qwen, DeepSeek, ERNIE, DBRX; a dense Granite says zero."""
    assert configuration_of({**LLAMA, **fields}).experts == experts


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_pitfall_22_a_quantized_base_is_refused_with_the_reason(settings: dict[str, Any], told: str) -> None:
    facts = configuration_of({**LLAMA, "quantization_config": settings})
    with pytest.raises(DataError) as caught:
        check_unquantized(facts, "org/model")
    assert caught.value.message.startswith(f"org/model: this base is already quantized ({told}); ")
    assert "the model that it was quantized from" in caught.value.hint
    check_unquantized(configuration_of(LLAMA), "org/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [("adapter_config.json", "this is an adapter, not a base"), ("m-Q4_K_M.gguf", "only a GGUF is there")],
)
def test_a_directory_of_another_kind_says_what_it_is(tmp_path: Path, name: str, message: str) -> None:
    """Before anything is said of a config.json that no such directory has."""
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        read_configuration(tmp_path)


def test_a_broken_configuration_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in (
        (None, "no such file"),
        ("{", "not valid JSON: "),
        ("[]", "not a JSON object"),
        ("{}", "it names no architecture"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError) as caught:
            read_configuration(tmp_path)
        assert caught.value.message.startswith(f"{path}: {message}")


def test_n5_the_families_of_the_documents_can_be_exported() -> None:
    names = [
        "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM",
        "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM",
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM",
        "OlmoForCausalLM", "Olmo2ForCausalLM", "GraniteForCausalLM", "DbrxForCausalLM",
        "StableLmForCausalLM", "Starcoder2ForCausalLM", "SmolLM3ForCausalLM", "BloomForCausalLM",
        "GPTNeoXForCausalLM", "MambaForCausalLM",
    ]  # fmt: skip
    assert {name: architecture(name) for name in names} == dict.fromkeys(names)


HUB: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "cases" / "hub_configurations.json").read_text(encoding="utf-8")
)
# Everything of the set that is refused, and why; what is not listed is accepted.
REFUSED_OF_THE_HUB = {
    "facebook--opt-1.3b--reduced": "OPT has no GGUF form",
    "facebook--opt-350m": "OPT has no GGUF form",
    "google--gemma-2b-it": "already quantized (bitsandbytes, 4 bits)",
    "openai--gpt-oss-20b": "already quantized (mxfp4)",
}


@pytest.mark.parametrize("name", HUB)
def test_every_configuration_of_the_hub_is_accepted_or_refused_with_a_true_reason(name: str) -> None:
    """N5: fields of public models; those of Phi-3, Phi-2 and DeepSeek-V3 name Python files (auto_map)."""
    configuration = configuration_of(HUB[name])
    try:
        check_unquantized(configuration, name)
        check_exportable(configuration)
        check_trainable(configuration, trust_remote_code=False)
    except DataError as refusal:
        assert REFUSED_OF_THE_HUB.get(name, "accepted") in refusal.message
    else:
        assert name not in REFUSED_OF_THE_HUB


@pytest.mark.parametrize(
    ("kind", "tower"), [("qwen2_vl", "vision"), ("mistral3", "vision"), ("qwen2_audio", "audio")]
)
def test_a_model_of_more_than_text_is_called_so(kind: str, tower: str) -> None:
    configuration = configuration_of(
        {"architectures": ["A"], "model_type": kind, f"{tower}_config": {"a": 1}}
    )
    with pytest.raises(DataError, match=f"a model of text and {tower}, of which") as refused:
        check_trainable(configuration, trust_remote_code=False)
    assert "base for text" in refused.value.hint


def test_two_families_in_one_configuration_are_refused() -> None:
    """The class of another family; one without its head, or of more than text, is the same family."""
    mixed = configuration_of({"architectures": ["Qwen2ForCausalLM"], "model_type": "llama"})
    with pytest.raises(DataError, match=r"architectures says Qwen2ForCausalLM, model_type llama is Llama"):
        check_trainable(mixed, trust_remote_code=False)
    for name in ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3Model"):
        same = configuration_of({"architectures": [name], "model_type": "gemma3"})
        check_trainable(same, trust_remote_code=False)


def test_a_known_family_never_runs_the_code_that_its_base_names() -> None:
    phi = configuration_of(HUB["microsoft--Phi-3-mini-4k-instruct"])
    assert phi.remote_code and not needs_own_code(phi)
    assert own_code_note(phi, trust_remote_code=False) == (
        "the base's own Python code is not run: transformers has phi3"
    )
    assert "(trust_remote_code changes nothing)" in str(own_code_note(phi, trust_remote_code=True))
    unknown = configuration_of({**HUB["microsoft--Phi-3-mini-4k-instruct"], "model_type": "phi3small"})
    assert needs_own_code(unknown) and own_code_note(unknown, trust_remote_code=True) is None
    check_trainable(unknown, trust_remote_code=True)
    with pytest.raises(DataError, match="runs Python code of its own"):
        check_trainable(unknown, trust_remote_code=False)


@pytest.mark.training
def test_the_model_types_are_those_of_the_installed_transformers() -> None:
    assert MODEL_TYPES.read_text(encoding="utf-8") == text_of_model_types()


def test_pitfall_53_n5_opt_is_refused_before_training_with_what_can_be_done() -> None:
    with pytest.raises(DataError) as caught:
        check_exportable(configuration_of({"architectures": ["OPTForCausalLM"]}))
    assert caught.value.message == "OPTForCausalLM: OPT has no GGUF form: llama.cpp does not implement it"
    assert "train and serve it with transformers or vLLM instead" in caught.value.hint
    assert "Qwen/Qwen2.5-0.5B-Instruct" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BertModel", "an encoder"),
        ("RobertaForSequenceClassification", "an encoder"),
        ("AlbertForMaskedLM", "an encoder"),
        ("LlamaForSequenceClassification", "its head classifies or labels text"),
        ("T5ForConditionalGeneration", "an encoder-decoder"),
        ("Qwen2Model", "it has no language-model head"),
        ("WavTokenizerDec", "an audio model"),
        ("LLaDAModelLM", "a diffusion language model"),
        ("LlamaForCausalLMEagle3", "a draft model"),
        ("SomethingNewForCausalLM", "the llama.cpp that this version uses has no GGUF form for it"),
    ],
)
def test_n5_what_cannot_chat_says_why(name: str, reason: str) -> None:
    assert str(architecture(name)).startswith(reason)


def test_n5_an_encoder_decoder_is_known_by_its_configuration() -> None:
    assert str(architecture("BartForConditionalGeneration", is_encoder_decoder=True)).startswith(
        "an encoder-decoder"
    )


TABLE = """\
import torch
TEXT_MODEL_MAP: dict[str, str] = {"AForCausalLM": "a", "BForCausalLM": "a", "Gone": "a"}
"""
MODULE = """\
raise RuntimeError("nobody should run this")

@ModelBase.register("BForCausalLM", "AForCausalLM")
class A(TextModel):
    model_arch = 1

@ModelBase.register("SightModel")
class Sight(MmprojModel):
    model_arch = 2
"""


def test_registrations_are_read_without_running_the_converters(tmp_path: Path) -> None:
    conversion = tmp_path / "conversion"
    conversion.mkdir()
    (conversion / "__init__.py").write_text(TABLE)
    (conversion / "a.py").write_text(MODULE)
    assert registered(tmp_path) == {"AForCausalLM": "a", "BForCausalLM": "a"}
    with pytest.raises(DataError, match=r"not llama\.cpp's converters"):
        registered(tmp_path / "elsewhere")


def test_the_committed_list_is_that_of_the_pinned_converters() -> None:
    assert LIST.read_text(encoding="utf-8") == table_text(registered(find_converters(SESSION_HOME)))


def test_the_number_of_refused_architectures_may_not_grow(capsys: pytest.CaptureFixture[str]) -> None:
    """Of all that the converters register: encoders, draft heads, audio and diffusion models."""
    refused = [name for name in convertible() if architecture(name)]
    with capsys.disabled():
        sys.stdout.write(f"\n{len(refused)} of {len(convertible())} registered architectures are refused\n")
    assert len(refused) <= 60


def test_the_committed_list_is_read_whole() -> None:
    assert table_text(convertible()) == LIST.read_text(encoding="utf-8")
    assert len(convertible()) > 200
