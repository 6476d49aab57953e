"""Where rows come from: built in, a file, a directory, a pattern; and which files are of a split.

Not covered: the hub (`model.base` fetches; what it gives is a directory).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from forge.data.configurations import configured_files
from forge.data.files import PACKED, SUFFIXES, lies_among_rows
from forge.data.json_rows import SPLITS
from forge.errors import DataError

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
BUILTIN = Path(__file__).parent / "builtin"
BUILTIN_PREFIX = "builtin:"
_BUILTIN_FILES = {name: f"{name}.jsonl" for name in ("yoda", "yoda_heldout", "sentiment", "code", "medical")}
_SAME_SPLIT = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}


def locate(source: str, directory: Path, field: str = "data.source") -> Path:
    """The one file that `source` names: built in, absolute, or relative to `directory`.

    Raises `DataError` when there is no such file. Hub ids are resolved before (see `model.base`).
    """
    files = locate_all(source, directory, "train", field)
    if len(files) != 1:
        raise DataError(f"{field}: {source} is {len(files)} files, and one is needed here")
    return files[0]


def locate_all(source: str, directory: Path, split: str, field: str = "data.source") -> tuple[Path, ...]:
    """The files that `source` names: built in, a file, those of a directory or of a pattern (`*.jsonl`).

    Raises `DataError` when there is none, and for a split of which nothing there has the name.
    """
    files = _files_of(source, directory, split, field)
    if not (directory / Path(source).expanduser()).is_dir():
        _require_named(source, files, split.partition("[")[0])
    return files


def _require_named(source: str, files: Sequence[Path], split: str) -> None:
    """A JSON file may hold several splits, which is seen when it is read; of others the name must say it."""
    wanted = _SAME_SPLIT.get(split, split)
    for path in files:
        named = f"{source} {path.name}".lower()
        if wanted in ("train", _split_of(Path(path.name))) or ".json" in path.suffixes or split in named:
            return
    raise DataError(
        f"data.split: nothing says which rows of {source} are of the split {split!r}",
        hint="leave it out, or take a slice such as train[:10%]",
    )


def _files_of(source: str, directory: Path, split: str, field: str) -> tuple[Path, ...]:
    if source.startswith(BUILTIN_PREFIX):
        name = source.removeprefix(BUILTIN_PREFIX)
        if name not in _BUILTIN_FILES:
            raise DataError(
                f"{field}: there is no built-in data {source!r}",
                hint="built in are " + ", ".join(BUILTIN_PREFIX + known for known in _BUILTIN_FILES),
            )
        return (BUILTIN / _BUILTIN_FILES[name],)
    path = directory / Path(source).expanduser()
    if path.is_file():
        return (path.resolve(),)
    if path.is_dir():
        return files_of_split(path.resolve(), split)
    if any(letter in source for letter in "*?["):
        root = Path(path.anchor)
        matching = sorted(match for match in root.glob(str(path.relative_to(root))) if match.is_file())
        # As in a shell, what is hidden is meant only where it is named.
        files = [
            match
            for match in matching
            if not any(part.startswith(".") and part not in path.parts for part in match.parts)
        ]
        if files:
            return tuple(files)
        raise DataError(f"{field}: no file matches {source}", hint=f"looked in {directory}")
    if path.exists():
        raise DataError(
            f"{field}: {path} is neither a file nor a directory, and rows are read more than once",
            hint="write what comes out of it into a file",
        )
    raise DataError(
        f"{field}: {path} does not exist",
        hint=f"name a file ({', '.join(SUFFIXES)}), a directory or a pattern",
    )


def files_of_split(folder: Path, split: str) -> tuple[Path, ...]:
    """The data files below a directory that belong to `split`: by its README, else by their names, as the
    hub does it.

    Where no name says a split, all of them. Raises `DataError` when there is none.
    """
    name = split.partition("[")[0]
    files = configured_files(folder, name)
    if isinstance(files, tuple):
        return files
    return _named_files(files, name.rpartition("/")[2]) if files else _named_files(folder, name)


def _named_files(folder: Path, name: str) -> tuple[Path, ...]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and lies_among_rows(path, folder))
    # Texts count only where they are all there is: a README is no row.
    files = [path for path in files if path.suffix.lower() not in (".txt", ".md")] or [
        path for path in files if not path.stem.lower().startswith(("readme", "license", "licence"))
    ]
    if not files:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        raise DataError(
            f"data.source: {folder} has no data file; in it is: {inside}",
            hint=f"forge reads {', '.join(SUFFIXES)}, packed too ({', '.join(PACKED)})",
        )
    of = {path: _split_of(path.relative_to(folder)) for path in files}
    wanted = _SAME_SPLIT.get(name, name)
    chosen = [
        path for path in files if of[path] == wanted or name in path.relative_to(folder).as_posix().lower()
    ]
    if not chosen and (not any(of.values()) or len(files) == 1) and name == "train":
        chosen = files
    if not chosen:
        names = ", ".join(path.relative_to(folder).as_posix() for path in files[:20])
        raise DataError(
            f"data.split: {folder} has no data file of the split {name!r}; its data files are: {names}",
            hint="set data.split, or name the file you want as data.source",
        )
    # The hub's own names: other sets of the same rows, or of other ones, which nobody asked for together.
    sets = {_SHARD.sub("", path.relative_to(folder).with_suffix("").as_posix()) for path in chosen}
    one_name = len({path.name for path in chosen}) == 1 and any(of.values())
    if len(sets) > 1 and (one_name or all(_SHARD.search(path.stem) for path in chosen)):
        named = sorted(sets)
        raise DataError(
            f"data.split: {folder} has several sets of the split {name!r}: {', '.join(named)}",
            hint=f"data.split: {named[0]} takes that one; a list in data.source takes several",
        )
    return tuple(chosen)


def _split_of(path: Path) -> str:
    """The split that a name says: `train-00000-of-00001.parquet`, `test/rows.jsonl`; "" for none."""
    words = [
        word for part in (*path.parts[:-1], path.stem) for word in part.lower().replace("_", "-").split("-")
    ]
    named = next((word.partition(".")[0] for word in words if word.partition(".")[0] in SPLITS), "")
    return _SAME_SPLIT.get(named, named)


def in_few_words(paths: Sequence[Path]) -> str:
    """The files in a few words."""
    names = [path.name for path in paths[:3]]
    return ", ".join(names) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
