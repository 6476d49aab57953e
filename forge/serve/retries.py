"""What speaks against a row, how long to wait before it is tried again, and when to give all of them up."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from forge.errors import ForgeError
from forge.serve.lanes import Lane
from forge.serve.rows import PromptRow
from forge.serve.wire import BusyError, GarbledError

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
SECONDS_TO_A_WORD = 10.0
LONGEST_RETRY_AFTER_SECONDS = 120.0
# A row that the living server fails to answer so often is set aside, so that it blocks no other.
TRIES_OF_ONE_ROW = 5

_NOT_NOW = (429, 503)
# Of a proxy: the server behind it is gone, or was too slow.
_OF_A_GATEWAY = (502, 504)


@dataclass(eq=False, slots=True)
class Attempts:
    """A row, the failures that spoke against it (`errors`), and how many are to be waited out (`tries`)."""

    row: PromptRow
    tries: int = 0
    errors: int = 0
    failed_at: float = math.inf

    def failed(self, lane: Lane, failure: ForgeError) -> None:
        """Count a failure.

        What a proxy may say of any row speaks against this one only where the lane has answered others since
        the row failed last: while the server behind it restarts nobody is answered.
        """
        self.tries += 1
        if is_of_a_proxy(failure):
            if lane.answered_at > self.failed_at:
                self.errors += 1
                self.tries = 1
        elif isinstance(failure, BusyError):
            self.errors += failure.status not in _NOT_NOW
        self.failed_at = time.monotonic()


@dataclass
class Outage:
    """How long nothing has been answered, from the first failure on."""

    patience_seconds: float
    since: float | None = None
    announced: bool = False

    def answered(self) -> None:
        self.since = None

    def is_over_patience(self) -> bool:
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > self.patience_seconds

    def is_worth_a_word(self) -> bool:
        """Whether it has lasted long enough to say what is waited for; once."""
        lasts = self.since is not None and time.monotonic() - self.since > SECONDS_TO_A_WORD
        if self.announced or not lasts:
            return False
        self.announced = True
        return True


def is_of_a_proxy(failure: ForgeError) -> bool:
    """Whether it is no answer of a server: nothing that makes sense, or a gateway's own error."""
    return isinstance(failure, GarbledError) or (
        isinstance(failure, BusyError) and failure.status in _OF_A_GATEWAY
    )


def pause(tries: int, failure: ForgeError) -> float:
    """Seconds until the next try: what the server asked for, else doubling; with jitter."""
    asked = failure.retry_after if isinstance(failure, BusyError) else None
    seconds = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(tries - 1, 10))
    if asked is not None:
        seconds = min(asked, LONGEST_RETRY_AFTER_SECONDS)
    return seconds * random.uniform(1.0, 1.25)
