"""`forge join`: this machine's part of a training that another one has begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge import report, worker
from forge.errors import RecipeError
from forge.train.join import read_joining
from forge.train.run import train


def join(path: Path, node: int) -> Mapping[str, object]:
    """Train with the others to the end; the adapter is saved where the training was begun.

    Raises what the training raises, `RecipeError` for a number that no other machine has.
    """
    joining = read_joining(path)
    ranks, request = joining.ranks, joining.request
    if not 1 <= node < ranks.nodes:
        raise RecipeError(f"--node {node}: the other machines are 1 to {ranks.nodes - 1}")
    report.info(f"join: {ranks.processes} of {ranks.count} processes, with {ranks.address}:{ranks.port}")
    log = request.out / "work" / f"node-{node}.log"
    trained = worker.perform(train, request, log=log, together=ranks.environments(node))
    report.success(f"join: {trained.steps} steps; the adapter is where forge ship runs")
    return {"node": node, "steps": trained.steps, "processes": trained.processes}
