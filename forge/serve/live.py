"""What was measured of the server that is running: the certificate's last hand-over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forge.errors import CheckError, Problem


@dataclass(frozen=True)
class LiveHandover:
    """How far the server's log-probabilities are from the file's, at the first token after `prompts` prompts.

    The KL divergence may be up to `limit`; nothing that a server says gives an NMSE or a perplexity.
    """

    from_: str
    to: str
    ok: bool
    nmse: None
    kl_mean: float
    kl_max: float
    top1: float
    perplexity: None
    prompts: int
    limit: float


@dataclass(frozen=True)
class LiveProof:
    """The hand-over, how answers end (`stop`, `length`), and the `problems`: none when all is well."""

    handover: LiveHandover
    finish_reasons: Mapping[str, int]
    problems: tuple[str, ...]

    def failure(self) -> CheckError | None:
        """The error of a proof with problems."""
        if not self.problems:
            return None
        return CheckError(
            f"deploy: {self.problems[0]}",
            hint="the file is sound: look at deploy in the recipe, and at what else runs on that port",
            problems=[Problem(problem) for problem in self.problems],
        )
