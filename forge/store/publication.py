"""How an artifact's directory is filled and gets its final name.

`fill` makes `<key>.partial/` and writes the manifest last; `give_final_name` renames it. Whatever moment a
process is killed at, the next build finds either the state before, or something it can finish.
The caller holds the lock of the key.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from forge.codec import Json, to_plain
from forge.files import sync, write_text
from forge.store.digest import canonical, digest, file_digest, names_digest

MANIFEST = "artifact.json"
WORK = "work"
LOGS = "logs"
PARTIAL = ".partial"
REPLACED = ".replaced"


@dataclass(frozen=True)
class Output:
    """One file of an artifact."""

    sha256: str
    bytes: int


def fill(
    partial: Path,
    head: Mapping[str, Json],
    build: Callable[[Path], object],
    recorded: Mapping[str, str],
) -> None:
    """Call `build` with `partial`, empty but for `work/`, then hash its outputs and write the manifest.

    `head` opens the manifest. Whatever is raised passes through; of the directory only a `work/`
    that holds something stays then.
    """
    clear(partial)
    partial.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        facts = to_plain(build(partial))
        canonical(facts)  # before anything is hashed: a fact that is not JSON is the stage's fault
        outputs = _seal(partial)
        manifest = {
            **head,
            "facts": facts,
            "recorded": dict(recorded),
            "seconds": round(time.monotonic() - started, 3),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outputs": to_plain(outputs),
            "digest": names_digest({name: output.sha256 for name, output in outputs.items()}),
            "sealed": digest([facts, dict(recorded)]),
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    except BaseException:
        clear(partial)
        raise


def _seal(partial: Path) -> Mapping[str, Output]:
    """Read back every output, flush it to the disk, make it readable to all and writable to none."""
    outputs: dict[str, Output] = {}
    for path in sorted(partial.rglob("*")):
        name = path.relative_to(partial)
        if name.parts[0] in (WORK, LOGS, MANIFEST):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{name.as_posix()}: an output must be a file, not a link or a device")
        sync(path)
        if path.is_file():
            path.chmod(0o444)
            outputs[name.as_posix()] = Output(file_digest(path), path.stat().st_size)
    return outputs


def clear(partial: Path) -> None:
    """Remove everything but a `work/` that holds something."""
    if not holds_something(partial / WORK):
        shutil.rmtree(partial, ignore_errors=True)
        return
    for path in partial.iterdir():
        if path.name != WORK:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def holds_something(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def give_final_name(partial: Path, final: Path) -> None:
    """Give `partial` its final name. What was there before steps aside first, and is then removed."""
    shutil.rmtree(partial / WORK, ignore_errors=True)
    sync(partial)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def finish_replacement(final: Path) -> None:
    """After a kill between the two renames of `give_final_name`: put the earlier artifact back."""
    replaced = final.with_name(final.name + REPLACED)
    if not replaced.exists():
        return
    if final.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(final)
