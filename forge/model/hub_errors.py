"""What huggingface_hub raises, as errors that say what to do.

The hub's own transport errors (httpx2, huggingface_hub's client) come through it unchanged.

Not covered: uploading; a hub that answers with something other than the Hub's API.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from forge.errors import DataError, ForgeError, MissingToolError, StageError
from forge.model.hub_repository import Repository, cache_directory, endpoint


@contextlib.contextmanager
def mapped(repository: Repository) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors that say what to do."""
    try:
        yield
    except (httpx2.HTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise _translated(repository, error) from error


def _translated(repository: Repository, error: Exception) -> ForgeError:
    login = "set HF_TOKEN or run `hf auth login`"
    match error:
        case HFValidationError():
            return not_an_id(repository)
        case GatedRepoError():
            return DataError(
                f"{repository.id} is gated: its licence must be accepted first",
                hint=f"accept it at {repository.page}, then {login}",
            )
        case RevisionNotFoundError():
            return DataError(
                f"{repository.id} has no revision {repository.revision!r}", hint="see " + repository.page
            )
        case RepositoryNotFoundError():
            return DataError(
                f"{repository.id}: the hub has no such {repository.kind}, or it is private",
                hint=f"did you mean a directory? There is none of that name. For a private one {login}",
            )
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return DataError(
                f"{repository.id}: the hub refuses the token that it was sent",
                hint=f"{login}; a push needs one that may write there",
            )
        case OSError(errno=errno.ENOSPC):
            return StageError(
                f"no disk space left while fetching {repository.id}", hint="free some space and run again"
            )
        case OSError(errno=int(), filename=str(name)):
            return StageError(
                f"{name}: {error.strerror}", hint=f"check HF_HOME; the cache is {cache_directory()}"
            )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return MissingToolError(
        f"the hub at {endpoint()} cannot be reached or broke off: {first}",
        hint="run it again: finished files are kept; or set HF_ENDPOINT to a mirror, "
        "or give `base` the directory of a copy",
    )


class NotAnIdError(DataError):
    """No directory, and nothing that the hub would call a repository."""


def not_an_id(repository: Repository) -> NotAnIdError:
    return NotAnIdError(
        f"{repository.id!r} is neither a directory nor a hub id",
        hint="a hub id looks like organisation/name or organisation/name@revision",
    )
