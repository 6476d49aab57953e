"""The kinds of values that a recipe's fields hold, each with its own plain message.

Unions are read by one function each, because a union's own errors name every member that failed.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import AfterValidator, BeforeValidator, Field

from forge.recipe.quants import QuantName

BUILTIN_BASES = ("tiny", "smollm2")
BUILTIN_DATA = ("yoda", "yoda_heldout", "sentiment", "code", "medical")
DATA_SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md"),
    *(".gz", ".zst", ".bz2", ".xz"),
)
DATA_FORMATS = (
    *("auto", "messages", "sharegpt", "prompt", "alpaca", "dolly", "question", "preference", "text"),
)
_READER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# What the tools behind count in 32 bits, and calculate with; what a file system takes for a name.
_MOST = 2**31 - 1
_LARGEST = 1e30
_LONGEST_NAME, _LONGEST_PATH = 255, 4000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PINNED = re.compile(r"(?P<id>[\w-][\w.-]*(?:/[\w.-]+)?)@(?P<revision>[^\s@]+)")
_TARGET_WORDS = ("auto", "all-linear", "attention")
TRACKERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive"),
    *("flyte", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)


def split_revision(value: Any, key: str) -> Any:
    """`{key: "id@revision"}` as `{key: "id", "revision": "revision"}`; paths are left as they are."""
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        return value
    pinned = _PINNED.fullmatch(value[key])
    if not pinned:
        return value
    if value.get("revision") is not None:
        raise ValueError(f"the revision is given twice: in {key} and in revision")
    return {**value, key: pinned["id"], "revision": pinned["revision"]}


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("holds a null character, which ends a text elsewhere")
    return value


def _place(value: str) -> str:
    long = max(map(len, value.encode("utf-8", "replace").split(b"/"))) > _LONGEST_NAME
    if long or len(value) > _LONGEST_PATH or _CONTROL.search(value):
        raise ValueError("is neither a path nor an id of the hub: too long, or with control characters")
    return _text(value)


def _host(value: str) -> str:
    if not _HOST.fullmatch(_text(value)):
        raise ValueError("must be an address or the name of a computer, without http:// and port")
    return value


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(
            "must be usable as a file name: letters, digits, '.', '_' and '-', "
            "a letter or digit first, at most 64"
        )
    return value


def _pattern(value: str) -> str:
    _text(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(value)
    except (re.error, OverflowError, RecursionError) as wrong:
        raise ValueError(f"is not a regular expression: {wrong}") from None
    return value


def _module_pattern(value: str) -> str:
    """As peft compiles it: the whole name, or what is behind a dot, so that flags cannot stand in it."""
    _pattern(value)
    _pattern(rf"(.*\.)?({value})$")
    return value


def _evaluation(value: Any) -> float | int | str:
    if isinstance(value, str):
        return _place(value)
    if _is_count(value):
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return value
    raise ValueError("must be a share of the rows (0 to below 1), a whole number of rows, or a file")


def _format(value: Any) -> str:
    if isinstance(value, str) and (value in DATA_FORMATS or _READER.fullmatch(value)):
        return value
    raise ValueError(f"must be one of {', '.join(DATA_FORMATS)}, or module:function")


def _words(value: Any) -> tuple[str, ...] | None:
    """A list of distinct, non-empty words as a tuple; None when it is something else."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    fine = all(isinstance(item, str) and item.strip() for item in value) and len(set(value)) == len(value)
    return tuple(value) if fine else None


def _names(value: Any) -> tuple[str, ...]:
    words = () if isinstance(value, list | tuple) and not value else _words(value)
    if words is None:
        raise ValueError("must be a list of different names")
    return words


def _targets(value: Any) -> Any:
    if value in _TARGET_WORDS:
        return value
    if isinstance(value, str) and value.strip():
        if not re.fullmatch(r"[\w.]+", value):
            return _pattern(value)
        value = (value,)
    words = _words(value)
    if words is None:
        raise ValueError(
            f"must be {', '.join(_TARGET_WORDS)}, a list of different module names or a regular expression"
        )
    if any(word.rpartition(".")[2] == "lm_head" for word in words):
        raise ValueError(
            "lm_head cannot carry an adapter: it is often tied to the embeddings, and the loss reads its "
            "weight directly; leave it out"
        )
    return words


def _batch_size(value: Any) -> Any:
    if value == "auto" or (_is_count(value) and value >= 1):
        return value
    raise ValueError(f"must be a whole number from 1 to {_MOST}, or auto")


def _devices(value: Any) -> Any:
    if value == "auto" or (_is_count(value) and value >= 1):
        return value
    numbers = value if isinstance(value, list | tuple) and all(map(_is_count, value)) else ()
    if numbers and len({*numbers}) == len(numbers):
        return tuple(numbers)
    raise ValueError(
        f"must be a whole number from 1 to {_MOST}, auto, or a list of different numbers of GPUs"
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _switch(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):  # to Python 1 is True
        raise ValueError("must be true, false or auto")
    return value


@functools.cache
def optimizer_names() -> tuple[str, ...]:
    """Those of the installed transformers, read from its source without importing it; none without it."""
    package = importlib.util.find_spec("transformers")
    source = Path(package.origin).parent / "training_args.py" if package and package.origin else None
    if source is None or not source.is_file():
        return ()
    text = source.read_text(encoding="utf-8")
    _, _, body = text.partition("class OptimizerNames")
    return tuple(re.findall(r'^    [A-Z0-9_]+ = "(\w+)"', body.partition("\n\n\n")[0], re.MULTILINE))


def _optimizer(value: str) -> str:
    names = optimizer_names()
    if names and value not in names:
        raise ValueError(f"must be an optimizer of the installed transformers: {', '.join(names)}")
    return value


def _reporters(value: Any) -> tuple[str, ...]:
    if value == "none" or (isinstance(value, (list, tuple)) and not value):
        return ()
    words = (value,) if isinstance(value, str) else _words(value)
    if words is None or not set(words) <= set(TRACKERS):
        raise ValueError(f"must be none or a list of: {', '.join(TRACKERS)}")
    return words


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise ValueError("must be text, a number, true, false or null")
    if isinstance(value, float) and value - value != 0:
        raise ValueError("must be a finite number")
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _none(_: Any) -> None:
    return None


Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[str, AfterValidator(_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Place = Annotated[str, AfterValidator(_place)]
Host = Annotated[str, AfterValidator(_host)]
ModulePattern = Annotated[str, AfterValidator(_module_pattern)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
NotNegativeInteger = Annotated[int, Field(ge=0, le=_MOST)]
AboveZero = Annotated[float, Field(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=_LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
UpTo = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Evaluation = Annotated[float | int | str, BeforeValidator(_evaluation)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
DataFormat = Annotated[str, BeforeValidator(_format)]
Targets = Annotated[str | tuple[str, ...], BeforeValidator(_targets)]
BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_batch_size)]
Devices = Annotated[int | tuple[int, ...] | Literal["auto"], BeforeValidator(_devices)]
Reporters = Annotated[tuple[str, ...], BeforeValidator(_reporters)]
Scalar = Annotated[str | int | float | bool | None, BeforeValidator(_scalar)]
Optimizer = Annotated[str, AfterValidator(_optimizer)]
Switch = Annotated[Literal["auto", True, False], BeforeValidator(_switch)]
Nothing = Annotated[None, BeforeValidator(_none)]
Quant = Annotated[QuantName, BeforeValidator(_lower)]
