"""The one edge with the Hugging Face Hub: a repository's files, pinned to a commit, on this disk.

`huggingface_hub` does the work (its cache, its token, its retries); here it is given which files to
take, its progress goes to `report`, the disk is checked first, and its exceptions become errors
that say what to do. A broken connection is resumed where it broke; a later run takes up after the
last finished file.

Not covered: uploading; running code that a repository carries.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)

from forge import report
from forge.errors import DataError, StageError
from forge.model.hub_errors import mapped, not_an_id
from forge.model.hub_progress import download
from forge.model.hub_repository import (
    DATA_ENDINGS,
    Kind,
    Repository,
    Snapshot,
    cache_directory,
    endpoint,
    wanted,
)
from forge.model.safetensors_header import TensorSpec

# Room that is left free on the disk after a download.
_RESERVE_BYTES = 512 * 2**20


def local_snapshot(repository: Repository) -> Snapshot | None:
    """The copy in the cache, without any network; None if there is none.

    Raises `DataError` naming the files if the copy is known to be incomplete. A copy whose file list
    was never recorded is taken as it is: reading the checkpoint finds what is missing.
    """
    names = _known_names(repository)
    try:
        directory = snapshot_download(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            cache_dir=cache_directory(),
            local_files_only=True,
            allow_patterns=_patterns(names, repository.kind),
        )
    except IncompleteSnapshotError as error:
        missing = [
            name
            for name in wanted(names or (), repository.kind)
            if not Path(error.snapshot_path, name).exists()
        ]
        raise DataError(
            f"{repository.id}: the copy in the cache is incomplete: {', '.join(missing)}",
            hint="run it once with the network (`forge ship` goes on where the download stopped)",
        ) from error
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise not_an_id(repository) from error
    return Snapshot(Path(directory), Path(directory).name)


def fetch_snapshot(repository: Repository) -> Snapshot:
    """A whole copy of the repository's wanted files, downloaded as far as it is not here yet.

    A commit that is here in full needs no network. When the hub cannot be reached, a whole copy in
    the cache is used and said so. Raises `DataError` (not there, gated, no weights), `MissingToolError`
    (the hub cannot be reached), `StageError` (no disk space).
    """
    # Its warnings (a retry, no token) are for its own users; what matters is said here.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if re.fullmatch(r"[0-9a-f]{40}", repository.revision) and _known_names(repository):
        with contextlib.suppress(DataError):
            here = local_snapshot(repository)
            if here:
                return here
    with mapped(repository):
        try:
            commit, sizes = _listing(repository)
        except (httpx2.TransportError, HfHubHTTPError) as error:
            return _instead_of(repository, error)
        names = wanted(sizes, repository.kind)
        _check_contents(repository, sizes, names)
        todo = {name: sizes[name] for name in names if not _is_cached(repository, commit, name)}
        _check_disk(repository, sum(todo.values()))
        return _download(repository, names, todo)


def fetch_headers(repository: Repository) -> tuple[Snapshot, dict[str, TensorSpec]]:
    """The repository's small files, and its tensors read from the first bytes of each shard.

    For a plan: a few megabytes instead of gigabytes. The tensors' extents count from the first
    tensor, not from the start of the file, which is not here. Raises as `fetch_snapshot`.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with mapped(repository):
        commit, sizes = _listing(repository)
        names = wanted(sizes, repository.kind)
        _check_contents(repository, sizes, names)
        shards = [name for name in names if name.endswith(".safetensors")]
        texts = [name for name in names if name not in shards]
        snapshot = _download(repository, texts, {})
        tensors: dict[str, TensorSpec] = {}
        for shard in shards:
            tensors |= _remote_header(repository, commit, shard, snapshot.directory / shard)
        return snapshot, tensors


