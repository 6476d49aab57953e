"""The reference: transformers' own modules in float32, one decoder layer in memory at a time.

The model is built without weights; where there is an adapter, peft puts its own layers in and loads them
(`tuned`). A hook before each decoder layer reads the base's weights of it from the checkpoint as float32; a
hook behind it drops them. Embedding, final norm and head come and go in the same way. So the modules of
transformers and peft run unchanged, whatever the family and whatever the adapter's settings, and the peak
is one layer, the embedding, the adapter and the activations of the sampled rows.

With a `rounding` the weights are those that a file holds, peft's merge in them, and what they are multiplied
by is rounded too where it says so; GELU then is llama.cpp's, from its table.

Where the adapter resized the embedding, or parted it from the output layer, the model is built so. The
arithmetic is float32, of an NF4 base too.

Not covered, and refused: encoder-decoders, and what `loader` does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from forge import report
from forge.errors import DataError
from forge.verify.loader import DAMAGED, Weights
from forge.verify.measurement import Greedy
from forge.verify.rounding import RoundedTypes, rounded
from forge.verify.sample import Sample
from forge.verify.tuned import Opened, empty_model, open_model


def logits(weights: Weights, sample: Sample, label: str, lost: dict[str, float] | None = None) -> Any:
    """Logits at the sampled positions: float32, (positions, vocabulary), in the order of the sample.

    `lost` is filled with what share of its norm the rounding takes of each weight.

    Raises `DataError` for weights that are not finite, not whole, or not those of the modules, and
    for an adapter that has parts without a place.
    """
    import torch

    opened = open_model(weights)
    model = opened.model
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"{type(model).__name__} has no output layer: it gives no logits")
    width = max(map(len, sample.rows))
    # Causal: what stands behind a position does not change it, so the padding needs no mask.
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in sample.rows])
    rows = torch.tensor([row for row, _ in sample.positions])
    places = torch.tensor([place for _, place in sample.positions])

    def only_sampled(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][rows, places].unsqueeze(0), *inputs[1:])

    with torch.inference_mode(), _streamed(opened, weights, label, lost):
        hook = head.register_forward_pre_hook(only_sampled)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        hook.remove()
    if not torch.isfinite(logits).all():
        raise DataError(f"{weights.base}: the logits of the reference are not finite", hint=DAMAGED)
    return logits.numpy()


def with_table(weights: Weights, rounding: RoundedTypes, sample: Sample) -> Any:
    """`logits` with GELU as llama.cpp has it in float32 too, by an exact `rounding`; None without a GELU."""
    if not any(map(_is_gelu, empty_model(weights).modules())):
        return None
    own = replace(weights, rounding=replace(rounding, inputs=True))
    return logits(own, sample, "the reference, GELU in 16 bits")


def with_greedy(
    weights: Weights, sample: Sample, made: Sequence[tuple[Sequence[int], Sequence[int]]], label: str
) -> tuple[Any, Greedy]:
    """`logits`, and whether the reference would have written what was `made` of prompts, in the same pass.

    It would where every token is its most likely one: up to the first other token both texts are equal.
    """
    rows = tuple((*prompt, *answer) for prompt, answer in made)
    places = tuple(
        (row, len(prompt) - 1 + at) for row, (prompt, answer) in enumerate(made) for at in range(len(answer))
    )
    count = len(sample.rows)
    joint = Sample(
        (*sample.rows, *rows),
        (*sample.positions, *((count + row, place) for row, place in places)),
        (*sample.answers, *(True for _ in places)),
        sample.offered,
    )
    both = logits(weights, joint, label)
    best = both[len(sample.positions) :].argmax(axis=1).tolist()
    same, firsts, at = 0, [], 0
    for _, answer in made:
        wrong = next((step for step, token in enumerate(answer) if best[at + step] != token), None)
        same += wrong is None
        firsts.append(wrong)
        at += len(answer)
    return both[: len(sample.positions)], Greedy(len(made), same, tuple(firsts))


@contextmanager
def _streamed(
    opened: Opened, weights: Weights, label: str, lost: dict[str, float] | None = None
) -> Iterator[None]:
    """Weights come before each unit's forward and go behind it.

    Raises `DataError` at the end when a part of the adapter was in no layer that ran.
    """
    import torch

    model, names = opened.model, opened.names
    # Without an adapter there is nothing of peft's, whose import takes seconds.
    units, unread = list(_units(model, is_tuned=bool(opened.layers))), set[int]()
    unread.update(_replaced(model) if opened.layers else ())
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # of peft's layer
    idle, done = dict(opened.layers), 0
    rounding, merged = weights.rounding, list[Any]()
    modules = {id(module): name for name, module in model.named_modules()}

    def load(unit: Any, inputs: Any) -> None:
        for module in unit.modules():
            linear = isinstance(module, torch.nn.Linear) and module is not head  # those QLoRA quantizes
            for key, empty in list(module._parameters.items()):
                if id(empty) in names and id(module) not in unread:
                    weight = opened.loader.parameter(names[id(empty)], empty.shape, linear)
                    module._parameters[key] = torch.nn.Parameter(weight, requires_grad=False)
        if rounding:
            merged.extend(() if weights.beside or not opened.layers else _merged(unit))
            _round(unit, rounding, modules, lost)

    def drop(unit: Any, inputs: Any, made: Any) -> None:
        nonlocal done
        done = min(done + 1, len(units))
        report.advance(label, done, len(units))
        for module, kept in empties[id(unit)]:
            module._parameters.update(kept)
        while merged:
            merged.pop().merged_adapters.clear()

    def ran(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda layer, inputs, made: idle.pop(name, None) and None

    empties = {id(unit): [(module, dict(module._parameters)) for module in unit.modules()] for unit in units}
    hooks = [unit.register_forward_pre_hook(load) for unit in units]
    hooks += [unit.register_forward_hook(drop) for unit in units]
    hooks += [layer.register_forward_hook(ran(name)) for name, layer in opened.layers.items()]
    if rounding and rounding.inputs:
        products = {id(module): module for unit in units for module in unit.modules() if _multiplies(module)}
        hooks += [module.register_forward_pre_hook(_round_inputs) for module in products.values()]
        hooks += [module.register_forward_hook(_from_table) for module in model.modules() if _is_gelu(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if done < len(units):
            report.advance(label, len(units), len(units))
    if idle:
        first = next(iter(idle))
        raise DataError(f"{len(idle)} parts of the adapter are in no layer that ran: {first}")


def _merged(unit: Any) -> Iterator[Any]:
    """peft's layers in `unit`, each merged into a copy of the weight, which goes with the unit's others."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in unit.modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "merge"):
            # A merge is into the weight itself, which an embedding may share with the output layer.
            base, name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
            own = getattr(base, name).clone()
            setattr(base, name, torch.nn.Parameter(own, requires_grad=False))
            layer.merge()
            yield layer


