from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("target")
@click.option("--key", type=_PATH, metavar="PRIVATE.pem", help="Sign with this key (PEM, elliptic curve).")
@click.option("--check", "public", type=_PATH, metavar="PUBLIC.pem", help="See whether the signature holds.")
@click.option(
    "--signature", type=_PATH, help="The signature's file; default: model.sig in a directory, FILE.sig."
)
@common
def command(target: str, key: Path | None, public: Path | None, signature: Path | None) -> None:
    """Sign TARGET, a run, directory or file, or check that its files are what a key's owner signed.

    By the program model_signing (the extra `sign`). Exit 5 where a file was changed, added or taken away, or
    another key signed; files of git and .cache do not count. `forge push --sign` signs what it pushes.
    """
    from forge.commands.sign import sign

    report.result(sign(target, key=key, public=public, signature=signature))
