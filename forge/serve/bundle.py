"""One archive for a computer without network or GPU: model, server, start scripts, checksums, a smoke test.

The server is for Linux, with every library that it needs, the loader among them, so that nothing has to
be installed. On macOS and Windows the model is opened in what people have there; the README says how.

Not covered: a GPU, processors of another kind than this one's, signing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path

from forge.errors import DataError, RecipeError
from forge.files import sha256_of, work_beside
from forge.serve import bundle_files, bundle_python
from forge.serve.runtime import ServerSettings

SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle: `files` are further ones (name -> file) such as Modelfiles.

    `question` and `expect` are the smoke test's: the answer to the first must hold the second. `adapter`
    is the model's own, which the server loads with it.
    """

    name: str
    model: Path
    context_tokens: int
    licence: str
    question: str
    expect: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    adapter: Path | None = None


def write_bundle(contents: Contents, out: Path) -> int:
    """Write the archive and give its size in bytes; it appears whole or not at all.

    The server is the one that the wheel carries, behind forge's front door. Raises `RecipeError`,
    `DataError`, or `MissingToolError` where that server cannot run.
    """
    if not out.name.endswith(SUFFIXES):
        raise RecipeError(f"--out {out}: a bundle is a {' or '.join(SUFFIXES[:2])} file")
    adapter = contents.adapter
    weights = {path.name: path for path in (contents.model, adapter) if path}
    for name in weights:
        # It stands in shell scripts and in the list of checksums.
        if not re.fullmatch(r"[A-Za-z0-9._ ()+-]+", name):
            raise RecipeError(f"{name}: a start script cannot say this name", hint="rename the file")
    files: dict[str, Path | str] = {**weights, **contents.files}
    settings = ServerSettings(
        contents.model, contents.name, contents.context_tokens, parallel=1, adapter=adapter
    )
    server, loader = bundle_python.files(settings)
    files |= server
    files |= bundle_files.bundle_texts(settings, contents.files, loader=loader)
    files["LICENCES.txt"] = bundle_files.licences(contents.licence)
    files["smoke.json"] = json.dumps(
        {"messages": [{"role": "user", "content": contents.question}], "max_tokens": 64, "temperature": 0}
    )
    files["smoke.expect"] = contents.expect
    with work_beside(out) as work:
        try:
            _write(contents.name, files, work / out.name)
            (work / out.name).replace(out)
        except OSError as failure:
            raise DataError(f"{out} cannot be written: {failure.strerror}") from failure
    return out.stat().st_size


def _write(name: str, files: Mapping[str, Path | str], out: Path) -> None:
    """The files in order, as of no time and nobody's: the same contents give the same bytes."""
    sums: list[str] = []
    with ExitStack() as stack:
        stream: BufferedWriter | gzip.GzipFile = stack.enter_context(out.open("wb"))
        if out.suffix != ".tar":
            # Weights hardly shrink: the highest level takes twice the time for nothing.
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=stream, mtime=0)
            stream = stack.enter_context(packed)
        archive = stack.enter_context(tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT))
        for inside, source in sorted(files.items()):
            sums.append(f"{_digest(source)}  {inside}\n")
            _add(archive, f"{name}/{inside}", source)
        _add(archive, f"{name}/SHA256SUMS", "".join(sums))


def _add(archive: tarfile.TarFile, inside: str, source: Path | str) -> None:
    member = tarfile.TarInfo(inside)
    runs = inside.endswith((".sh", "bin/python3")) or "/linux/lib/" in inside
    member.mode = 0o755 if runs else 0o644
    if isinstance(source, str):
        content = source.encode()
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
        return
    member.size = source.stat().st_size
    with source.open("rb") as stream:
        archive.addfile(member, stream)


def _digest(source: Path | str) -> str:
    if isinstance(source, str):
        return hashlib.sha256(source.encode()).hexdigest()
    return sha256_of(source)
