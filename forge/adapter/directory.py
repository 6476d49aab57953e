"""An adapter's files by name, and what a directory is that lacks them: a training run's, a whole model's."""

from __future__ import annotations

from pathlib import Path

from forge.errors import DataError
from forge.model.checkpoint import INDEX, SINGLE, broken_link

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MOST_NAMED = 8


def without_weights(directory: Path) -> DataError:
    if (directory / "adapter_model.bin").exists():
        return DataError(
            f"{directory} has no {WEIGHTS_FILE}: only a pickled .bin",
            hint="load it with peft and save it again: model.save_pretrained(...) writes safetensors",
        )
    if dangling := broken_link(directory / WEIGHTS_FILE):
        return dangling
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    shown = ", ".join(others[:3])
    if any(name.startswith("adapter_model-") for name in others):
        return DataError(
            f"{directory} has no {WEIGHTS_FILE} but shards of it, which peft does not read: {shown}",
            hint=f"join them: load each with safetensors.torch.load_file, save all tensors as {WEIGHTS_FILE}",
        )
    return DataError(
        f"{directory} has no {WEIGHTS_FILE}" + (f"; {shown} is there" if others else ""),
        hint=f"a file of peft's that was only renamed is {WEIGHTS_FILE} again; else merge it with the tool "
        "that wrote it and ship the result with train: none"
        if others
        else "the copy may have been cut short: copy or download the adapter again",
    )


def without_settings(directory: Path) -> DataError:
    """What the directory is, which is no adapter's: a training run's, a whole model's, or another."""
    numbers = [path.name.partition("-")[2] for path in directory.glob("checkpoint-*") if path.is_dir()]
    if checkpoints := [f"checkpoint-{number}" for number in sorted(filter(str.isdigit, numbers), key=int)]:
        shown = checkpoints if len(checkpoints) <= _MOST_NAMED else [*checkpoints[:3], "...", checkpoints[-1]]
        last = directory / checkpoints[-1]
        is_whole = _is_whole_model(last)
        return DataError(
            f"{directory} has no {CONFIG_FILE}: it is a training run's, with {', '.join(shown)}",
            hint=f"its last is a whole model: ship it with base: {last}, train: none"
            if is_whole
            else f"name one of them, such as the last: {last}",
        )
    if _is_whole_model(directory):
        return DataError(
            f"{directory} is not an adapter: it has no {CONFIG_FILE}; it is a whole model",
            hint=f"ship it with base: {directory}, train: none",
        )
    if not directory.exists():
        return DataError(f"{directory}: no such directory", hint="name the directory of an adapter")
    if below := sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}")):
        return DataError(
            f"{directory} is not an adapter: it has no {CONFIG_FILE}; its directories "
            f"{', '.join(path.name for path in below[:_MOST_NAMED])} have one",
            hint=f"name the adapter: {below[0]}",
        )
    return DataError(
        f"{directory} is not an adapter: it has no {CONFIG_FILE}",
        hint="name the directory that peft's save_pretrained wrote",
    )


def _is_whole_model(directory: Path) -> bool:
    names = (SINGLE, INDEX)
    return (directory / "config.json").is_file() and any((directory / name).is_file() for name in names)
