"""What the converter imports, without what an export never uses of it. Runs in a worker."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forge.export.upstream import REFUSALS, load


def import_converter(tree: Path, description: Path) -> None:
    """Import what converting the model in `description` takes, which is seconds' work, and do no more."""
    with _without_compiler():
        # Alone, so that a transformers that cannot be imported like this is told: to the converter, a
        # failed import would be a configuration that transformers does not know.
        importlib.import_module("transformers.activations")
        with contextlib.suppress(*REFUSALS):  # `convert` is told the same
            load(tree).base.ModelBase.load_hparams(description, False)


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
    """Import transformers without what torch compiles models with, or spreads them over machines: a second.

    To check the name of an activation it imports its modelling code, which imports the two: the first to
    mark a method of its server, the second where torch says that it has it. An export runs no model.
    """
    import torch

    disable, is_available = torch.compiler.disable, torch.distributed.is_available
    torch.compiler.disable, torch.distributed.is_available = _as_it_is, lambda: False
    try:
        yield
    finally:
        torch.compiler.disable, torch.distributed.is_available = disable, is_available


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """torch.compiler.disable, as a decorator with and without arguments, of what is not compiled."""
    return function if function is not None else _as_it_is
