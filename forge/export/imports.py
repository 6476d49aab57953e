"""What the converter imports, without what an export never uses of it. Runs in a worker."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge.export.upstream import REFUSALS, load


def import_converter(tree: Path, description: Path) -> None:
    """Import what converting the model in `description` takes, which is seconds' work, and do no more."""
    with _without_compiler():
        try:
            load(tree).base.AutoConfig.from_pretrained(description, trust_remote_code=False)
        except (ImportError, NameError):
            # Told here: the converter would go on by config.json alone, as for a model that transformers
            # does not know.
            raise
        except REFUSALS:
            pass  # `convert` is told the same


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """torch and transformers are imported here and stay: to look through them for garbage takes a second.

    It is never done later either, unless they were there before, and with them perhaps what is garbage soon.
    """
    is_first = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """transformers is imported without torch's compiler and without its distributed tensors, a second's work.

    To check the name of an activation transformers imports its modelling code. There the compiler only marks
    a method of transformers' own server, and distributed tensors are left out where torch says that it has
    none. transformers and accelerate then stay on one machine for the rest of the process, which is meant:
    an export runs no model, and a certificate has run its own before.
    """
    import torch

    disable, is_available = torch.compiler.disable, torch.distributed.is_available
    torch.compiler.disable, torch.distributed.is_available = _as_it_is, lambda: False
    try:
        yield
    finally:
        torch.compiler.disable, torch.distributed.is_available = disable, is_available


def _as_it_is(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """torch.compiler.disable, which is also a decorator with arguments, of what is not compiled."""
    return (lambda function: function) if fn is None else fn
