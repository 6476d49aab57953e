"""What became of the mutants that were tried, kept beside the store: one line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.mutants.mutations import Mutation
from tests.mutants.run import Outcome


class Kept:
    """The last outcome of each mutant; of one whose line has changed since, none counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, outcome: Outcome) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")

    def outcomes(self, mutations: Iterable[Mutation]) -> list[Outcome]:
        """Those of `mutations` that were tried, in the order of their files."""
        last: dict[Mutation, Outcome] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                fields = json.loads(line)
                mutation = Mutation(**fields.pop("mutation"))
                last[mutation] = Outcome(mutation, **fields)
        return [last[mutation] for mutation in mutations if mutation in last]
