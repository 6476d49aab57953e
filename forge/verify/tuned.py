"""The model of base and adapter as peft has it, without the base's weights. Runs in a worker.

peft reads the adapter's configuration, puts its layers in and loads their numbers; the reference then runs
its forward. Nothing of it is shared with the export, so a setting that the export misreads cannot be
misread here in the same way.

The base's parameters are stand-ins of the right shape that take no memory, since peft moves factors to
where the base is. The embedding and the output layer are filled where the adapter says anything of them:
peft copies rows, and ties the two, as it loads. In memory: the adapter in float32, and those two.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import DataError
from forge.model.loading import read_transformers
from forge.model.safetensors_header import TensorSpec, read_header
from forge.verify.loader import DAMAGED, Loader, Weights, read_float32

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DEFAULT = "default"
# A part of a layer, the adapter's own name behind it.
_OWN_NAME = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$)[^.]+")
# What torch.compile, FSDP, checkpointing and an adapter's own name leave in a state dict's names.
_BESIDE = (".modules_to_save.", ".original_module.", ".trainable_tokens_original")
_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")


@dataclass(frozen=True)
class Opened:
    """`model` is what runs; `names` are its stand-ins' names by identity, those of tied ones together.

    `layers` are peft's layers by the name of the module that each stands for. `of_tokens`: the parameters of
    the embedding and the output layer.
    """

    model: Any
    loader: Loader
    names: Mapping[int, Sequence[str]]
    layers: Mapping[str, Any]
    of_tokens: Sequence[str] = ()

    @property
    def vocabulary_size(self) -> int:
        """The rows of the tuned model's embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def tensors(self) -> Sequence[str]:
        """The names of the tuned model's tensors, as the checkpoint has them.

        With the output layer's, where the base ties it to the embedding and the tuned model has two.
        """
        import torch

        stored, tokens = list(self.loader.checkpoint.tensors), self.of_tokens
        if len(tokens) < 2 or self.loader.has(tokens[-1]) or not any(map(self.is_touched, tokens)):
            return stored
        both = []
        for name in tokens:
            weight = self.read(name)
            added = self.added(name, weight)
            both.append(weight if added is None else weight + added)
        return stored if torch.equal(*both) else [*stored, tokens[-1]]

    def read(self, name: str, *, nf4: bool = False) -> Any:
        """What stands in for the checkpoint's tensor `name` before the factors: its own, or a whole one."""
        target = self.loader.targets.get(name, name)
        layer = self.layers.get(target.rpartition(".")[0])
        if saved := getattr(layer, "modules_to_save", None):
            return saved[_DEFAULT].weight.detach().float()
        if rows := getattr(layer, "token_adapter", None):
            return rows.get_merged_weights([_DEFAULT]).detach().float()
        base = dict(self.model.named_parameters(remove_duplicate=False)).get(target)
        if layer is not None:
            base = layer.get_base_layer().weight
        if base is not None and id(base) not in self.names:  # filled, or the adapter's own
            return base.detach().float()
        return self.loader.read(name, nf4=nf4)

    def added(self, name: str, weight: Any) -> Any:
        """What peft's merge adds to the tensor `name`, whose values are `weight`; None where nothing is."""
        import torch

        module, _, part = self.loader.targets.get(name, name).rpartition(".")
        layer: Any = self.layers.get(module)
        if part != "weight" or not hasattr(layer, "merge"):
            return None
        base = layer.get_base_layer()
        stand_in, base.weight = base.weight, torch.nn.Parameter(weight.clone(), requires_grad=False)
        with torch.inference_mode():
            layer.merge()
            added = base.weight - weight
        layer.merged_adapters.clear()
        base.weight = stand_in
        return added

    def is_touched(self, name: str) -> bool:
        """Whether the tensor `name` has its values of the adapter: factors, a whole tensor or rows."""
        return self.loader.targets.get(name, name).rpartition(".")[0] in self.layers

    def is_looked_up(self, name: str) -> bool:
        """Whether `read` and `added` say all of the tensor `name`: not of experts that peft adapts fused."""
        target = self.loader.targets.get(name, name)
        return not any(
            parameter_of(layer) != "weight" and target.startswith(f"{module}.")
            for module, layer in self.layers.items()
        )


def parameter_of(layer: Any) -> str:
    """The name of the base's parameter that a layer of peft's adapts."""
    return str(getattr(layer, "parameter_name", "weight"))


