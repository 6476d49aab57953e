"""`python -m tests.mutants`: try a sample of mutants, keep what became of them, and write docs/mutants.md."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.mutants.document import written
from tests.mutants.kept import Kept
from tests.mutants.mutations import Mutation, mutations_of
from tests.mutants.run import ROOT, Outcome, copied_tree
from tests.mutants.table import TESTS

SEED, SAMPLE = 15, 60
DOCUMENT = ROOT / "docs" / "mutants.md"


def all_mutations(paths: Iterable[str]) -> list[Mutation]:
    """Every mutation of these files, in their order."""
    return [one for path in paths for one in mutations_of(path, (ROOT / path).read_text(encoding="utf-8"))]


def sampled(mutations: Sequence[Mutation], size: int, seed: int) -> list[Mutation]:
    """Every deleted call, since a check may be one, and `size` of the others, in their order.

    Each draws its own lot: a source that changes leaves the sample of the others as it is.
    """

    def lot(mutation: Mutation) -> bytes:
        said = (seed, mutation.path, mutation.kind, mutation.context, mutation.change, mutation.number)
        return hashlib.sha256(repr(said).encode()).digest()

    others = sorted((one for one in mutations if one.kind != "call deleted"), key=lot)
    chosen = set(others[:size])
    return [one for one in mutations if one.kind == "call deleted" or one in chosen]


def try_all(mutations: Iterable[Mutation], tests: Mapping[str, Sequence[str]]) -> Iterator[Outcome]:
    """Run the tests of each mutant, and say what became of it."""
    with copied_tree() as tree:
        for mutation in mutations:
            outcome = tree.outcome(mutation, tests[mutation.path])
            place, fate = f"{mutation.path}:{mutation.line}", outcome.by or "SURVIVED"
            print(f"{place}: {mutation.kind}: {mutation.change[:80]}: {fate}", flush=True)
            yield outcome


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("paths", nargs="*", help="default: every file of the table")
    parser.add_argument("--tests", nargs="+", help="of files that are not in the table; nothing is kept")
    parser.add_argument("--sample", type=int, default=SAMPLE, help=f"beside the deleted calls; {SAMPLE}")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    parser.add_argument("--go-on", action="store_true", help="only what has not been tried")
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    parser.add_argument("--document", action="store_true", help="try nothing, write the document")
    asked = parser.parse_args()
    if asked.tests:
        wanted = sampled(all_mutations(asked.paths), asked.sample, asked.seed)
        for _ in try_all(wanted, dict.fromkeys(asked.paths, asked.tests)):
            pass
        return
    kept = Kept(Path(os.environ.get("FORGE_HOME") or ROOT / ".forge") / "mutants.jsonl")
    everything = all_mutations(sorted(TESTS))
    wanted = sampled(everything, asked.sample, asked.seed)
    if not asked.document:
        known = {outcome.mutation: outcome.by for outcome in kept.outcomes(wanted)}
        chosen = [one for one in wanted if not asked.paths or one.path in asked.paths]
        if asked.go_on:
            chosen = [one for one in chosen if one not in known]
        if asked.again:
            chosen = [one for one in chosen if known.get(one) == ""]
        for outcome in try_all(chosen, TESTS):
            kept.add(outcome)
    DOCUMENT.write_text(written(kept.outcomes(wanted), len(wanted), len(everything)), encoding="utf-8")


if __name__ == "__main__":
    main()
