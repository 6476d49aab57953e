"""Which Hugging Face architectures can become a GGUF that chats, known before anything is trained.

`architectures.txt` lists what the pinned llama.cpp's converters register, with the module that does
it; `model_types.txt` the families that the pinned transformers has a causal language model of, with its
class. `python -m forge.model.architectures TREE` writes both anew. Converting is
not enough for a chat model: encoders, encoder-decoders, draft heads and audio models convert too
and are refused here with what can be done instead.

Not covered: tensors or tokenizers that a converter refuses within a family it knows.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from forge import report
from forge.errors import DataError
from forge.model.config import Configuration

LIST = Path(__file__).with_name("architectures.txt")
MODEL_TYPES = Path(__file__).with_name("model_types.txt")

_ALTERNATIVE_BASES = (
    "a base such as Qwen/Qwen2.5-0.5B-Instruct, HuggingFaceTB/SmolLM2-360M-Instruct or "
    "microsoft/Phi-3-mini-4k-instruct"
)
_HINT = (
    "train and serve it with transformers or vLLM instead (a recipe with `export: none` trains and merges "
    f"what writes text); or choose {_ALTERNATIVE_BASES}"
)

_LABEL_ENDINGS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
_DRAFT_MARKS = ("Draft", "DSpark", "Eagle3", "Speculator", "Assistant")
_TOWERS = ("vision_config", "audio_config", "speech_config")
_AUDIO_MODULES = {"wavtokenizer", "pockettts", "qwen3tts"}
_DIFFUSION = {"dream", "llada"}
# Converted as embedding models: llama.cpp gives vectors, not text.
_HEADLESS = {
    "Gemma3TextModel", "Lfm2BidirectionalModel", "Lfm2Model", "LlamaBidirectionalModel", "LlamaModel",
    "Qwen2Model", "Qwen3Model",
}  # fmt: skip


@cache
def convertible() -> dict[str, str]:
    """Architecture -> the converter's module, for all that the pinned converters take as text models."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


@cache
def model_types() -> dict[str, str]:
    """`model_type` -> class, for every family of which transformers has a causal language model."""
    lines = MODEL_TYPES.read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def needs_own_code(configuration: Configuration) -> bool:
    """Whether only the base's own Python files (`auto_map`) can run it: transformers lacks the family.

    A family that came to the hub before it came to transformers names its files for ever; they are not
    needed any more, and often no longer run.
    """
    return configuration.remote_code and configuration.model_type not in model_types()


def check_trainable(configuration: Configuration, *, trust_remote_code: bool) -> None:
    """Raise `DataError` for a base that transformers cannot load, or only by running the base's own code."""
    kind, stated = configuration.model_type, configuration.architecture
    if kind in model_types():
        own = model_types()[kind]
        if stated in model_types().values() and _family(stated) != _family(own):
            raise DataError(
                f"config.json is of two families: architectures says {stated}, model_type {kind} is {own}: "
                "transformers would train the one, and llama.cpp's converter write the other",
                hint="compare config.json with the one on the hub",
            )
        return
    if towers := sorted(part.partition("_")[0] for part in _TOWERS if configuration.raw.get(part)):
        raise DataError(
            f"{configuration.architecture}: a model of text and {' and '.join(towers)}, of which transformers"
            f" has no language model by itself (model_type {kind!r})",
            hint="take the family's base for text; or choose " + _ALTERNATIVE_BASES,
        )
    if not configuration.remote_code:
        raise DataError(
            f"{configuration.architecture}: transformers has no language model for the model_type {kind!r}"
            if kind
            else f"{configuration.architecture}: its config.json has no model_type",
            hint=f"look for a typing error in config.json; or choose {_ALTERNATIVE_BASES}",
        )
    if not trust_remote_code:
        raise DataError(
            f"{configuration.architecture} runs Python code of its own, which forge does not do unasked; "
            f"transformers has no language model for the model_type {kind!r}",
            hint="read that code, then set base: {id: ..., trust_remote_code: true}",
        )


def _family(name: str) -> str:
    """A class's name without what it is for: `Gemma3` of `Gemma3ForCausalLM`."""
    return re.split(r"For[A-Z]|LMHead|Model$", name)[0].removesuffix("Text")