def _round(
    unit: Any, rounding: RoundedTypes, modules: Mapping[int, str], lost: dict[str, float] | None
) -> None:
    """Round what `unit` multiplies by as a file holds it; `modules` are their names by identity."""
    import torch

    for module in unit.modules():
        name = modules[id(module)]
        if ".lora_" in name:
            continue
        for wrapper in (".base_layer", ".modules_to_save.default", ".token_adapter", ".original_module"):
            name = name.replace(wrapper, "")
        for key, weight in module._parameters.items():
            kind = rounding.type_of(f"{name}.{key}", weight.dim()) if weight is not None else None
            if kind:
                held: Any = torch.nn.Parameter(rounded(weight, kind), requires_grad=False)
                held.held_as = kind
                if lost is not None:
                    gone = float((held - weight).norm() / weight.norm().clamp_min(1e-30))
                    lost[f"{name}.{key}"] = max(gone, lost.get(f"{name}.{key}", 0.0))
                module._parameters[key] = held


def _multiplies(module: Any) -> bool:
    """Whether it has a matrix of its own that its input is multiplied by."""
    import torch

    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return not isinstance(module, torch.nn.Embedding) and any(tensor.dim() > 1 for tensor in own)


def _round_inputs(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a rounded weight is multiplied by, rounded as it is; runs behind the loading."""
    kinds = (getattr(tensor, "held_as", None) for tensor in module._parameters.values())
    kind = next((kind for kind in kinds if kind), None)
    return (rounded(inputs[0], kind), *inputs[1:])


def _is_gelu(module: Any) -> bool:
    """Whether llama.cpp looks this activation up in a table, whatever the file's type."""
    return "GELU" in type(module).__name__


def _from_table(module: Any, inputs: tuple[Any, ...], made: Any) -> Any:
    """What llama.cpp's table has: by tanh also where the module has erf, F16 in and out, up to 10."""
    import torch

    held = rounded(inputs[0], "F16")
    quick = "Quick" in type(module).__name__
    gelu = module.forward(held) if quick else torch.nn.functional.gelu(held, approximate="tanh")
    return torch.where(inputs[0].abs() < 10, rounded(gelu, "F16"), made)


def _units(model: Any, *, is_tuned: bool) -> Iterator[Any]:
    """What is loaded at once: each decoder layer, and every module with weights outside of them.

    A layer of peft's reads the weights of the module inside it, so it is one too.
    """
    if is_tuned:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

    layers = set(getattr(model, "_no_split_modules", None) or ())

    def walk(module: Any) -> Iterator[Any]:
        own = any(parameter is not None for parameter in module._parameters.values())
        peft_s = is_tuned and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if own or peft_s or type(module).__name__ in layers:
            yield module
            return
        for child in module.children():
            yield from walk(child)

    return walk(model)


def _replaced(model: Any) -> Iterator[int]:
    """The modules of the base that the adapter's own, saved whole, run instead of."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            yield from (id(module) for module in wrapper.original_module.modules())
