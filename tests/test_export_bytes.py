"""`--plain` writes the very bytes of the usual way: convert with the checkpoint's type, then quantize.

Without it nothing differs but the metadata that is forge's to decide.

Tensors, types, order, offsets and metadata, for every architecture and type that forge promises (O1,
O2, N2; silent wrongs 6, 7, 12). The yardstick is the converter's own script and llama_model_quantize.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from forge import process
from forge.model.gguf_header import GgufHeader, GgufTensor, LongArray, read_gguf
from tests.models import change_json, make_adapter, make_model
from tests.test_data_tokens import format_of
from tests.vocabularies import converters

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.slow, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parent.parent
# Metadata that may be other than the usual chain's: by `Choices`, the name and the pinned template.
OWN_KEYS = frozenset(
    {
        "general.name", "tokenizer.chat_template", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """How a model is made. `dtype` is the checkpoint's, and so the converter's outtype."""

    architecture: str
    vocabulary: str = "gpt-2"
    dtype: str = "bf16"
    shards: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)


MODELS: Mapping[str, Model] = {
    "llama-untied-biases-shards": Model(
        "llama", shards=3, changes={"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-spm-added-tokens": Model("llama", "llama-spm"),
    "llama-f16": Model("llama", dtype="f16"),
    "llama-f32": Model("llama", dtype="f32"),
    "llama-odd-rows": Model("llama", changes={"intermediate_size": 640}),
    "mistral": Model("mistral", "llama-spm", changes={"tie_word_embeddings": False}),
    "qwen2-biases": Model("qwen2", "qwen2"),
    "qwen3": Model("qwen3", "qwen2"),
    "phi3-fused": Model("phi3", "phi-3"),
    "gemma2": Model("gemma2", "llama-spm"),
    "gemma3": Model("gemma3_text", "llama-spm"),
    "gpt2-conv1d": Model("gpt2", changes={"intermediate_size": 1024}),
    "gpt2-conv1d-f32": Model("gpt2", dtype="f32", changes={"intermediate_size": 1024}),
    "mixtral-experts": Model("mixtral", "llama-spm", changes={"tie_word_embeddings": False}),
    "qwen3-experts": Model("qwen3_moe", "qwen2"),
}
QUANTS = (
    "q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s", "q6_k", "q8_0", "q4_0", "f16", "bf16", "f32", "q3_k_m", "q2_k",
    "iq4_xs",
)  # fmt: skip
# Every type on one model; on the others the one that mixes types most.
JOBS = (
    *((name, "q4_k_m") for name in MODELS),
    *(("llama-untied-biases-shards", quant) for quant in QUANTS if quant != "q4_k_m"),
    *(("llama-odd-rows", quant) for quant in ("q5_k_s", "q3_k_m", "iq4_xs")),
    *(("mixtral-experts", quant) for quant in ("q2_k", "f16")),
)


# Exported without `--plain` too: BPE, SentencePiece, and one whose name changes how prompts are read.
BY_DEFAULT = ("qwen2-biases", "llama-spm-added-tokens", "phi3-fused")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `<chain>/<model>-<quant>.gguf` of both chains."""
    root = tmp_path_factory.mktemp("bytes")
    for name, model in MODELS.items():
        directory = make_model(
            root / name, model.architecture, model.vocabulary, shards=model.shards, dtype=model.dtype,
            **model.changes,
        )  # fmt: skip
        if model.architecture == "gpt2":
            change_json(directory / "config.json", n_ctx=512)
    for chain in ("vendor", "forge"):
        (root / chain).mkdir()
        jobs = [
            {
                "name": "the model", "directory": str(root / name), "quant": quant,
                "outtype": quant if quant in ("f16", "bf16", "f32") else MODELS[name].dtype,
                "out": str(root / chain / f"{name}-{quant}.gguf"),
            }
            for name, quant in JOBS
        ]  # fmt: skip
        run(chain, jobs, root)
    (root / "default").mkdir()
    by_default: list[dict[str, Any]] = [
        {
            "name": "the model", "directory": str(root / name), "quant": "q4_k_m",
            "end_of_turn_id": format_of(root / name).end_of_turn_id,
            "out": str(root / "default" / f"{name}-q4_k_m.gguf"),
        }
        for name in BY_DEFAULT
    ]  # fmt: skip
    run("forge", by_default, root)
    return root


