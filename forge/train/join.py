"""What another machine needs to take part in a training, as a file that both see."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from forge import report
from forge.codec import from_plain, to_plain
from forge.errors import DataError
from forge.files import kept_json, write_text
from forge.train.ranks import Ranks
from forge.train.request import TrainRequest

_FILE = "join.json"


@dataclass(frozen=True)
class Joining:
    """A training and its processes."""

    request: TrainRequest
    ranks: Ranks


def invite(joining: Joining) -> None:
    """Write the file where several machines are to train, and say what to type on the others."""
    if joining.ranks.nodes == 1:
        return
    path = joining.request.out / "work" / _FILE
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(to_plain(joining)))
    ranks = joining.ranks
    report.info(f"train: waits at {ranks.address}:{ranks.port} for the other machines, which see this path:")
    for node in range(1, ranks.nodes):
        report.info(f"  forge join {path} --node {node}")


def read_joining(path: Path) -> Joining:
    """Raises `DataError` where the file is none of `invite`."""
    try:
        return from_plain(Joining, kept_json(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no training to join: {error}",
            hint="forge ship shows the command for the other machines, which must see its store at this path",
        ) from error
