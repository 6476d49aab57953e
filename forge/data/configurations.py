"""Which files the README of a data set names for its configurations and their splits, as `datasets` reads it.

Not covered: what a configuration says beside its files (delimiters, features): the files say it themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from forge.data.files import lies_among_rows
from forge.errors import DataError
from forge.recipe.tree import Reader

_README = "README.md"
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*\r?(\n|$)", re.DOTALL)
# The key with all of its lines: more of the front matter need not be YAML that forge reads.
_CONFIGURATIONS = re.compile(r"^([\"']?)configs\1[ \t]*:.*\n([ \t#}\]-].*\n|\r?\n)*", re.MULTILINE)
_NAMES_IT = "name the files you want as data.source"


@dataclass(frozen=True)
class Subset:
    """One set of rows: its splits, each with the patterns of its files; or the directory that holds them."""

    name: str
    is_default: bool
    splits: Mapping[str, tuple[str, ...]]
    directory: str = ""


def configurations(folder: Path) -> Sequence[Subset]:
    """Those that the README in `folder` lists; none where it lists none."""
    try:
        text = (folder / _README).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    front = _FRONT.match(text)
    listed = _CONFIGURATIONS.search(front[1]) if front else None
    if listed is None:
        return ()
    reader = Reader(_README)
    node = reader.read(listed[0])
    try:
        if reader.problems or node is None:
            raise KeyError("configs")
        return tuple(map(_configuration, node.plain()["configs"] or ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / _README}: its configs cannot be read", hint=_NAMES_IT) from error
    except ValueError as error:
        raise DataError(f"{folder / _README}: {error}", hint=_NAMES_IT) from error


def _configuration(value: Mapping[str, Any]) -> Subset:
    files: Any = value.get("data_files")
    if isinstance(files, Mapping):
        splits = {str(split): _patterns(paths) for split, paths in files.items()}
    elif isinstance(files, tuple) and files and isinstance(files[0], Mapping):
        splits = {}
        for part in files:
            split = str(part.get("split", "train"))
            if split in splits:
                raise ValueError(f"its configs name the files of {value['config_name']}/{split} twice")
            splits[split] = _patterns(part["path"])
    else:
        splits = {"train": _patterns(files)} if files else {}
    directory = str(value.get("data_dir") or "")
    within = {
        split: tuple(f"{directory.rstrip('/')}/{path}" if directory else path for path in paths)
        for split, paths in splits.items()
    }
    return Subset(str(value["config_name"]), value.get("default") is True, within, directory)


def _patterns(paths: Any) -> tuple[str, ...]:
    patterns: tuple[Any, ...] = paths if isinstance(paths, tuple) else (paths,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise TypeError(f"{patterns} are no names of files")
    return patterns


def configured_files(folder: Path, split: str) -> tuple[Path, ...] | Path | None:
    """The files that the README in `folder` names for `split`, such as `train` or `main/train`; the
    directory where it names only that.

    None where it names none, and where `split` begins with the name of no configuration: it may be a path.
    Raises `DataError` where it has no such split, or not one that is meant.
    """
    every = configurations(folder)
    is_only = len(every) == 1
    name, slash, wanted = split.rpartition("/")
    if slash:
        every = [each for each in every if each.name == name]
    if not every:
        return None
    usual = [each for each in every if each.is_default] or [each for each in every if each.name == "default"]
    fitting = [each for each in usual or every if wanted in each.splits or not each.splits]
    if len(fitting) > 1:
        names = [f"{each.name}/{wanted}" for each in fitting]
        raise DataError(
            f"data.split: {folder} has several sets of the split {wanted!r}: {', '.join(names)}",
            hint=f"data.split: {names[0]} takes that one; a list in data.source takes several",
        )
    if not fitting:
        known = [part if is_only else f"{each.name}/{part}" for each in every for part in each.splits]
        of_default = f" of {usual[0].name}, its default" if usual and not is_only else ""
        likely = next((name for name in known if name.endswith(f"/{wanted}")), known[0])
        raise DataError(
            f"data.split: the README of {folder} names no split {wanted!r}{of_default}; its splits are: "
            f"{', '.join(known)}",
            hint=f"data.split: {likely} takes that one",
        )
    (chosen,) = fitting
    if not chosen.splits:
        _require_inside(folder, chosen.directory)
        return folder / chosen.directory if chosen.directory else None
    files = {path: None for pattern in chosen.splits[wanted] for path in _matching(folder, pattern)}
    if not files:
        raise DataError(
            f"data.split: the README of {folder} names {', '.join(chosen.splits[wanted])} for {split}, "
            "and no such file is there",
            hint=f"fetch the whole set, or {_NAMES_IT}",
        )
    return tuple(files)


def _require_inside(folder: Path, pattern: str) -> None:
    if "://" in pattern or pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        raise DataError(
            f"data.split: the README of {folder} names files elsewhere: {pattern}", hint=_NAMES_IT
        )


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    """What `pattern` names; of what a pattern matches only files of rows, for `*` matches the README, too."""
    _require_inside(folder, pattern)
    is_named = (folder / pattern).is_file()
    try:
        # `**` goes through directories wherever it stands, as in `**.parquet`; Path takes it between slashes.
        matched = sorted(folder.glob(re.sub(r"\*\*(?!/)", "**/*", pattern)))
    except (ValueError, IndexError) as error:  # Path of Python 3.11 raises the second for "."
        raise DataError(
            f"data.split: the README of {folder} has a pattern that forge does not read: {pattern}",
            hint=_NAMES_IT,
        ) from error
    yield from (
        path
        for path in matched
        if path.is_file() and (is_named or (path.name != _README and lies_among_rows(path, folder)))
    )