def _remote_header(repository: Repository, commit: str, name: str, path: Path) -> dict[str, TensorSpec]:
    api = HfApi(endpoint=endpoint(), library_name="forge")
    try:
        header = api.parse_safetensors_file_metadata(repository.id, name, revision=commit)
    except SafetensorsParsingError as error:
        raise DataError(
            f"{repository.id}: {name} is not a safetensors file", hint="see " + repository.page
        ) from error
    return {
        tensor: TensorSpec(tensor, info.dtype, tuple(info.shape), path, *info.data_offsets)
        for tensor, info in header.tensors.items()
    }


def _listing(repository: Repository) -> tuple[str, dict[str, int]]:
    api = HfApi(endpoint=endpoint(), library_name="forge")
    asked = api.model_info if repository.kind == "model" else api.dataset_info
    info = asked(repository.id, revision=repository.revision, files_metadata=True)
    return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _instead_of(repository: Repository, error: Exception) -> Snapshot:
    """The whole copy in the cache, when the hub is down; else the error itself."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 503
    here = local_snapshot(repository) if status >= 500 else None
    if here is None:
        raise error
    report.warning(
        f"the hub cannot be reached; using the copy of {repository.id} here (commit {here.commit[:12]})"
    )
    return here


def _download(repository: Repository, names: list[str], todo: Mapping[str, int]) -> Snapshot:
    total = sum(todo.values())
    if todo:
        report.info(f"fetching {repository.id} from {endpoint()}: {len(todo)} files, {total / 1e9:.2f} GB")

    def work(bar: type[Any]) -> str:
        return snapshot_download(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            endpoint=endpoint(),
            cache_dir=cache_directory(),
            allow_patterns=_patterns(names, repository.kind),
            tqdm_class=bar,
            library_name="forge",
        )

    directory = download(f"download {repository.id}", total, work)
    return Snapshot(Path(directory), Path(directory).name)


def _known_names(repository: Repository) -> list[str] | None:
    """The repository's files as recorded by an earlier download, or None."""
    try:
        tree = get_cached_repo_tree(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            cache_dir=cache_directory(),
        )
    except (CachedRepoTreeNotFoundError, HFValidationError):
        return None
    return [file.path for file in tree]


def _patterns(names: Iterable[str] | None, kind: Kind) -> list[str] | None:
    return None if names is None else [glob.escape(name) for name in wanted(names, kind)]


def _is_cached(repository: Repository, commit: str, name: str) -> bool:
    cached = try_to_load_from_cache(
        repository.id, name, cache_dir=cache_directory(), revision=commit, repo_type=repository.kind
    )
    return isinstance(cached, str)


def _check_contents(repository: Repository, sizes: Iterable[str], names: Iterable[str]) -> None:
    """Say before gigabytes are fetched that there is nothing to use."""
    if repository.kind == "dataset":
        if not any(name.endswith(DATA_ENDINGS) for name in names):
            raise DataError(
                f"{repository.id}: no data there as {', '.join(DATA_ENDINGS)}", hint="see " + repository.page
            )
        return
    if any(name.endswith(".safetensors") for name in names):
        return
    ends = {Path(name).suffix for name in sizes}
    if ends & {".bin", ".pth", ".pt"}:
        raise DataError(
            f"{repository.id}: only pickled PyTorch weights (.bin, .pth) are there; safetensors are needed",
            hint="look for a revision that adds safetensors, or save it anew with transformers",
        )
    what = "only GGUF files are" if ".gguf" in ends else "no weights in safetensors are"
    raise DataError(
        f"{repository.id}: {what} there; a base must be an original checkpoint", hint="see " + repository.page
    )


def _check_disk(repository: Repository, needed: int) -> None:
    directory = cache_directory()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if needed and needed + _RESERVE_BYTES > free:
        raise StageError(
            f"no disk space for {repository.id}: {needed / 1e9:.2f} GB to download, "
            f"{free / 1e9:.2f} GB free in {directory}",
            hint="free some space, or point HF_HOME to a larger disk",
        )
