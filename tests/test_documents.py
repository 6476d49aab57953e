"""The documents that are written by hand: the marks and recipe fields that they and the code name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from forge.cli.main import COMMANDS
from forge.cli.main import forge as group
from forge.recipe.fields import names_in, sections
from forge.train.memory import GPUS
from tests.json_fields import STAGES, documented

ROOT = Path(__file__).parent.parent
_MARKS = re.compile(r"\b(pitfalls?|silent wrongs?|style rows?) (\d+(?:(?:, | and )\d+)*)", re.IGNORECASE)
_IDS = re.compile(r"\b(?!F16|F32)([A-T]\d{1,2})\b(?= *[·:;,.)]| and )")
_FIELD = re.compile(
    r"(?<![\w/.])(?:base|data|train|export|verify|deploy|smoke)(?:\.[a-z_]+)+\b(?![/(]|\.[a-z]|\.py)"
)
# Endings of files that are named after a section.
_FILES = ("jsonl", "py", "json", "yaml", "txt", "csv", "md", "log", "sh")


def _sources(*directories: str) -> Iterator[tuple[str, str]]:
    for directory in directories:
        for path in sorted((ROOT / directory).rglob("*.py")):
            if "cases" not in path.parts:
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def _numbers(document: str, section: str) -> set[int]:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8").partition(section)[2]
    return {
        int(number)
        for number in re.findall(r"^(?:\| )?(\d+)(?: \||\.)", text.partition("\n## ")[0], re.MULTILINE)
    }


KNOWN = {
    "pitfall": _numbers("pitfalls.md", "## Pitfalls"),
    "silent wrong": _numbers("pitfalls.md", "## Silent wrongs"),
    "style row": _numbers("style.md", "| # | habit"),
}


def test_every_mark_is_in_a_document() -> None:
    assert len(KNOWN["pitfall"]) == 66 and len(KNOWN["silent wrong"]) == 18 and len(KNOWN["style row"]) == 27
    unknown = [
        f"{path}: {match[0]}"
        for path, text in _sources("forge", "tests", "bench")
        for match in _MARKS.finditer(text)
        if not {int(number) for number in re.findall(r"\d+", match[2])} <= KNOWN[match[1].lower().rstrip("s")]
    ]
    assert unknown == []


def test_every_requirement_that_a_test_names_is_in_a_document() -> None:
    listed = set(
        re.findall(r"\b[A-T]\d{1,2}\b", (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8"))
    )
    unknown = []
    for path, text in _sources("tests"):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
                continue
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            unknown += [f"{path}: {name}" for name in _IDS.findall(first) if name not in listed]
    assert unknown == []


def test_every_row_of_training_is_named_in_a_test_or_explained() -> None:
    """Sections A to C and G to L: a test's words or name have its id, or the table says why there is none."""
    text = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
    rows, _, rest = text.partition("## What is not built")
    ids = re.compile(r"\b(?:[A-CG-K]\d{1,2}|L)\b")
    listed = [line for line in rest.partition("Beyond the rows")[0].splitlines() if line.startswith("| ")]
    explained = {name for line in listed for name in ids.findall(line.split(" | ")[0])}
    wanted = {
        name
        for line in rows.splitlines()
        if line.startswith("| ")
        for name in ids.findall(line.split(" | ")[0])
    }
    assert {"A5", "K4", "L"} <= wanted and len(explained) <= 8
    named = set()
    for _, source in _sources("tests"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                named |= set(ids.findall(ast.get_docstring(node) or ""))
                named |= {part.upper() for part in node.name.split("_") if ids.fullmatch(part.upper())}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= set(re.findall(r"\(([A-CG-K]\d{1,2})\)$", node.value))  # of a case
    assert sorted(wanted - explained - named) == []


def _strings(text: str) -> Iterator[str]:
    """Every string of a module that is no docstring: messages, hints, helps."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def _is_field(name: str) -> bool:
    section, _, last = name.replace("smoke.", "smoke.*.", 1).rpartition(".")
    return name in sections() or (section in sections() and last in names_in(section))


def fields_in(text: str) -> list[str]:
    """Names in `text` that look like a recipe field and are none."""
    named = (match[0] for match in _FIELD.finditer(text))
    return [name for name in named if name.rpartition(".")[2] not in _FILES and not _is_field(name)]


def test_every_recipe_field_that_a_message_names_exists() -> None:
    unknown = [
        f"{path}: {name}"
        for path, text in _sources("forge")
        for string in _strings(text)
        if " " in string and "forge." not in string
        for name in fields_in(string)
    ]
    assert unknown == []


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md", "docs/ollama.md", "CHANGELOG.md"])
def test_every_recipe_field_that_a_document_names_exists(document: str) -> None:
    assert fields_in((ROOT / document).read_text(encoding="utf-8")) == []


def test_a_field_that_is_none_would_be_seen() -> None:
    assert fields_in("set train.epochs or data.supervise") == ["data.supervise"]


def test_the_json_of_every_command_is_documented() -> None:
    assert {*documented(), *STAGES} - {"certificate"} == set(COMMANDS), "a row in docs/json.md"


_NAMED = """facebook/opt-350m, microsoft/Phi-3-mini-4k-instruct, phi3:mini, dvgodoy/opt-350m-lora-yoda,
dvgodoy/phi3-mini-yoda-adapter, gpt2, meta-llama/Llama-2-7b-hf, huggyllama/llama-7b, Falcon 7B, Llama 3.2
3B, Phi-3.5 Mini, Mistral 7B, Qwen-2.5 7B, OLMo 7B, Mixtral, Granite, DBRX, Gemma, StableLM, StarCoder,
BERT, T5, Guanaco-65B, Vicuna, ChatGPT, Claude, o1, 30B, 65B, 70B, dvgodoy/yoda_sentences, tatsu-lab/alpaca,
timdettmers/openassistant-guanaco, sentiment, code, medical, torch, transformers, peft, bitsandbytes, trl,
datasets, accelerate, safetensors, sentencepiece, huggingface_hub, tensorboard, wandb, pandas, matplotlib,
numpy, psutil, requests, gguf, Ollama, flash-attn, xformers, torchao, deepspeed, Unsloth, llama.cpp, GGML,
Docker, Podman, GGUF-my-repo, ONNX, Jinja, ChatML, Alpaca, ShareGPT, Hugging Face Hub, Colab, RunPod, CUDA
toolkit, nvcc, git, make, GTX 1060, T4, RTX 3060, RTX 3080, RTX 3090, RTX 4080, RTX 4090, A10G, A5000, A100,
H100, MPS, LoRA, QLoRA, NF4, double quantization, paged optimizers, LLM.int8, FP4, rsLoRA, DoRA, LoftQ, IA3,
prefix and prompt tuning, full fine-tune, packing, flattening, FA1, FA2, SDPA, eager, gradient
checkpointing, stochastic rounding, RLHF, DPO, RAG, pip install torch, pip install -U flash-attn,
pytorch_model.bin, nvcc --version, lsb_release -a, git clone, convert_lora_to_gguf.py,
convert_hf_to_gguf.py, quantize in.gguf out.gguf q4_0, --convert, --quantize, llama.cpp:server,
FastLanguageModel, save_pretrained_gguf, install.sh, ollama serve, ollama run, ollama.generate, ollama show
--modelfile, ollama create, ollama list, POST /completion, login(), snapshot_download,
trainer.push_to_hub(), model.push_to_hub"""


def _rows_of_the_named() -> list[tuple[str, str]]:
    """What the documents name or type, and what is said of it."""
    text = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
    lines = text.partition("## What the documents name")[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert all(len(row) == 2 for row in rows), rows
    return [(name, answer) for name, answer in rows if name not in ("name", "command")]


def test_everything_that_the_documents_name_is_built_or_answered() -> None:
    """Sections 4 and 5 of the requirements: each name stands in a row, with a sentence of its own."""
    rows = _rows_of_the_named()
    names = [" ".join(name.split()) for name in _NAMED.split(",")]
    assert [name for name in names if not any(name in left for left, _ in rows)] == []
    assert all(answer for _, answer in rows)


def test_what_an_answer_names_is_there() -> None:
    """The recipes, fields, commands and options of these rows."""
    answers = " ".join(answer for _, answer in _rows_of_the_named())
    assert fields_in(answers) == []
    recipes = re.findall(r"`(templates/\S+)`", answers)
    assert len(recipes) > 10 and [name for name in recipes if not (ROOT / name).is_file()] == []
    calls = re.findall(r"`forge (\w+)([^`]*)`", answers)
    assert len(calls) > 15
    for name, arguments in calls:
        command = group.get_command(click.Context(group), name)
        assert command is not None, name
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= known, (name, arguments)


def test_the_gpus_that_are_named_are_estimated() -> None:
    [row] = [name for name, answer in _rows_of_the_named() if "on which of them a training fits" in answer]
    assert set(row.split(", ")) == {re.sub(r" \d+ GB$", "", gpu) for gpu in GPUS}
