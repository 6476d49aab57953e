"""Does transformers read a checkpoint's tokenizer.json as it is written? Runs in a worker.

Training, the certificate and llama.cpp go by the file. Some classes of transformers 5, such as Llama's, take
no more of it than the vocabulary, and split the text their own way; `AutoTokenizer` takes the class that
tokenizer_config.json names, for some families one that no file changes.

Not covered: other versions of transformers than the one that is installed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from forge import report
from forge.chat.template import Message
from forge.export import proof
from forge.export.describe import change_fields, template_in
from forge.export.upstream import REFUSALS
from forge.model.tokenizer_files import open_tokenizer

_AS_WRITTEN = "PreTrainedTokenizerFast"


def misreading(directory: Path, conversations: Sequence[Sequence[Message]] = ()) -> str | None:
    """How `AutoTokenizer` reads the tokenizer.json in `directory` otherwise than it is written, if it does.

    The first text of which it makes other ids is named. Prompts are encoded as chat templates are, plain
    texts with what the tokenizer puts before them.
    """
    import transformers

    version = transformers.__version__
    what = f"transformers {version}'s AutoTokenizer does not read tokenizer.json as it is written"
    try:
        reader = transformers.AutoTokenizer.from_pretrained(directory)
    except REFUSALS as refusal:
        return f"{what} ({type(refusal).__name__}: {' '.join(str(refusal).split())[:200]})"
    reference = open_tokenizer(directory)
    strings = proof.test_strings()
    rendered = [case.text for case in proof.cases(template_in(directory), strings, conversations)]
    for texts, begins in ((rendered, False), (strings, True)):
        for text in texts:
            written = reference.encode(text, add_special_tokens=begins).ids
            read = reader.encode(text, add_special_tokens=begins)
            if read != written:
                return (
                    f"{what}, as training and llama.cpp do: its {type(reader).__name__} "
                    f"{_unlike(read, written)} in {text[:60]!r}; {_AS_WRITTEN}.from_pretrained reads it so"
                )
    return None


def settle_reading(directory: Path, conversations: Sequence[Sequence[Message]] = ()) -> None:
    """Have `AutoTokenizer` read a checkpoint as its tokenizer.json says; warn where it will not."""
    if not misreading(directory, conversations):
        return
    path = directory / "tokenizer_config.json"
    before = path.read_bytes() if path.is_file() else None
    change_fields(path, tokenizer_class=_AS_WRITTEN)
    left = misreading(directory, conversations)
    if left:
        path.unlink() if before is None else path.write_bytes(before)
        report.warning(f"the merged checkpoint: {left}")


def _unlike(read: Sequence[int], written: Sequence[int]) -> str:
    """Where two lists of ids part."""
    same = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(read, written, strict=False))
    )
    return f"has {list(read[same : same + 4])} for {list(written[same : same + 4])} at token {same}"