def own_code_note(configuration: Configuration, *, trust_remote_code: bool) -> str | None:
    """What to say of a base that carries code which is not run."""
    if not configuration.remote_code or needs_own_code(configuration):
        return None
    asked = " (trust_remote_code changes nothing)" if trust_remote_code else ""
    return f"the base's own Python code is not run{asked}: transformers has {configuration.model_type}"


def check_exportable(configuration: Configuration) -> None:
    """Raise `DataError` if this base can never be shipped as a GGUF chat model, and say what to do."""
    reason = reason_against(configuration)
    if reason:
        raise DataError(f"{configuration.architecture}: {reason}", hint=_HINT)


def check_writes_text(configuration: Configuration) -> None:
    """Raise `DataError` for a base that is no chat model in any form; one without a GGUF form may be."""
    reason = _reason_against_chat(configuration)
    if reason:
        raise DataError(f"{configuration.architecture}: {reason}", hint=f"choose {_ALTERNATIVE_BASES}")


def reason_against(configuration: Configuration) -> str | None:
    """Why the architecture cannot be shipped as a GGUF chat model, or None if it can."""
    name = configuration.architecture
    if reason := _reason_against_chat(configuration):
        return reason
    if name.startswith("OPT"):
        return "OPT has no GGUF form: llama.cpp does not implement it"
    if name not in convertible():
        return "the llama.cpp that this version uses has no GGUF form for it"
    return None


def _reason_against_chat(configuration: Configuration) -> str | None:
    name = configuration.architecture
    module = convertible().get(name)
    if module == "bert" or name.endswith("ForMaskedLM"):
        return "an encoder: it classifies or embeds text, it does not write any"
    if name.endswith(_LABEL_ENDINGS):
        return "its head classifies or labels text, it does not write any"
    if module == "t5" or configuration.encoder_decoder:
        return "an encoder-decoder (seq2seq) model; the chat path here is for decoder-only models"
    if module in _AUDIO_MODULES or name == "Lfm25AudioTokenizer":
        return "an audio model, not a chat model"
    if module in _DIFFUSION or name == "RND1":
        return "a diffusion language model: llama-server cannot chat with it"
    if any(mark in name for mark in _DRAFT_MARKS):
        return "a draft model for speculative decoding, not a model of its own"
    if name in _HEADLESS:
        return "it has no language-model head: it embeds text, it does not write any"
    return None


def registered(tree: Path) -> dict[str, str]:
    """Read architecture -> module from llama.cpp's `conversion/` in `tree`, without running it.

    Names count when the converters' own table of text models has them and the module it names
    registers them; raises `DataError` when the tree does not look so.
    """
    conversion = tree / "conversion"
    try:
        table = _text_models((conversion / "__init__.py").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{conversion}: not llama.cpp's converters: {error}") from error
    modules: dict[str, str] = {}
    for module in sorted(set(table.values())):
        source = (conversion / f"{module}.py").read_text(encoding="utf-8")
        modules |= {name: module for name in _decorated(source) if table.get(name) == module}
    return dict(sorted(modules.items()))


def _text_models(source: str) -> dict[str, str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP" and node.value:
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise DataError("the converters have no TEXT_MODEL_MAP", hint="llama.cpp changed: fix `registered`")


def _decorated(source: str) -> Iterator[str]:
    """The names in `@ModelBase.register("A", "B")` over the classes of a module."""
    for node in ast.walk(ast.parse(source)):
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "ModelBase.register":
                yield from (str(ast.literal_eval(argument)) for argument in decorator.args)


def table_text(modules: dict[str, str]) -> str:
    """The content of `architectures.txt`."""
    head = "# Written by `python -m forge.model.architectures TREE`: architecture, converter module.\n"
    return head + "".join(f"{name} {module}\n" for name, module in modules.items())


def text_of_model_types() -> str:
    """The content of `model_types.txt`, from the transformers that is installed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    head = "# Written by `python -m forge.model.architectures TREE`: transformers' model_type, class.\n"
    return head + "".join(
        f"{kind} {name}\n" for kind, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    )


if __name__ == "__main__":
    LIST.write_text(table_text(registered(Path(sys.argv[1]))), encoding="utf-8")
    MODEL_TYPES.write_text(text_of_model_types(), encoding="utf-8")
    report.info(f"{len(convertible())} architectures, {len(model_types())} model types")
