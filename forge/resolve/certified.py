"""What a certificate says that it is of: digests, versions, and where the files were."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

from forge.errors import DataError
from forge.resolve.digests import adapter_digest, base_digest
from forge.resolve.stage import installed
from forge.store.digest import DigestCache, file_digest
from forge.tools.llama_cpp import LLAMA_CPP_COMMIT
from forge.verify.measurement import Basis, Item, VerifyRequest

_COMPUTES = (
    "forge-ship", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "gguf",
    "llama-cpp-python", "bitsandbytes",
)  # fmt: skip


def basis_of(request: VerifyRequest, names: Mapping[str, str], cache: DigestCache | None) -> Basis:
    """The basis of a measurement of `request`; `names` say where each item is for who reads of it.

    Raises `DataError` for what cannot be read.
    """
    return Basis(
        items={option: Item(names[option], sha256) for option, sha256 in _digests(request, cache)},
        tokenizer=file_digest(request.tokenizer / "tokenizer.json", cache),
        rows=file_digest(request.rows),
        chat_template=request.chat_template,
        end_of_turn_id=request.end_of_turn_id,
        merge_base=request.merge_base,
        trained_in_4bit=request.trained_in_4bit,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of whatever computes a certificate."""
    packages = {name: installed(name) for name in _COMPUTES}
    return {**packages, "llama.cpp": LLAMA_CPP_COMMIT, "python": platform.python_version()}


def _digests(request: VerifyRequest, cache: DigestCache | None) -> Iterator[tuple[str, str]]:
    yield "base", digest_of("base", request.base, cache)
    yield "gguf", digest_of("gguf", request.gguf, cache)
    others = {"adapter": request.adapter, "lora": request.lora, "merged": request.merged}
    for option, path in {**others, "imatrix": request.importance}.items():
        if path is not None:
            yield option, digest_of(option, path, cache)


def digest_of(option: str, path: Path, cache: DigestCache | None) -> str:
    """What identifies the file or directory that `forge verify` takes by `--option`."""
    if option in ("base", "merged", "adapter"):
        if not path.is_dir():
            raise DataError(f"{path}: no directory", hint=f"name it with --{option}")
        return adapter_digest(path, cache) if option == "adapter" else base_digest(path, cache)
    return file_digest(path, cache)
