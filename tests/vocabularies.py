"""Real tokenizers for test models, rebuilt from the vocabularies that llama-cpp-python's sdist carries.

The files are those that Hugging Face's hub has for such models: tokenizer.json, tokenizer_config.json,
chat_template.jinja, and tokenizer.model where the converters need it. Templates are read from trl
and from the sdist at run time. `home-made` is a byte-level BPE of a few hundred tokens, trained here.

Those of `HUB` are the hub's own files, byte for byte: `make tokenizers` fetches them, so only tests marked
`slow` ask for them.

Not covered: bit-equality with the hub's files of the others; the ids of any text are the same.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import read_tokenizer
from forge.tools.llama_cpp import PACKAGE, VERSION, find_converters
from tests.conftest import ROOT, SESSION_HOME
from tests.makers.tokenizer import CHATML

ARCHIVE = SESSION_HOME / "downloads" / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types, of GGUF and sentencepiece

HUB = {
    "qwen3": "qwen3", "gemma-3": "gemma3", "llama-3.1": "llama3_1", "llama-2": "llama2",
    "deepseek-v3": "deepseek_v3", "gpt-oss": "gptoss",
}  # fmt: skip
"""Vocabularies of which there are the hub's own files, and where `make tokenizers` puts them."""

_ARRAYS = "tokenizer.ggml."
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
LLAMA3_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST

_LLAMA_2_CHAT = ROOT / "templates" / "chat" / "llama-2.jinja"
_HOME_MADE_TEXT = (
    "There is bacon in this sandwich. In this sandwich, bacon there is. The small cat sees a red house.",
    "Repeat after me: what did the old farmer carry to the market yesterday? 1 2 3 4 5 6 7 8 9 0!",
    "Speak like Yoda. Hmm. You are a helpful assistant. Is there a dog by the river? Yes, there is.",
    '(small) (red) [house] "cat" "dog" (x) [y] Don\'T, I\'LL!\n\nHello.\n\n(Why?)\n  "There it is...".\n',
)


