"""llama.cpp's converters, of the very commit that llama-cpp-python was built from.

They travel in that package's source archive, so `forge setup` fetches it through pip by name and
version, checks its sha256, and unpacks only the converters. Nothing is compiled here.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from forge import process, report
from forge.errors import DataError, MissingToolError
from forge.files import sha256_of

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
LLAMA_CPP_COMMIT = "0c1e57098"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERT_SCRIPT = "convert_hf_to_gguf.py"
_WANTED = (CONVERT_SCRIPT, "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE")


def converters_directory(home: Path) -> Path:
    """Where the unpacked converters live under `home` (FORGE_HOME)."""
    return home / "tools" / f"llama.cpp-{LLAMA_CPP_COMMIT}"


def find_converters(home: Path) -> Path:
    """The unpacked converters; raises `MissingToolError` when `forge setup` has not run."""
    directory = converters_directory(home)
    if not (directory / CONVERT_SCRIPT).is_file():
        raise MissingToolError("llama.cpp's converters are not here yet", hint="run: forge setup")
    return directory


def install_converters(home: Path, archive: Path | None = None) -> Path:
    """Unpack the converters from `archive`, or from the source archive that pip downloads.

    Raises `DataError` when the archive is not the pinned one or `home` cannot be written,
    `MissingToolError` when pip cannot fetch it.
    """
    directory = converters_directory(home)
    if (directory / CONVERT_SCRIPT).is_file():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            source = archive or _download(Path(scratch))
            _check(source)
            unpacked = Path(scratch) / "unpacked"
            _unpack(source, unpacked)
            _put_in_place(unpacked, directory)
    except OSError as failure:
        raise DataError(
            f"{directory} cannot be written: {failure.strerror or failure}",
            hint="it needs 10 MB, and 80 MB while it downloads; FORGE_HOME says where",
        ) from failure
    return directory


def _put_in_place(unpacked: Path, directory: Path) -> None:
    try:
        unpacked.rename(directory)
    except OSError:
        if (directory / CONVERT_SCRIPT).is_file():
            return  # another setup was faster
        shutil.rmtree(directory, ignore_errors=True)
        unpacked.rename(directory)


def _download(directory: Path) -> Path:
    report.info(f"fetching {PACKAGE} {VERSION}'s source archive (77 MB) for its converters")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "--dest", str(directory)]
    finished = process.run(command, on_line=report.detail)
    archives = sorted(directory.glob("*.tar.gz"))
    if finished.status or not archives:
        last = finished.output.strip().splitlines()[-1:] or ["no output"]
        raise MissingToolError(
            f"pip could not fetch {PACKAGE} {VERSION}: {last[0]}",
            hint="on a machine with network: pip download --no-deps --no-binary "
            f"{PACKAGE} {PACKAGE}=={VERSION}; then here: forge setup --from FILE",
        )
    return archives[0]


def _check(archive: Path) -> None:
    if not archive.is_file():
        raise DataError(f"{archive} does not exist")
    digest = sha256_of(archive)
    if digest != SDIST_SHA256:
        raise DataError(
            f"{archive} is not the source archive of {PACKAGE} {VERSION}: its sha256 is {digest}",
            hint=f"expected {SDIST_SHA256}",
        )


def _unpack(archive: Path, target: Path) -> None:
    """Only the wanted files, as plain files: `extractall` of early Pythons 3.11 has no filter."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            # <name>-<version>/vendor/llama.cpp/<path>
            parts = PurePosixPath(member.name).parts[1:]
            wanted = parts[:2] == ("vendor", "llama.cpp") and len(parts) > 2 and parts[2] in _WANTED
            if wanted and (stream := tar.extractfile(member)) is not None:
                path = target.joinpath(*parts[2:])
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as out:
                    shutil.copyfileobj(stream, out)