def run(chain: str, jobs: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Do `jobs` by the usual way (`vendor`) or by `forge`, in one program."""
    listed = directory / f"{chain}.json"
    listed.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "tests.both_chains", chain, str(converters()), str(listed)]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with (directory / f"{chain}.log").open("w") as log:
        finished = process.run(command, directory=ROOT, log=log, environment=environment)
    assert finished.status == 0, finished.output[-3000:]


@pytest.mark.parametrize(("model", "quant"), JOBS)
def test_plain_writes_the_bytes_of_the_usual_way(made: Path, model: str, quant: str) -> None:
    vendor, forge = (made / chain / f"{model}-{quant}.gguf" for chain in ("vendor", "forge"))
    expected, found = read_gguf(vendor), read_gguf(forge)
    assert [*found.metadata] == [*expected.metadata]
    assert [*found.tensors.items()] == [*expected.tensors.items()]
    assert found.metadata == expected.metadata
    for name, tensor in expected.tensors.items():
        assert content(expected, tensor) == content(found, tensor), f"{name} ({tensor.type})"
    assert vendor.read_bytes() == forge.read_bytes()


@pytest.mark.parametrize("model", BY_DEFAULT)
def test_by_default_nothing_but_forges_own_metadata_differs(made: Path, model: str) -> None:
    """Tensors, types and order are the usual chain's, and so is every key that is not listed."""
    expected, found = (read_gguf(made / chain / f"{model}-q4_k_m.gguf") for chain in ("vendor", "default"))
    assert [*found.tensors] == [*expected.tensors]
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        assert (tensor.type, tensor.shape) == (other.type, other.shape)
        assert content(expected, tensor) == content(found, other), f"{name} ({tensor.type})"
    told, usual = ({key: value_of(header, key) for key in header.metadata} for header in (found, expected))
    different = {key for key in told.keys() | usual.keys() if told.get(key) != usual.get(key)}
    assert different and different <= OWN_KEYS, different - OWN_KEYS
    same = [[key for key in header if key not in different] for header in (told, usual)]
    assert same[0] == same[1]


def content(header: GgufHeader, tensor: GgufTensor) -> bytes:
    with header.path.open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(tensor.end - tensor.start)


def value_of(header: GgufHeader, key: str) -> Any:
    """A value; long arrays (the vocabulary) as they stand in the file, wherever that is."""
    value = header.metadata[key]
    return header.array(key) if isinstance(value, LongArray) else value


def test_the_models_are_what_their_names_say(made: Path) -> None:
    """So that equal bytes prove something: fused, transposed, permuted, stacked, fallen back."""
    fused = read_gguf(made / "forge" / "phi3-fused-q4_k_m.gguf")
    assert {"blk.0.attn_qkv.weight", "blk.0.ffn_up.weight"} <= fused.tensors.keys()
    assert fused.tensors["blk.0.ffn_up.weight"].shape == (1024, 256)
    experts = read_gguf(made / "forge" / "mixtral-experts-q4_k_m.gguf")
    assert experts.tensors["blk.0.ffn_up_exps.weight"].shape[0] > 1
    assert read_gguf(made / "forge" / "llama-odd-rows-q4_k_m.gguf").tensor_types.keys() > {"Q4_K", "Q6_K"}
    untied = read_gguf(made / "forge" / "llama-untied-biases-shards-q4_k_m.gguf")
    assert {"output.weight", "blk.0.attn_q.bias"} <= untied.tensors.keys()


def test_a_merge_is_the_usual_chain_on_the_merged_checkpoint(tmp_path: Path) -> None:
    """L, O2; silent wrong 12: merged and permuted in passing as in a file, and the kept file is that one."""
    base = make_model(tmp_path / "base", "llama", "llama-spm", shards=2)
    adapter = make_adapter(base, tmp_path / "adapter", r=16, use_rslora=True)
    job = {"name": "the model", "quant": "q4_k_m", "outtype": "f32", "out": str(tmp_path / "forge.gguf")}
    merged = str(tmp_path / "merged")
    run("forge", [{**job, "directory": str(base), "adapter": str(adapter), "merged": merged}], tmp_path)
    run("vendor", [{**job, "directory": merged, "out": str(tmp_path / "vendor.gguf")}], tmp_path)
    assert (tmp_path / "forge.gguf").read_bytes() == (tmp_path / "vendor.gguf").read_bytes()
