"""forge: fine-tune a chat model, ship it as GGUF, and prove that the model served is the model trained.

The public names are those of `__all__`, described in `forge.api`; each is imported when it is first used,
so that `import forge` and the command stay light.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.api import (
        Client,
        ForgeError,
        export,
        generate,
        load,
        modelfile,
        plan,
        serve,
        ship,
        template,
        train,
        verify,
    )

__all__ = [
    "Client", "ForgeError", "export", "generate", "load", "modelfile", "plan", "serve", "ship", "template",
    "train", "verify",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'forge' has no attribute {name!r}")
    return getattr(importlib.import_module("forge.api"), name)


class _Room(ModuleType):
    """A package that has the name of a public function (`forge.ship`, `forge.export` ...) and calls it."""

    def __call__(self, *arguments: Any, **options: Any) -> object:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("forge.api"), name)(*arguments, **options)


class _Forge(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets a package here once it is imported, over the function of that name.
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Forge
