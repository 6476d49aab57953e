"""A checkpoint's directory: one `model.safetensors`, or an index with its shards.

The index is cross-checked against the shards both ways before anything is trained on them, and
everything that is wrong is said at once, each with its file.

Not covered: pickled weights (`.bin`, `.pth`): unpickling runs code from the file, and the
converters and the streamed merge read safetensors only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge.errors import DataError, Problem
from forge.model.config import no_base
from forge.model.safetensors_header import TensorFileError, TensorSpec, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_RESAVE = "transformers writes them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER)"


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model, by name, in the order of their files and bytes."""

    directory: Path
    tensors: Mapping[str, TensorSpec]
    files: tuple[Path, ...]

    @property
    def numel(self) -> int:
        """Parameters stored; a tied head that is not stored is not counted."""
        return sum(tensor.numel for tensor in self.tensors.values())


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of the checkpoint in `directory`.

    Raises `DataError` with every problem: no weights, pickled weights only, a missing, truncated or
    broken shard, a tensor that the index or a shard lacks, or one that is in two shards.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory", hint="base takes a hub id or a directory")
    single, index = directory / SINGLE, directory / INDEX
    if index.exists():
        return _open_sharded(directory, index)
    if not single.exists():
        raise _no_weights(directory)
    tensors = read_header(single)
    return Checkpoint(directory, tensors, (single,))


_SMALL = ("F8_", "F6_", "F4", "U8", "I8", "U32")
_PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale_inv", "_blocks", ".absmax")


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Raise `DataError` for weights in 8 bits or fewer, whatever config.json says of them.

    An adapter merges into full weights only, and a float8 file without its scales holds other numbers.
    """
    for name, spec in checkpoint.tensors.items():
        small = spec.dtype.startswith(_SMALL) and len(spec.shape) > 1 and not name.endswith(".attn.bias")
        if small or name.endswith(_PACKED):
            raise DataError(
                f"{checkpoint.directory}: its weights are quantized: {name} is {spec.dtype}",
                hint="use the model in 16 bits that it was made from (its README names it); `train.method: "
                "qlora` quantizes by itself while training",
            )


def broken_link(path: Path) -> DataError | None:
    """What to say of a link to nothing, as a copy of the hub's cache without its blobs has."""
    if not path.is_symlink() or path.exists():
        return None
    return DataError(
        f"{path}: a link to {path.readlink()}, which is not there",
        hint="copy what it links to: cp -rL, or download it again",
    )


def _no_weights(directory: Path) -> DataError:
    names = sorted(path.name for path in directory.iterdir())
    weights = [name for name in names if name == INDEX or name.endswith(".safetensors")]
    if dangling := next(filter(None, (broken_link(directory / name) for name in weights)), None):
        return dangling
    ends = {Path(name).suffix for name in names}
    shards = [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if shards:
        return DataError(
            f"{directory}: {INDEX} is missing, but there are shards: {', '.join(shards[:3])}",
            hint="copy the index beside its shards",
        )
    if ends & {".bin", ".pth", ".pt"}:
        return DataError(
            f"{directory}: only pickled PyTorch weights (.bin, .pth) are there; safetensors are needed",
            hint=_RESAVE,
        )
    if other := no_base(directory):
        return other
    if others := [name for name in names if name.endswith(".safetensors")]:
        return DataError(
            f"{directory}: no {SINGLE}; {', '.join(others[:3])} is there, which transformers does not read",
            hint="consolidated.safetensors is Mistral's own format, with other names: take the copy that "
            f"transformers reads; a file that was only renamed is {SINGLE} again",
        )
    return DataError(
        f"{directory}: no weights: neither {SINGLE} nor {INDEX} is there",
        hint="the directory of a base holds config.json, the tokenizer's files and the weights",
    )


def _open_sharded(directory: Path, index: Path) -> Checkpoint:
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    problems: list[Problem] = []
    if (directory / SINGLE).exists() and SINGLE not in names:
        problems.append(
            Problem(
                f"stands beside {INDEX}, which does not name it: delete one", file=str(directory / SINGLE)
            )
        )
    hints: list[str] = []
    shards: dict[str, dict[str, TensorSpec]] = {}
    for name in names:
        try:
            shards[name] = read_header(directory / name)
        except TensorFileError as error:
            if dangling := broken_link(error.path):
                raise dangling from error
            missing = not error.path.exists()
            reason = f"missing: {INDEX} names this shard" if missing else error.reason
            problems.append(Problem(reason, file=str(error.path)))
            hints.append("fetch the missing shard" if missing else error.hint)
    problems += _cross_check(directory, weight_map, shards)
    if problems:
        raise DataError(
            f"{directory}: the checkpoint is not whole: {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}",
            hint="; ".join(dict.fromkeys(hint for hint in hints if hint)) or "download the checkpoint again",
            problems=problems,
        )
    tensors = {tensor: spec for shard in shards.values() for tensor, spec in shard.items()}
    return Checkpoint(directory, tensors, tuple(directory / name for name in names))


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{index}: not a valid index: {error}", hint="download the checkpoint again"
        ) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: it has no weight_map", hint="download the checkpoint again")
    for tensor, name in weight_map.items():
        # The index may come from anywhere: it must not lead out of its directory.
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{index}: tensor {tensor}: {name!r} is not the name of a shard beside the index")
    return weight_map


def _cross_check(
    directory: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorSpec]]
) -> list[Problem]:
    """Every tensor once, where the index says; shards that could not be read are left out."""
    holders: dict[str, list[str]] = {}
    for name, tensors in shards.items():
        for tensor in tensors:
            holders.setdefault(tensor, []).append(name)
    problems = []
    for tensor, holding in holders.items():
        file = str(directory / holding[-1])
        if len(holding) > 1:
            problems.append(
                Problem(f"tensor {tensor} is in more than one shard: {', '.join(holding)}", file=file)
            )
        elif tensor not in weight_map:
            problems.append(Problem(f"tensor {tensor} is not in {INDEX}", file=file))
    for tensor, name in weight_map.items():
        if name in shards and tensor not in shards[name]:
            elsewhere = [holder for holder in holders.get(tensor, ()) if holder != name]
            where = f"; it is in {elsewhere[0]}" if elsewhere else ""
            problems.append(
                Problem(
                    f"tensor {tensor} is missing: {INDEX} says it is here{where}", file=str(directory / name)
                )
            )
    return _shortened(problems)


def _shortened(problems: Sequence[Problem], most: int = 5) -> list[Problem]:
    if len(problems) <= most:
        return list(problems)
    return [*problems[:most], Problem(f"and {len(problems) - most} more")]
