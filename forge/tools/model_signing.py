"""Signatures of files, by the program `model_signing` (OpenSSF's model-signing, the extra `sign`).

A signature is a sigstore bundle over the names and digests of all files in a directory, or of one file.
Files of git and the hub's `.cache`, which a download leaves behind, are no part of it.

Not covered: its other ways (certificates, PKCS #11, sigstore's own identities).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from forge import process
from forge.errors import CheckError, DataError, MissingToolError

_PROGRAM = "model_signing"
_CACHE = ".cache"


def sign_files(target: Path, key: Path, signature: Path) -> None:
    """Write `signature` of `target` with the private key; raises `DataError` for a key that cannot sign."""
    failure = _run("sign", target, signature, "--private_key", key)
    if failure is None:
        return
    hint = "a key is made by: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
    if "encrypted" in failure:
        hint = (
            f"a program's arguments can be seen: openssl ec -in {key} -out plain.pem takes the password off"
        )
    raise DataError(f"{target} is not signed with {key}: {failure}", hint=hint)


def check_signature(target: Path, key: Path, signature: Path) -> None:
    """Raise `CheckError` where `signature` is not of `target`'s very files, or by another key."""
    if not signature.is_file():
        raise DataError(f"{signature}: there is no signature", hint="name it with --signature")
    if failure := _run("verify", target, signature, "--public_key", key):
        raise CheckError(
            f"{signature} does not hold for {target}: {failure}",
            hint="take only what the key's owner has signed, or have it signed anew",
        )


def _run(verb: str, target: Path, signature: Path, option: str, key: Path) -> str | None:
    """What the program has against it."""
    if not key.is_file():
        raise DataError(f"{key}: there is no such key", hint="name a file in PEM format")
    beside = Path(sys.executable).with_name(_PROGRAM)
    program = str(beside) if beside.is_file() else shutil.which(_PROGRAM)
    if program is None:
        raise MissingToolError(f"there is no program {_PROGRAM}", hint="pip install 'forge-ship[sign]'")
    command = [program, verb, "key", str(target), option, str(key), "--signature", str(signature)]
    done = process.run([*command, "--allow_symlinks", "--ignore-paths", str(target / _CACHE)])
    if done.status == 0:
        return None
    last = done.output.strip().rpartition("\n")[2]
    return last.partition("with error: ")[2].strip() or last or "it does not say why"
