"""Several adapters on one base in memory: what each changes, and that each can be switched. Runs in a worker.

peft holds them side by side: one is active, or none; one is taken away, or all. Each state is compared with
the model that it should be, logit for logit: the base by itself, or the adapter loaded alone. The base is
loaded in the type that it has on disk, since equal computations are equal in any.

peft's `unload` leaves modules that an adapter saved whole in the place of the base's: the base is loaded anew
then, and `kept_by_unload` names such adapters.

Not covered: adapters that gave the base other rows, which have no place beside others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.adapter.combine import with_all
from forge.adapter.probe import logits_of
from forge.adapter.read import read_adapter
from forge.adapter.status import ValidateRequest, plain_status, validate_adapter
from forge.errors import CheckError, DataError, Problem, StageError
from forge.model.checkpoint import open_checkpoint
from forge.model.estimate import available


@dataclass(frozen=True)
class Named:
    """An adapter's directory, and what it is called beside others."""

    name: str
    adapter: Path


@dataclass(frozen=True)
class SeveralRequest:
    """The adapters that are to be together on `base`."""

    base: Path
    adapters: tuple[Named, ...]


@dataclass(frozen=True)
class Held:
    """One of them: peft's status of the model with it active, and of each layer.

    `changes` has the norm of the change over that of the base's weight, by layer. `logits` is how far it
    moves the base's, at most.
    """

    name: str
    modules: int
    parameters: int
    status: Mapping[str, object]
    layers: tuple[Mapping[str, object], ...]
    changes: Mapping[str, float]
    logits: float


@dataclass(frozen=True)
class Several:
    """All of them, in the order in which they were loaded; `checks` is how many states were compared."""

    adapters: tuple[Held, ...]
    checks: int
    kept_by_unload: tuple[str, ...]


def hold(request: SeveralRequest) -> Several:
    """Load the adapters onto one base, and switch each on and off.

    Raises `CheckError` where an adapter is not sound, or a state of the model is not what it should be;
    `DataError` for adapters that cannot be together; `StageError` where the base is larger than the memory.
    """
    parameters = {}
    for named in request.adapters:
        validated = validate_adapter(ValidateRequest(request.base, named.adapter))
        parameters[named.name] = validated.trainable_parameters
        if validated.vocabulary_rows:
            raise DataError(
                f"{named.name} resized the base's embedding to {validated.vocabulary_rows} rows: it has no "
                "place beside others",
                hint="ship it by itself, merged",
            )
    _require_memory(request.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied embeddings
        return _held(request, parameters)


def _require_memory(base: Path) -> None:
    needed = sum(tensor.bytes for tensor in open_checkpoint(base).tensors.values()) * 5 // 4
    if needed > available().free:
        raise StageError(
            f"the base takes {needed / 1e9:.1f} GB of memory, {available().free / 1e9:.1f} GB are free",
            hint="forge validate looks at one adapter without the base's weights",
        )


def _held(request: SeveralRequest, parameters: Mapping[str, int]) -> Several:
    import peft
    import torch
    import transformers

    def load() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(request.base), dtype="auto")
        return model.eval()

    names = [named.name for named in request.adapters]
    whole = {named.name for named in request.adapters if read_adapter(named.adapter).replaced}
    states = _States()
    with torch.inference_mode():
        base = load()
        plain = logits_of(base)
        alone = {}
        for named in request.adapters:
            model = peft.PeftModel.from_pretrained(base, str(named.adapter), adapter_name=named.name).eval()
            alone[named.name] = logits_of(model)
            base = model.unload()
            if named.name in whole:
                base = load()
            else:
                states.compare(f"the base after {named.name} was unloaded", logits_of(base), plain)
        model = with_all(base, {named.name: named.adapter for named in request.adapters}).eval()
        states.require("the adapters that are loaded", list(model.peft_config), names)
        held = []
        for named in request.adapters:
            model.set_adapter(named.name)
            logits = logits_of(model)
            states.compare(f"{named.name} active beside the others", logits, alone[named.name])
            status = model.get_model_status()
            # A module that only another adapter saved whole makes the status of the model irregular.
            states.require(f"the active adapter, {named.name}", model.active_adapters, [named.name])
            with model.disable_adapter():
                states.require("whether they are enabled", model.get_model_status().enabled, False)
                states.compare(f"the base with {named.name} disabled", logits_of(model), plain)
            held.append(
                Held(
                    named.name,
                    len(read_adapter(named.adapter).layers),
                    parameters[named.name],
                    plain_status(status),
                    tuple(map(plain_status, model.get_layer_status())),
                    dict(_changes(model, named.name)),
                    float((logits.float() - plain.float()).abs().max()),
                )
            )
        for named in request.adapters[:-1]:
            model.delete_adapter(named.name)
        last = names[-1]
        states.require("what is left when the others are deleted", list(model.peft_config), [last])
        model.set_adapter(last)
        states.compare(f"{last} when the others are deleted", logits_of(model), alone[last])
        if not whole:
            states.compare("the base after all were unloaded", logits_of(model.unload()), plain)
    states.raise_problems()
    return Several(tuple(held), states.checks, tuple(sorted(whole)))


class _States:
    """Counts what was compared, and keeps what is not as it should be."""

    def __init__(self) -> None:
        self.checks = 0
        self._problems: list[Problem] = []

    def compare(self, state: str, logits: Any, wanted: Any) -> None:
        import torch

        self.checks += 1
        if not torch.equal(logits, wanted):
            most = float((logits.float() - wanted.float()).abs().max())
            self._problems.append(Problem(f"logits are off by up to {most:.3g}", state))

    def require(self, state: str, value: object, wanted: object) -> None:
        self.checks += 1
        if value != wanted:
            self._problems.append(Problem(f"is {value}, should be {wanted}", state))

    def raise_problems(self) -> None:
        if self._problems:
            raise CheckError(
                "the adapters do not stand side by side on this base",
                hint="serve each by itself; peft does not switch them cleanly",
                problems=self._problems,
            )


def _changes(model: Any, name: str) -> Iterator[tuple[str, float]]:
    """Of each module that the adapter changes: what peft's merge adds, over the norm of the weight."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    for path, module in model.named_modules():
        known = path.removeprefix("base_model.model.")
        if isinstance(module, LoraLayer) and name in [*module.lora_A, *module.lora_embedding_A]:
            layer: Any = module
            base, parameter = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
            stored = getattr(base, parameter)
            setattr(base, parameter, torch.nn.Parameter(stored.float().clone(), requires_grad=False))
            layer.merge(adapter_names=[name])
            known = known.replace(".base_layer", "")
            changed = known if parameter == "weight" else f"{known}.{parameter}"
            yield changed, _share(getattr(base, parameter), stored)
            layer.merged_adapters.clear()
            setattr(base, parameter, stored)
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            own = dict(module.modules_to_save[name].named_parameters())
            for key, stored in module.original_module.named_parameters():
                yield f"{known}.{key}", _share(own[key], stored)


def _share(changed: Any, stored: Any) -> float:
    change = changed.float() - stored.float()
    return float(change.norm() / stored.float().norm().clamp_min(1e-30))
