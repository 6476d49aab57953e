"""Rows to ids, once: `python rows_to_ids.py forge|datasets TOKENIZER ROWS OUT` prints seconds and tokens.

Only the work is timed, from the file of rows to a file of ids, without imports. forge makes the loss mask
and its checks beside. The usual way is `datasets.map` with `apply_chat_template` and a batched tokenizer.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def forge(tokenizer: Path, rows: Path, out: Path) -> tuple[float, int]:
    """By forge's data stage."""
    from tokenizers import Tokenizer

    from forge.chat.template import ChatTemplate
    from forge.data.prepare import Settings, prepare
    from forge.data.prompt_format import prompt_format
    from forge.data.reading import Source
    from forge.model.tokenizer_files import read_tokenizer

    files = read_tokenizer(tokenizer)
    template = ChatTemplate(files.chat_template or "", files.template_tokens)
    form = prompt_format(template, Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
    began = time.perf_counter()
    prepared = prepare(Settings([Source((rows,))], 0), form, None, out)
    return time.perf_counter() - began, prepared.rows


def datasets(tokenizer: Path, rows: Path, out: Path) -> tuple[float, int]:
    """As it is usually written."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    encode = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    began = time.perf_counter()
    read = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(out))
    made = read.map(
        lambda batch: encode(
            encode.apply_chat_template(batch["messages"], tokenize=False), add_special_tokens=False
        ),
        batched=True,
        remove_columns=read.column_names,
    )
    return time.perf_counter() - began, len(made)


if __name__ == "__main__":
    way = {"forge": forge, "datasets": datasets}[sys.argv[1]]
    taken, count = way(*map(Path, sys.argv[2:5]))
    print(json.dumps({"seconds": taken, "rows": count}))
