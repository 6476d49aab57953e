"""docs/mutants.md: how many mutants of each module the tests killed, and why the others live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from tests.mutants.explained import EXPLAINED
from tests.mutants.mutations import Mutation
from tests.mutants.run import Outcome

_HEAD = """<!-- written by `make mutants`; do not edit -->

# Do the tests notice a fault?

`make mutants` puts small faults into `forge/stages/`, `forge/verify/` and `forge/adapter/`, one at a time,
and runs the few quick tests that are about the module (`tests/mutants/table.py`). A mutant that they let
pass is a survivor: a test is missing, or the fault changes nothing that anybody could see.
`tests/mutants/explained.py` says which.

Every call statement is deleted once. Of the other mutations a sample is tried: a condition negated, a
comparison swapped, a number or truth value changed, an argument or an entry of a dictionary dropped. Slow
tests are not run, so `make test-all` may still catch a survivor.
"""


def written(outcomes: Sequence[Outcome], drawn: int, possible: int) -> str:
    """The whole document: of `possible` mutants `drawn` were to be tried, and `outcomes` are what was."""
    survivors = [outcome.mutation for outcome in outcomes if not outcome.by]
    unexplained = sum(reason_of(mutation) is None for mutation in survivors)
    return "\n".join(
        [
            _HEAD,
            f"Of {possible:,} mutants {drawn} were drawn and {len(outcomes)} of these tried: "
            f"{len(outcomes) - len(survivors)} were killed, {len(survivors)} survived, {unexplained} of them "
            "without a reason.\n",
            *_table(outcomes),
            "\n## Survivors\n",
            *_survivors(survivors),
            "",
        ]
    )


def reason_of(mutation: Mutation) -> str | None:
    """Why no test kills it."""
    return EXPLAINED.get((mutation.path, mutation.context, mutation.change))


def _table(outcomes: Iterable[Outcome]) -> Iterator[str]:
    yield "| module | mutants | killed | survived |"
    yield "|---|---|---|---|"
    for path, group in groupby(outcomes, key=lambda outcome: outcome.mutation.path):
        tried = list(group)
        killed = sum(bool(outcome.by) for outcome in tried)
        yield f"| {path} | {len(tried)} | {killed} | {len(tried) - killed} |"


def _survivors(survivors: Sequence[Mutation]) -> Iterator[str]:
    yield "| line | mutation | why |"
    yield "|---|---|---|"
    for mutation in survivors:
        place, change = f"{mutation.path}:{mutation.line}", mutation.change.replace("|", "\\|")
        yield f"| {place} | {mutation.kind}: `{change}` | {reason_of(mutation) or '—'} |"
