"""Files into a repository of the Hugging Face Hub, by huggingface_hub's own client and login.

Large files go up one after another and then one commit names them all: what arrived before an interruption
is not sent again, and nobody sees half a model. The token is the client's own affair.

Not covered: pull requests, branches, data sets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils.tqdm import disable_progress_bars

from forge import report
from forge.errors import DataError, RecipeError, StageError
from forge.model.hub_errors import mapped
from forge.model.hub_repository import Repository, endpoint, is_offline

_SHOWN_BYTES = 10_000_000


def require_login() -> None:
    """Raise before anything long where nothing could be pushed."""
    if is_offline():
        raise RecipeError(
            "a push asks the hub, and it may not be asked (offline)", hint="leave out --offline"
        )
    if get_token() is None:
        raise DataError(
            "no login for the hub is here",
            hint="set HF_TOKEN or run `hf auth login`, with a token that may write",
        )


def upload(repository: Repository, files: Mapping[str, Path | bytes], *, private: bool) -> str:
    """Make the repository if there is none, put `files` there by their names in it; gives the commit.

    Raises `DataError` for what the hub refuses, and for one that everybody can read where `private` is asked
    for; `StageError` and `MissingToolError` where it breaks off.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = HfApi(endpoint=endpoint(), library_name="forge")
    additions = [
        CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
        for name, source in files.items()
    ]
    with mapped(repository), disable_progress_bars():
        api.create_repo(repository.id, private=private, exist_ok=True)
        if private and not api.model_info(repository.id).private:
            raise DataError(
                f"{repository.id} is there already, and everybody can read it",
                hint="make it private on its page, or push to another name",
            )
        try:
            for addition in additions:
                if addition.upload_info.size > _SHOWN_BYTES:
                    report.info(f"push {addition.path_in_repo}: {addition.upload_info.size / 1e9:.2f} GB")
                api.preupload_lfs_files(repository.id, [addition])
            return api.create_commit(repository.id, additions, commit_message="Ship with forge").oid
        except (RuntimeError, ValueError) as failure:
            if isinstance(failure, RuntimeError) and isinstance(failure.__cause__, OSError):
                raise failure.__cause__ from failure  # what a thread raised
            raise StageError(
                f"{repository.id}: the hub did not take it: {' '.join(str(failure).split())}",
                hint="run it again: what arrived is not sent again",
            ) from failure
