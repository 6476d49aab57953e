"""Runs llama.cpp's converter with the pre-tokenizer that forge decided. A script of its own process.

Usage: python -I convert_entry.py TREE PRE_TOKENIZER ARGUMENT...

The converter knows a tokenizer by a hash of the ids of one text and refuses any other, even one
that differs in its vocabulary alone. A hash it knows stays its own decision; for an unknown one
the name given here is used, and forge proves it afterwards by comparing ids. Imports nothing of forge.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    tree, decided = Path(sys.argv[1]), sys.argv[2]
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    upstream = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(upstream(self, tokenizer))
        except NotImplementedError:
            if not decided:
                raise
            return decided

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    script = tree / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[3:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
