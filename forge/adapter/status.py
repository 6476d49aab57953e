"""Is this adapter whole, active, and made for this base? Runs in a worker.

peft's own `get_model_status` and `get_layer_status` are asked on a base without weights (the meta
device), so a 7B base costs seconds and half a gigabyte; the adapter's numbers are read from its
file one tensor at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.adapter.directory import WEIGHTS_FILE
from forge.adapter.experts import owner
from forge.adapter.places import place
from forge.adapter.read import Adapter, find_base_tensor, read_adapter
from forge.adapter.vocabulary import Fitted, fit, is_of_tokens
from forge.errors import CheckError, DataError, Problem
from forge.model.checkpoint import open_checkpoint
from forge.model.loading import read_transformers

if TYPE_CHECKING:
    import peft

_MOST_NAMED = 8


@dataclass(frozen=True)
class ValidateRequest:
    """An adapter and the base that it is for, both directories."""

    base: Path
    adapter: Path
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Validated:
    """A sound adapter: its status and layers as peft reports them, its purity and the exports it allows.

    `scale` is by layer where the layers differ in it. `vocabulary_rows` are those of its embedding where it
    was resized, else None; `untied`: it trained embedding and output layer apart, which the base ties.
    """

    ok: bool
    status: Mapping[str, object]
    layers: tuple[Mapping[str, object], ...]
    adapted_modules: tuple[str, ...]
    vocabulary_rows: int | None
    untied: bool
    pure: bool
    impurities: tuple[str, ...]
    scale: float | Mapping[str, float]
    trainable_parameters: int
    warnings: tuple[str, ...]
    exports: tuple[str, ...]
    problems: tuple[str, ...] = ()


def validate_adapter(request: ValidateRequest) -> Validated:
    """Look for what is wrong with an adapter.

    Raises `CheckError` with every problem: irregular, inactive, not finite, zero, or not matching
    the base's layers.
    """
    fitted = fit(read_adapter(request.adapter), open_checkpoint(request.base))
    place(fitted)  # every part, with its shape
    adapter = fitted.adapter
    model = _on_meta(request.base, fitted, request.trust_remote_code)
    status = model.get_model_status()
    layers = model.get_layer_status()
    problems = [*_status_problems(status, layers, adapter), *_number_problems(adapter)]
    if problems:
        raise CheckError(
            f"the adapter {request.adapter} is not sound: "
            + ("1 problem" if len(problems) == 1 else f"{len(problems)} problems"),
            hint="copy it again if it was not copied whole, else train it again; it must not be shipped so",
            problems=problems[:_MOST_NAMED],
        )
    impurities = tuple(fitted.impurities)
    scales = {name: layer.scale for name, layer in adapter.layers.items()}
    rounded = {round(scale, 6) for scale in scales.values()}
    return Validated(
        ok=True,
        status=plain_status(status),
        layers=tuple(map(plain_status, layers)),
        adapted_modules=tuple(sorted(adapter.layers)),
        vocabulary_rows=fitted.rows,
        untied=fitted.untied,
        pure=not impurities,
        impurities=impurities,
        scale=rounded.pop() if len(rounded) == 1 else scales,
        trainable_parameters=sum(math.prod(spec.shape) for spec in _specs(adapter)),
        warnings=tuple(_warnings(adapter)),
        exports=("merged",) if impurities else ("merged", "adapter"),
    )


def _warnings(adapter: Adapter) -> list[str]:
    """What is worth a look and no fault: some families have layers that no text moves."""
    import safetensors

    with safetensors.safe_open(str(adapter.directory / WEIGHTS_FILE), framework="pt") as file:
        idle = idle_layers(adapter, file)
    if not idle:
        return []
    return [f"{len(idle)} of {len(adapter.layers)} layers are all zero and change nothing: {idle[0]}"]


def _on_meta(base: Path, fitted: Fitted, trust_remote_code: bool) -> Any:
    """peft's model of base and adapter, without weights."""
    import peft
    import torch
    import transformers

    configuration = read_transformers(base, trust_remote_code=trust_remote_code)
    adapter = fitted.adapter
    fitted.resize(configuration)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            configuration, trust_remote_code=trust_remote_code
        )
    parameters = model.named_parameters(remove_duplicate=False)
    _refuse_other_shapes(fitted, {name: tuple(parameter.shape) for name, parameter in parameters})
    if adapter.rows:
        # peft copies the rows that were there before, and those it cannot copy out of nothing.
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.to_empty(device="cpu")
        model.tie_weights()
    # Under that device the numbers of the tokens would have no values.
    with torch.device("cpu" if adapter.rows else "meta"), warnings.catch_warnings():
        # Of missing keys and tied layers: what is missing is looked for here.
        warnings.simplefilter("ignore", UserWarning)
        try:
            return peft.PeftModel.from_pretrained(
                model, str(adapter.directory), low_cpu_mem_usage=True, torch_device="cpu"
            )
        except KeyError as absent:  # a part that modules_to_save names by its end
            raise DataError(
                f"{adapter.directory}: its settings name {absent.args[0]}, which the file does not hold",
                hint="save it again with peft's save_pretrained",
            ) from absent
        except (ValueError, TypeError, AttributeError, RuntimeError) as refusal:
            words = " ".join(str(refusal).split())[:300]
            raise DataError(
                f"{adapter.directory}: peft does not load it: {type(refusal).__name__}: {words}",
                hint="save it again with peft's save_pretrained",
            ) from refusal


