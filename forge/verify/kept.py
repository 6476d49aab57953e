"""What a stopped measurement has made, under fixed names: whole or not at all, and made once.

The directory is of one request, so a name is enough to find a thing again. What a kill left half-made is
made anew in its place. Not covered: a power cut that loses what was written just before.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forge.codec import from_plain, to_plain
from forge.verify.measurement import VerifyRequest

KEPT = "kept"
_PARTIAL = ".partial"
Value = TypeVar("Value")


def holds_any(work: Path) -> bool:
    """Whether a stopped measurement that worked in `work` has finished something."""
    kept = work / KEPT
    return kept.is_dir() and any(not path.name.endswith(_PARTIAL) for path in kept.iterdir())


@contextlib.contextmanager
def kept_of(request: VerifyRequest) -> Iterator[Kept]:
    """What a stopped measurement of the same request has made; gone once this one is whole.

    Of a request that does not go on nothing stays.
    """
    kept = Kept(request.scratch / KEPT)
    if not request.goes_on:
        shutil.rmtree(kept.directory, ignore_errors=True)
    try:
        yield kept
    except BaseException:
        if not request.goes_on:
            shutil.rmtree(kept.directory, ignore_errors=True)
        raise
    shutil.rmtree(kept.directory, ignore_errors=True)


@dataclass(frozen=True)
class Kept:
    """Gives each thing that `make` makes, from the disk where it is there already."""

    directory: Path

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """A directory that `make` fills."""
        final, partial = self.directory / name, self.directory / f"{name}{_PARTIAL}"
        if not final.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            partial.rename(final)
        return final

    def array(self, name: str, make: Callable[[], Any]) -> Any:
        """An array of numpy's."""
        import numpy as np

        def write(folder: Path) -> None:
            np.save(folder / "values.npy", make())

        return np.load(self.folder(name, write) / "values.npy")

    def value(self, kind: type[Value], name: str, make: Callable[[], Value]) -> Value:
        """A dataclass."""

        def write(folder: Path) -> None:
            (folder / "value.json").write_text(json.dumps(to_plain(make())), encoding="utf-8")

        text = (self.folder(name, write) / "value.json").read_text(encoding="utf-8")
        return from_plain(kind, json.loads(text))

    def forget(self, name: str) -> None:
        """Let a thing go that is needed no more."""
        shutil.rmtree(self.directory / name, ignore_errors=True)
