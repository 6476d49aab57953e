"""Runs llama.cpp's converter with what forge decided of the vocabulary. A script of its own process.

Usage: python -I convert_entry.py TREE CHOICES ARGUMENT... where CHOICES is JSON (see `convert`).

The converter knows a tokenizer by a hash of the ids of one text and refuses any other, even one
that differs in its vocabulary alone. A hash it knows stays its own decision; for an unknown one
the name given here is used, and forge proves it afterwards by comparing ids. Imports nothing of forge.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    tree, choices = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    name_pre_tokenizer(choices)
    add_to_vocabulary(choices)
    script = tree / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[3:]]
    runpy.run_path(str(script), run_name="__main__")


def name_pre_tokenizer(choices: dict[str, Any]) -> None:
    """Answer in place of the converter where its own table has no answer."""
    from conversion.base import TextModel  # type: ignore[import-not-found]

    upstream = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(upstream(self, tokenizer))
        except NotImplementedError:
            if not choices["pre_tokenizer"]:
                raise
            return str(choices["pre_tokenizer"])

    TextModel.get_vocab_base_pre = get_vocab_base_pre


def add_to_vocabulary(choices: dict[str, Any]) -> None:
    """Write what servers do with a prompt: nothing is added to it that training did not have."""
    from gguf import SpecialVocab

    upstream = SpecialVocab.add_to_gguf

    def add_to_gguf(self: Any, writer: Any, quiet: bool = False) -> None:
        if choices["adds_bos"] is not None:
            self.add_special_token = {"bos": choices["adds_bos"], "eos": False}
        if choices["end_of_turn"] is not None:
            self.special_token_ids["eot"] = choices["end_of_turn"]
        if choices["space_prefix"] is not None:
            writer.add_add_space_prefix(choices["space_prefix"])
        upstream(self, writer, quiet)

    SpecialVocab.add_to_gguf = add_to_gguf


if __name__ == "__main__":
    main()