def open_model(weights: Weights) -> Opened:
    """The model of `weights`, its base's parameters stand-ins.

    Raises `DataError` for an unknown family, and for an adapter that peft does not load whole.
    """
    whole = _whole_tensors(weights.adapter) if weights.adapter else {}
    model = empty_model(weights)
    loader = Loader(weights, model)
    rows = _rows(model, whole)
    own_head = _has_own_head(model, loader)
    if rows is not None:

        def change(configuration: Any) -> None:
            text = configuration.get_text_config()
            text.vocab_size = rows
            if (text.pad_token_id or 0) >= text.vocab_size:
                text.pad_token_id = None  # no embedding is built with such a one

        model = empty_model(weights, change)
    if own_head:  # the configuration stays as it is: peft ties rows of tokens by it
        model.get_output_embeddings().weight = copy.deepcopy(model.get_input_embeddings().weight)
    names = _stand_in(model)
    if weights.adapter is None or (weights.plain and rows is None):
        return Opened(model, loader, names, {})
    if rows is not None or _touches_tokens(model, weights.adapter):
        _fill(model, loader, names, whole if weights.plain else {})
    if weights.plain:
        return Opened(model, loader, names, {})
    modules = {id(module): name for name, module in model.named_modules()}
    of_tokens = [f"{name}.weight" for name in _of_tokens(model)]
    tuned = _with_peft(model, weights.adapter)
    return Opened(tuned, loader, names, dict(_layers(tuned, modules)), of_tokens)


def empty_model(weights: Weights, change: Callable[[Any], None] | None = None) -> Any:
    """The model without weights; its buffers (rotary frequencies) are computed, not loaded.

    `change` is given transformers' configuration first. Raises `DataError` for an unknown family.
    """
    import accelerate
    import torch
    import transformers

    remote = weights.trust_remote_code
    configuration = read_transformers(weights.base, trust_remote_code=remote)
    if change:
        change(configuration)
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(
                configuration, dtype=torch.float32, trust_remote_code=remote
            )
    except (ValueError, KeyError) as error:
        raise DataError(f"transformers cannot run {weights.base}: {error}") from error
    model.tie_weights()
    return model.eval()