def _refuse_other_shapes(fitted: Fitted, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The base's config.json must be that of its weights, or peft puts other layers in than the merge."""
    problems = []
    for module in fitted.adapter.layers:
        if fitted.rows is not None and is_of_tokens(f"{module}.weight"):
            continue  # resized on purpose: `fit` has compared its rows
        stored = find_base_tensor(f"{module}.weight", fitted.checkpoint.tensors)
        made = find_base_tensor(f"{module}.weight", shapes)
        if stored and made and fitted.checkpoint.tensors[stored].shape != shapes[made]:
            there = fitted.checkpoint.tensors[stored].shape
            problems.append(Problem(f"is {there}, config.json makes it {shapes[made]}", module))
    if problems:
        raise DataError(
            f"{fitted.checkpoint.directory}: config.json is not that of the weights: {len(problems)} layers "
            "are of another shape",
            hint="copy the base again, its config.json with it",
            problems=problems[:_MOST_NAMED],
        )


def _status_problems(
    status: peft.TunerModelStatus, layers: Sequence[peft.TunerLayerStatus], adapter: Adapter
) -> Iterator[Problem]:
    for field, value in asdict(status).items():
        if field == "requires_grad":
            continue  # of how it was loaded just now: peft freezes factors then, but no others
        if value == "irregular" or (isinstance(value, dict) and "irregular" in value.values()):
            yield Problem("irregular: its layers disagree", f"status.{field}")
    if status.enabled is not True:
        yield Problem("the adapter is switched off", "status.enabled")
    if status.active_adapters != ["default"]:
        yield Problem(f"active adapters are {status.active_adapters}", "status.active_adapters")
    if status.merged_adapters:
        yield Problem(f"already merged: {status.merged_adapters}", "status.merged_adapters")
    adapted = {
        owner(layer.name.partition(".")[2]): layer
        for layer in layers
        if layer.module_type.startswith("lora.")
    }
    # The file's names may lack what peft's have in front; both are those of one module.
    owners = map(owner, adapter.layers)
    held = {find_base_tensor(module, adapted) or module for module in owners}
    for module in sorted(adapted.keys() - held):
        # peft fills what the file lacks with a fresh layer, which changes nothing.
        yield Problem("the configuration adapts it, the file holds no weights for it", module)
    for module in sorted(held - adapted.keys()):
        # peft leaves these out without a word: the model that was trained may have had them, or not.
        yield Problem("the file holds weights for it, the configuration does not adapt it", module)


def _number_problems(adapter: Adapter) -> Iterator[Problem]:
    import safetensors
    import torch

    with safetensors.safe_open(str(adapter.directory / WEIGHTS_FILE), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            if not torch.isfinite(tensor).all():
                yield Problem("has values that are not finite", name)
        idle = idle_layers(adapter, file)
        if idle and len(idle) == len(adapter.layers) and not adapter.replaced and not adapter.rows:
            yield from (Problem("is all zero: the layer changes nothing", module) for module in idle)


def idle_layers(adapter: Adapter, file: Any) -> list[str]:
    """The layers of which a factor is all zero, read from the open `file`."""
    return [
        module
        for module, layer in adapter.layers.items()
        if not file.get_tensor(layer.b.name).any() or not file.get_tensor(layer.a.name).any()
    ]


def _specs(adapter: Adapter) -> Iterator[Any]:
    for layer in adapter.layers.values():
        yield from (layer.a, layer.b)
        if layer.magnitude:
            yield layer.magnitude
    yield from adapter.replaced.values()
    yield from (rows.values for rows in adapter.rows.values())


def plain_status(status: Any) -> Mapping[str, object]:
    """One of peft's statuses as JSON can hold it."""
    return {
        key: (value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value))
        for key, value in asdict(status).items()
    }
