"""Is this adapter whole, active, and made for this base? Runs in a worker.

peft's own `get_model_status` and `get_layer_status` are asked on a base without weights (the meta
device), so a 7B base costs seconds and half a gigabyte; the adapter's numbers are read from its
file one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forge.adapter.read import WEIGHTS_FILE, Adapter, read_adapter
from forge.adapter.vocabulary import Fitted, fit
from forge.errors import CheckError, DataError, Problem
from forge.model.checkpoint import open_checkpoint

_MOST_NAMED = 8


def validate(base: str, adapter: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """The adapter's status, purity, scales and the exports it allows.

    `vocabulary_rows` are those of its embedding where it was resized, else None; `untied` tells that it
    trained embedding and output layer apart, which the base ties.
    Raises `CheckError` with every problem: irregular, inactive, not finite, zero, or not matching
    the base's layers.
    """
    fitted = fit(read_adapter(Path(adapter)), open_checkpoint(Path(base)))
    found = fitted.adapter
    model = _on_meta(base, fitted, trust_remote_code)
    status = _plain(model.get_model_status())
    layers = [_plain(layer) for layer in model.get_layer_status()]
    problems = [*_status_problems(status, layers, found), *_number_problems(found)]
    if problems:
        raise CheckError(
            f"the adapter {adapter} is not sound: {len(problems)} problems",
            hint="train it again; an adapter in this state must not be shipped",
            problems=problems[:_MOST_NAMED],
        )
    impurities = list(fitted.impurities)
    scales = sorted({round(layer.scale, 6) for layer in found.layers.values()})
    return {
        "ok": True,
        "status": status,
        "layers": layers,
        "adapted_modules": sorted(found.layers),
        "vocabulary_rows": fitted.rows,
        "untied": fitted.untied,
        "pure": not impurities,
        "impurities": impurities,
        "scale": scales[0] if len(scales) == 1 else {name: one.scale for name, one in found.layers.items()},
        "trainable_parameters": sum(_numel(spec.shape) for spec in _specs(found)),
        "exports": ["merged"] if impurities else ["merged", "adapter"],
        "problems": [],
    }


def _on_meta(base: str, fitted: Fitted, trust_remote_code: bool) -> Any:
    """peft's model of base and adapter, without weights."""
    import peft
    import torch
    import transformers

    configuration = transformers.AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    found = fitted.adapter
    fitted.resize(configuration)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            configuration, trust_remote_code=trust_remote_code
        )
    if found.rows:
        # peft copies the rows that were there before, and those it cannot copy out of nothing.
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.to_empty(device="cpu")
        model.tie_weights()
    parameters = model.named_parameters(remove_duplicate=False)
    _refuse_mismatch(fitted, {name: tuple(parameter.shape) for name, parameter in parameters})
    # Under that device the numbers of the tokens would have no values.
    with torch.device("cpu" if found.rows else "meta"):
        return peft.PeftModel.from_pretrained(
            model, str(found.directory), low_cpu_mem_usage=True, torch_device="cpu"
        )


def _refuse_mismatch(fitted: Fitted, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every adapted module must be in the base with the right shape (pitfalls 6, 11 of silent wrongs)."""
    problems, found = [], fitted.adapter
    for module, layer in found.layers.items():
        base_shape = shapes.get(f"{module}.weight")
        delta = (layer.b.shape[0], layer.a.shape[1])
        if fitted.is_transposed(layer):
            delta = (delta[1], delta[0])
        if base_shape is None:
            problems.append(Problem("the base has no such layer", module))
        elif base_shape != delta:
            problems.append(Problem(f"shape {delta} does not fit the base's {base_shape}", module))
    for name, spec in found.replaced.items():
        if name not in shapes:
            problems.append(Problem("the base has no such tensor", name))
        elif shapes[name] != spec.shape:
            problems.append(Problem(f"shape {spec.shape} does not fit the base's {shapes[name]}", name))
    for name, rows in found.rows.items():
        if name not in shapes:
            problems.append(Problem("the base has no such tensor", name))
        elif max(rows.tokens, default=0) >= shapes[name][0]:
            problems.append(Problem(f"token {max(rows.tokens)} has no row in {shapes[name]}", name))
    if problems:
        raise DataError(
            f"the adapter was made for another base: {len(problems)} of its "
            f"{len(found.layers) + len(found.replaced)} parts do not fit",
            hint=f"it names {found.base_name or 'no base'}; set `base` to the model it was trained on",
            problems=problems[:_MOST_NAMED],
        )


def _status_problems(
    status: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], found: Adapter
) -> Iterator[Problem]:
    for field, value in status.items():
        if field == "requires_grad":
            continue  # of how it was loaded just now: peft freezes factors then, but no others
        if value == "irregular" or (isinstance(value, dict) and "irregular" in value.values()):
            yield Problem("irregular: its layers disagree", f"status.{field}")
    if status["enabled"] is not True:
        yield Problem("the adapter is switched off", "status.enabled")
    if status["active_adapters"] != ["default"]:
        yield Problem(f"active adapters are {status['active_adapters']}", "status.active_adapters")
    if status["merged_adapters"]:
        yield Problem(f"already merged: {status['merged_adapters']}", "status.merged_adapters")
    for layer in layers:
        module = layer["name"].partition(".")[2]
        if layer["module_type"].startswith("lora.") and module not in found.layers:
            # peft fills what the file lacks with a fresh layer, which changes nothing.
            yield Problem("the configuration adapts it, the file holds no weights for it", module)


def _number_problems(found: Adapter) -> Iterator[Problem]:
    import safetensors
    import torch

    with safetensors.safe_open(str(found.directory / WEIGHTS_FILE), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            if not torch.isfinite(tensor).all():
                yield Problem("has values that are not finite", name)
        for module, layer in found.layers.items():
            if not file.get_tensor(layer.b.name).any() or not file.get_tensor(layer.a.name).any():
                yield Problem("is all zero: the layer changes nothing", module)


def _specs(found: Adapter) -> Iterator[Any]:
    for layer in found.layers.values():
        yield from (layer.a, layer.b)
        if layer.magnitude:
            yield layer.magnitude
    yield from found.replaced.values()
    yield from (rows.values for rows in found.rows.values())


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _plain(status: Any) -> dict[str, Any]:
    import dataclasses

    return {
        key: (value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value))
        for key, value in dataclasses.asdict(status).items()
    }
