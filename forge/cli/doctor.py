from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("message", required=False)
@common
def command(message: str | None) -> None:
    """Look at this machine; or explain MESSAGE, an error's text or a log file.

    Without MESSAGE: what is here, what is missing, what that costs and what brings it. With one: cause
    and remedy of every error and warning in it that forge knows; exit 2 when it knows none.
    """
    from forge.commands.doctor import doctor, explain

    report.result(doctor() if message is None else explain(message))