def _of_tokens(model: Any) -> Mapping[str, Any]:
    """The embedding and the output layer by their names."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name: module for name, module in model.named_modules() if any(module is item for item in wanted)}


def _plain(name: str) -> str:
    """The name of an adapter's tensor without what is around the model's own."""
    for wrapper in _WRAPPED:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name


def _whole_tensors(adapter: Path) -> Mapping[str, TensorSpec]:
    """The adapter's whole tensors by the parameter's name."""
    specs = {}
    for name, spec in read_header(adapter / _FILE).items():
        bare = _plain(name)
        for wrapper in (".token_adapter", ".base_layer", ".modules_to_save"):
            bare = bare.replace(f"{wrapper}.", ".")
        if bare.endswith(".weight") and ".lora_" not in bare:
            specs[bare.replace(f".{_DEFAULT}.", ".")] = spec
    return specs


def _rows(model: Any, whole: Mapping[str, TensorSpec]) -> int | None:
    """The rows of the embedding that the adapter brings, where the base has another number of them."""
    for name, module in _of_tokens(model).items():
        spec = whole.get(f"{name}.weight")
        if spec is not None and spec.shape[0] != module.weight.shape[0]:
            return spec.shape[0]
    return None


def _has_own_head(model: Any, loader: Loader) -> bool:
    """Whether the base ties embedding and output layer but stores two that differ: these are not tied."""
    import torch

    modules = list(_of_tokens(model).items())
    if len(modules) < 2 or modules[0][1].weight is not modules[1][1].weight:
        return False
    names = [f"{name}.weight" for name, _ in modules]
    if not all(map(loader.has, names)):
        return False
    first, second = (
        loader.parameter([name], module.weight.shape, False)
        for name, (_, module) in zip(names, modules, strict=True)
    )
    return not torch.equal(first, second)


def _touches_tokens(model: Any, adapter: Path) -> bool:
    """Whether a tensor of the adapter is of the embedding or the output layer."""
    modules = [f"{name}." for name in _of_tokens(model)]
    return any(_plain(name).startswith(tuple(modules)) for name in read_header(adapter / _FILE))


def _stand_in(model: Any) -> dict[int, list[str]]:
    """Give every parameter the right shape and no memory; their names by identity."""
    import torch

    names: dict[int, list[str]] = {}
    made: dict[int, Any] = {}
    for path, module in model.named_modules():
        for key, empty in module._parameters.items():
            if empty is None:
                continue
            if id(empty) not in made:
                zeros = torch.zeros((1,) * empty.dim()).expand(empty.shape)
                made[id(empty)] = torch.nn.Parameter(zeros, requires_grad=False)
            module._parameters[key] = made[id(empty)]
            names.setdefault(id(made[id(empty)]), []).append(f"{path}.{key}" if path else key)
    # As long as the model lives no other object may get one of these identities.
    model.__dict__["_forge_stand_ins"] = list(made.values())
    return names


def _fill(
    model: Any, loader: Loader, names: Mapping[int, Sequence[str]], added: Mapping[str, TensorSpec]
) -> None:
    """Read the embedding and the output layer; rows that the base lacks are those of `added`, or zero."""
    import torch

    filled: dict[int, Any] = {}
    for module in _of_tokens(model).values():
        stand_in = module.weight
        if id(stand_in) not in filled:
            name = next(name for name in names[id(stand_in)] if loader.has(name))
            own = loader.parameter([name], (_stored_rows(loader, name), *stand_in.shape[1:]), False)
            spec = added.get(name)
            weight = read_float32(spec) if spec is not None else torch.zeros(stand_in.shape)
            count = min(weight.shape[0], own.shape[0])
            weight[:count] = own[:count]
            filled[id(stand_in)] = torch.nn.Parameter(weight, requires_grad=False)
        module.weight = filled[id(stand_in)]


def _stored_rows(loader: Loader, name: str) -> int:
    stored = next(key for key, target in loader.targets.items() if target == name)
    return loader.checkpoint.tensors[stored].shape[0]


def _with_peft(model: Any, adapter: Path) -> Any:
    """`model` with peft's layers, the adapter's numbers in them."""
    import peft
    import torch
    from peft.utils import load_peft_weights

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    names = list(_of_tokens(model))
    head_before = head.weight if tied else None
    configuration = peft.PeftConfig.from_pretrained(str(adapter))
    configuration.inference_mode = True
    with warnings.catch_warnings():
        # Of layers that are tied, or Conv1D: what peft makes of them is what is wanted here.
        warnings.simplefilter("ignore", UserWarning)
        tuned = peft.PeftModel(
            model, configuration, _DEFAULT, autocast_adapter_dtype=False, low_cpu_mem_usage=True
        )
        expected = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
        stored = load_peft_weights(str(adapter), device="cpu")
        state = {_as_expected(name, expected): tensor for name, tensor in stored.items()}
        if any(not torch.isfinite(tensor).all() for tensor in state.values()):
            raise DataError(f"{adapter}: the adapter has values that are not finite", hint=DAMAGED)
        try:
            result = peft.set_peft_model_state_dict(tuned, state, low_cpu_mem_usage=True)
        except (RuntimeError, KeyError, ValueError) as error:
            words = " ".join(str(error).split())[:300]
            raise DataError(f"{adapter}: peft does not load it onto this base: {words}") from error
    # Of a module that is saved whole peft may write the base's own too; of a tied one the values twice.
    copies = set(_copies_of_embedding(state, names)) if tied else set()
    surplus = [
        name
        for name in result.unexpected_keys
        if name not in copies and not any(mark in name for mark in _BESIDE)
    ]
    empty = [name for name, parameter in tuned.named_parameters() if parameter.is_meta]
    for what, lost in (("has no place for", surplus), ("is not given", empty)):
        if lost:
            raise DataError(
                f"{adapter}: the adapter was made for another base: peft {what} {len(lost)} of its "
                f"parts, such as {lost[0]}",
                hint="name the base that it was trained on",
            )
    base = tuned.eval().get_base_model()
    if tied and head.weight is head_before and embedding.weight is not head_before:
        head.weight = embedding.weight  # loaded by replacing one of two names of a tied parameter
    return base


def _copies_of_embedding(state: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """The tensors of the output layer that are the embedding's once more; `names` are those of the two."""
    import torch

    embedding, head = (f"{_PREFIX}{name}." for name in names)
    for name, tensor in state.items():
        twin = state.get(name.replace(head, embedding)) if name.startswith(head) else None
        if twin is not None and torch.equal(tensor, twin):
            yield name


def _as_expected(name: str, expected: Mapping[str, Any]) -> str:
    """A tensor's name as peft writes it, where only a wrapper makes the difference."""
    if name in expected:
        return name
    bare = f"{_PREFIX}{_plain(name)}"
    unnamed = _OWN_NAME.sub(r"\1", bare)
    for candidate in (bare, unnamed, bare.replace(f".{_DEFAULT}.", "."), bare.removesuffix(f".{_DEFAULT}")):
        for spelling in (candidate, candidate.replace(_PREFIX, f"{_PREFIX}model.", 1)):
            if spelling in expected:
                return spelling
    return bare if bare.endswith(".weight") and ".lora_" not in bare else name


def _layers(tuned: Any, modules: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    """peft's layers by the name of the module that each stands for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in tuned.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = modules.get(id(module.original_module))
        elif isinstance(module, BaseTunerLayer):
            name = modules.get(id(module.get_base_layer()))
        else:
            continue
        if name is not None:
            yield name, module
