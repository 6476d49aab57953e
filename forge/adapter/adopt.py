"""An adapter of another tool, copied as peft's save_pretrained would have written it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

from forge.adapter.directory import CONFIG_FILE, WEIGHTS_FILE
from forge.adapter.names import as_peft_writes, bare, factor

_LENGTH = struct.Struct("<Q")


def copy_adapter(source: Path, target: Path) -> bool:
    """Copy settings and weights into the directory `target`; returns whether tensors were renamed.

    peft loads none of the factors whose names are wrapped, and says no more than a warning. The values are
    copied byte for byte. `source` was read by `read_adapter`, so its header is sound.
    """
    shutil.copyfile(source / CONFIG_FILE, target / CONFIG_FILE)
    with (source / WEIGHTS_FILE).open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header: dict[str, object] = json.loads(file.read(length))
        renamed = {_name(name): entry for name, entry in header.items()}
        text = json.dumps(renamed, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the values begin at a multiple of eight
        with (target / WEIGHTS_FILE).open("wb") as copy:
            if renamed == header:
                file.seek(0)
            else:
                copy.write(_LENGTH.pack(len(text)) + text)
            shutil.copyfileobj(file, copy)
    return renamed != header


def _name(name: str) -> str:
    if name == "__metadata__":
        return name
    if factor(name) is not None or bare(name) != name.removeprefix("base_model.model."):
        written = as_peft_writes(name)
        # Older peft wrote these two with an end of their own.
        return name if written in (name, name.removesuffix(".weight")) else written
    return name