@functools.cache
def llama_cpp_models() -> Path:
    """`models/` of the pinned llama.cpp tree: vocabularies and templates.

    From LLAMA_CPP_TREE (a directory that holds `models`), else from the sdist in FORGE_HOME. Raises
    FileNotFoundError: a test that needs it must fail, not pass unseen.
    """
    if tree := os.environ.get("LLAMA_CPP_TREE"):
        return Path(tree) / "models"
    if not ARCHIVE.is_file():
        raise FileNotFoundError(
            f"{ARCHIVE} is missing: `make test` fetches it, or set LLAMA_CPP_TREE to an unpacked llama.cpp"
        )
    # Beside the tests' own store, which conftest removes with all that lies there; run by hand, FORGE_HOME
    # may be in the clone, where nothing is to be left.
    beside = Path(os.environ["FORGE_HOME"]).absolute().parent
    is_ours = beside.is_relative_to(tempfile.gettempdir())
    unpacked = Path(tempfile.mkdtemp(prefix="forge-models-", dir=beside if is_ours else None))
    with tarfile.open(ARCHIVE, "r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[3:]
            if parts[:1] == ("models",) and PurePosixPath(member.name).suffix in (".gguf", ".jinja"):
                member.name = str(PurePosixPath(*parts))
                tar.extract(member, unpacked, filter="data")
    return unpacked / "models"


def converters() -> Path:
    """llama.cpp's converters as `forge setup` unpacked them."""
    return find_converters(SESSION_HOME)


def trl_template(name: str) -> str:
    """The text of one of trl's chat templates."""
    return (trl_templates() / f"{name}.jinja").read_text(encoding="utf-8")


def trl_templates() -> Path:
    """The directory of trl's chat templates, without importing trl."""
    found = importlib.util.find_spec("trl")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "chat_templates"


def template_files() -> list[Path]:
    """Every public chat template at hand: trl's and llama.cpp's."""
    return sorted([*trl_templates().glob("*.jinja"), *(llama_cpp_models() / "templates").glob("*.jinja")])


def write_tokenizer(directory: Path, vocabulary: str, *, template: str | None = None) -> int:
    """Write the tokenizer's files; returns how many ids there are.

    `vocabulary` is llama-spm, gemma-spm, llama-bpe, qwen2, phi-3, gpt-2, home-made or one of `HUB`.
    `template` replaces the vocabulary's own (Llama-2, Gemma and GPT-2 get ChatML, for which two tokens are
    added).
    """
    directory.mkdir(parents=True, exist_ok=True)
    if vocabulary in HUB:
        return _write_of_hub(directory, vocabulary, template)
    writers = {"llama-spm": _llama_2, "llama-bpe": _llama_3, "qwen2": _qwen2, "phi-3": _phi3}
    writers |= {"gpt-2": _gpt2, "home-made": _home_made, "gemma-spm": _gemma}
    tokenizer, config, own_template = writers[vocabulary](directory)
    added = {str(token["id"]): _without_id(token) for token in tokenizer["added_tokens"]}
    _write(directory / "tokenizer.json", tokenizer)
    _write(directory / "tokenizer_config.json", {**config, "added_tokens_decoder": added})
    (directory / "chat_template.jinja").write_text(template or own_template, encoding="utf-8")
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    return int(max(ids)) + 1


def _write_of_hub(directory: Path, vocabulary: str, template: str | None) -> int:
    source = SESSION_HOME / "tokenizers" / HUB[vocabulary]
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is missing: `make tokenizers` fetches it")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, directory / name)
    # Their packages leave out what the hub keeps in a file of its own, or what the base has none of.
    beside = {"gpt-oss": trl_template("gptoss"), "llama-2": _LLAMA_2_CHAT.read_text(encoding="utf-8")}
    if text := template or beside.get(vocabulary):
        (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
    return read_tokenizer(directory).vocabulary_size


Files = tuple[dict[str, Any], dict[str, Any], str]


def _llama_3(directory: Path) -> Files:
    tokens, types, merges = _byte_level("llama-bpe")
    start = _token("<|begin_of_text|>", tokens.index("<|begin_of_text|>"))
    tokenizer = _bpe(tokens, types, merges, pattern=LLAMA3_PATTERN) | {"post_processor": _begins_with(start)}
    tokenizer["model"]["ignore_merges"] = True
    config = _config("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>")
    return tokenizer, config, trl_template("llama3")


def _qwen2(directory: Path) -> Files:
    tokenizer = _bpe(*_byte_level("qwen2"), pattern=QWEN2_PATTERN) | {"normalizer": {"type": "NFC"}}
    return tokenizer, _config(None, "<|im_end|>", "<|endoftext|>"), trl_template("qwen2_5")


def _gpt2(directory: Path) -> Files:
    tokens, types, merges = _byte_level("gpt-2")
    tokens += ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    types += [CONTROL] * 3
    return _bpe(tokens, types, merges), _config("<|endoftext|>", "<|im_end|>", "<|pad|>"), CHATML


def _llama_2(directory: Path) -> Files:
    tokens, types, scores = _sentencepiece("llama-spm")
    _write_sentencepiece(directory, tokens, types, scores)
    extra = [_token(text, len(tokens) + number) for number, text in enumerate(("<|im_start|>", "<|im_end|>"))]
    known = [_token(text, tokens.index(text)) for text in ("<unk>", "<s>", "</s>")]
    tokenizer = _spm(tokens, scores, [*known, *extra]) | {"post_processor": _begins_with(known[1])}
    return tokenizer, _config("<s>", "<|im_end|>", "<unk>", unk="<unk>", kind="LlamaTokenizer"), CHATML


def _gemma(directory: Path) -> Files:
    """Llama-2's pieces, read as Gemma reads its own: no space goes before a text."""
    tokenizer, config, template = _llama_2(directory)
    replaces = [step for step in tokenizer["normalizer"]["normalizers"] if step["type"] == "Replace"]
    return tokenizer | {"normalizer": replaces[0]}, config, template


def _phi3(directory: Path) -> Files:
    tokens, types, scores = _sentencepiece("phi-3")
    pieces = tokens.index("<|endoftext|>")
    _write_sentencepiece(directory, tokens[:pieces], types[:pieces], scores[:pieces])
    stripping = {"<unk>": False, "<s>": False, "</s>": True, "<|endoftext|>": False}
    special = [*stripping, *(text for text in tokens[pieces:] if text not in stripping and text[:1] == "<")]
    added = [_token(text, tokens.index(text), rstrip=stripping.get(text, True)) for text in special]
    tokenizer = _spm(tokens[:pieces], scores[:pieces], added)
    config = _config("<s>", "<|endoftext|>", "<unk>", unk="<unk>", kind="LlamaTokenizer")
    return tokenizer, config | {"add_bos_token": False, "add_eos_token": False}, trl_template("phi3")


def _home_made(directory: Path) -> Files:
    return home_made_tokenizer(), _config(None, "<|im_end|>", "<|pad|>"), CHATML


def home_made_tokenizer(pattern: str = QWEN2_PATTERN) -> dict[str, Any]:
    """A tokenizer.json that no model has; `pattern` splits the text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_HOME_MADE_TEXT * 4, trainer)
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    return made | {"decoder": _BYTE_LEVEL}


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _token(text: str, number: int, *, rstrip: bool = False) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": rstrip, "normalized": False, "special": True}
    return {"id": number, "content": text, **flags}


def _without_id(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}


def _begins_with(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["content"]
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    named = {text: {"id": text, "ids": [token["id"]], "tokens": [text]}}
    single, pair = [first, one], [first, one, first, two]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _config(
    bos: str | None, eos: str, pad: str, *, unk: str | None = None, kind: str = "PreTrainedTokenizerFast"
) -> dict[str, Any]:
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    return tokens | {"tokenizer_class": kind, "model_max_length": 512, "clean_up_tokenization_spaces": False}


def _bpe(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], *, pattern: str | None = None
) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    before: dict[str, Any] = {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]}
    special = [_token(text, number) for number, text in enumerate(tokens) if types[number] != NORMAL]
    vocabulary = {text: number for number, text in enumerate(tokens) if types[number] == NORMAL}
    return {
        "version": "1.0",
        "added_tokens": [token for token in special if not token["content"].startswith("[PAD")],
        "pre_tokenizer": before if pattern else _BYTE_LEVEL | {"use_regex": True},
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [merge.split(" ") for merge in merges]},
    }


def _spm(
    tokens: Sequence[str], scores: Sequence[float], added: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A SentencePiece BPE as transformers converts it; merges in the order of their scores."""
    vocabulary = {text: number for number, text in enumerate(tokens)}
    merges = [
        (-scores[number], vocabulary[text[:cut]], vocabulary[text[cut:]], [text[:cut], text[cut:]])
        for text, number in vocabulary.items()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    return {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": vocabulary, "merges": [merge[-1] for merge in sorted(merges)],
        },
    }  # fmt: skip


def _byte_level(name: str) -> tuple[list[str], list[int], list[str]]:
    fields = _fields(name)
    return fields["tokens"], fields["token_type"], fields["merges"]


def _sentencepiece(name: str) -> tuple[list[str], list[int], list[float]]:
    fields = _fields(name)
    return fields["tokens"], fields["token_type"], fields["scores"]


@functools.cache
def _fields(name: str) -> dict[str, Any]:
    header = read_gguf(llama_cpp_models() / f"ggml-vocab-{name}.gguf")
    wanted = [
        key for key in ("tokens", "token_type", "merges", "scores") if f"{_ARRAYS}{key}" in header.metadata
    ]
    return {key: list(header.array(f"{_ARRAYS}{key}")) for key in wanted}


def _write_sentencepiece(
    directory: Path, tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> None:
    """ModelProto of sentencepiece_model.proto, in protobuf's wire format (the library is not needed)."""
    pieces = b"".join(
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes((0x18, kind)))
        for text, kind, score in zip(tokens, types, scores, strict=True)
    )
    trainer = bytes((3 << 3, 2, 35 << 3 & 0x7F | 0x80, 35 << 3 >> 7, 1))  # model_type: BPE, byte_fallback
    normalizer = _field(1, b"identity") + bytes((3 << 3, 1, 4 << 3, 0))  # dummy prefix, spaces kept
    (directory / "tokenizer.model").write_bytes(pieces + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    length, size = len(content), b""
    while length > 0x7F:
        size, length = size + bytes((length & 0x7F | 0x80,)), length >> 7
    return bytes((number << 3 | 2,)) + size + bytes((length,)) + content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
