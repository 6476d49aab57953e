"""Which tensor of the base each part of an adapter is for: asked by plan, validate and the merge alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from forge.adapter.experts import is_stored_transposed, names_apart, names_joined
from forge.adapter.names import PREFIX
from forge.adapter.read import Adapter, LoraLayer, TokenRows, find_base_tensor
from forge.adapter.vocabulary import Fitted, is_of_tokens
from forge.errors import DataError, Problem
from forge.model.safetensors_header import TensorSpec

_MOST_NAMED = 8
_ABSENT = "the base has no such tensor"


@dataclass(frozen=True)
class Placed:
    """Factors over one tensor of the base, which has the transpose of their product where `transposed`.

    Of joined experts: `expert` is the one whose matrix the tensor has, None where it has all of them; `first`
    is the first of that matrix's rows.
    """

    layer: LoraLayer
    transposed: bool
    expert: int | None = None
    first: int = 0


@dataclass(frozen=True)
class Parts:
    """An adapter's parts by the names of the base's tensors."""

    layers: dict[str, Placed] = field(default_factory=dict)
    replaced: dict[str, TensorSpec] = field(default_factory=dict)
    rows: dict[str, TokenRows] = field(default_factory=dict)

    def shape(self, name: str, base: Mapping[str, TensorSpec]) -> tuple[int, ...]:
        """The shape of the tuned model's tensor."""
        return self.replaced.get(name, base[name]).shape


def place(fitted: Fitted) -> Parts:
    """Every part of the adapter by the base's tensor that it changes.

    Raises `DataError` with all parts that have no place, or one of another shape.
    """
    parts = Parts()
    problems = [*_whole(fitted, parts), *_rows(fitted, parts), *_layers(fitted, parts)]
    if problems:
        adapter = fitted.adapter
        count = len(adapter.layers) + len(adapter.replaced) + len(adapter.rows)
        raise DataError(
            f"{len(problems)} of the adapter's {count} parts do not fit this base",
            hint=_hint(fitted, problems),
            problems=problems[:_MOST_NAMED],
        )
    return parts


def _hint(fitted: Fitted, problems: Sequence[Problem]) -> str:
    adapter = fitted.adapter
    for problem in problems:
        if problem.message == _ABSENT and (near := _nearest(problem.field, fitted)):
            return (
                f"the names of its tensors are wrapped: {PREFIX}{problem.field} is in the file, peft writes "
                f"{PREFIX}{near}; save it with peft's save_pretrained of the unwrapped model"
            )
    if all("DoRA" in problem.message for problem in problems):
        return "train on the linear layers only, or merge it with peft and ship that with train: none"
    beside = {problem.field for problem in problems} <= adapter.replaced.keys()
    if beside and all(problem.message == _ABSENT for problem in problems):
        return (
            "these were saved beside the factors and no base has a place for them (a classifier's or value "
            "head, the state of a quantized layer): save the adapter again with peft, without them"
        )
    named = adapter.base_name or "no base"
    return f"it names {named}: set `base` to the model it was trained on, or merge it with peft"


def _nearest(name: str, fitted: Fitted) -> str | None:
    """A tensor of the base with the same end: layer's number, block and module."""
    end = "." + ".".join(name.split(".")[-4:])
    return next((known for known in fitted.checkpoint.tensors if f".{known}".endswith(end)), None)


def _whole(fitted: Fitted, parts: Parts) -> Iterator[Problem]:
    base = fitted.checkpoint.tensors
    for part, spec in fitted.adapter.replaced.items():
        name = _stored(part, base)
        if name is None:
            yield Problem(_ABSENT, part)
        elif base[name].shape != spec.shape and not (
            is_of_tokens(name) and base[name].shape[1:] == spec.shape[1:]
        ):
            yield Problem(f"{spec.shape} does not fit the base's {base[name].shape}", part)
        else:
            parts.replaced[name] = spec


def _stored(name: str, base: Mapping[str, TensorSpec]) -> str | None:
    """The checkpoint's name; of a router also where transformers has renamed the block that it is in."""
    return find_base_tensor(name, base) or find_base_tensor(name.replace(".mlp.", ".block_sparse_moe."), base)


def _rows(fitted: Fitted, parts: Parts) -> Iterator[Problem]:
    base = fitted.checkpoint.tensors
    for part, rows in fitted.adapter.rows.items():
        name = find_base_tensor(part, base)
        if name is None:
            yield Problem(_ABSENT, part)
            continue
        count, *width = parts.shape(name, base)
        if list(rows.values.shape[1:]) != width:
            yield Problem(f"rows of {rows.values.shape[1:]} do not fit the base's {base[name].shape}", part)
        elif max(rows.tokens, default=0) >= count:
            yield Problem(f"token {max(rows.tokens)} has no row, there are {count}", part)
        else:
            parts.rows[name] = rows


def _layers(fitted: Fitted, parts: Parts) -> Iterator[Problem]:
    base = fitted.checkpoint.tensors
    for module, layer in fitted.adapter.layers.items():
        if layer.experts is not None:
            yield from _experts(fitted, parts, layer)
            continue
        transposed = fitted.is_transposed(layer)
        name = _stored(f"{module}.weight", base)
        if layer.magnitude and transposed:
            yield Problem("DoRA is merged on linear layers only", module)
        elif name is None:
            yield Problem(_ABSENT, f"{module}.weight")
        elif (shape := parts.shape(name, base)) != (delta := _delta_shape(layer, transposed)):
            yield Problem(f"{delta} does not fit the base's {shape}", module)
        else:
            parts.layers[name] = Placed(layer, transposed)


def _experts(fitted: Fitted, parts: Parts, layer: LoraLayer) -> Iterator[Problem]:
    """Factors of joined experts, over each expert's tensors or over one that has all of them."""
    base, parameter = fitted.checkpoint.tensors, layer.module
    out, width, count = layer.b.shape[0], layer.a.shape[1], layer.experts
    assert count is not None
    if out == width and not _knows_sides(fitted.adapter) and not is_stored_transposed(fitted.model_type):
        yield Problem("its factors are square, and peft before 0.19 has them the other way round", parameter)
        return
    for name in filter(None, (find_base_tensor(name, base) for name in names_joined(parameter))):
        transposed = is_stored_transposed(fitted.model_type)
        shape = (count, width, out) if transposed else (count, out, width)
        if transposed is None:
            yield Problem(f"forge does not know how {fitted.model_type} stores joined experts", parameter)
        elif base[name].shape != shape:
            yield Problem(f"{shape} does not fit the base's {base[name].shape}", parameter)
        else:
            parts.layers[name] = Placed(layer, transposed)
        return
    for expert in range(count):
        names = _share(parameter, expert, base)
        if names is None:
            yield Problem(_ABSENT, f"{parameter} of expert {expert}")
            return
        for number, name in enumerate(names):
            if base[name].shape != (out // len(names), width):
                delta = (out // len(names), width)
                yield Problem(f"{delta} does not fit the base's {base[name].shape}", f"{parameter}: {name}")
                return
            parts.layers[name] = Placed(layer, False, expert, number * out // len(names))
    if _share(parameter, count, base):
        yield Problem(f"it is for {count} experts, the base has more", parameter)


def _share(parameter: str, expert: int, base: Mapping[str, TensorSpec]) -> list[str] | None:
    """The base's tensors that are together one expert's share of `parameter`."""
    for names in names_apart(parameter, expert):
        stored = [name for name in (find_base_tensor(name, base) for name in names) if name]
        if len(stored) == len(names):
            return stored
    return None


def _knows_sides(adapter: Adapter) -> bool:
    """Whether it was written by a peft that has A on the side of the input, whatever is stored."""
    numbers = re.findall(r"\d+", str(adapter.configuration.get("peft_version") or ""))
    return [int(number) for number in numbers[:2]] >= [0, 19]


def _delta_shape(layer: LoraLayer, transposed: bool) -> tuple[int, ...]:
    shape = (layer.b.shape[0], layer.a.shape[1])
    return (shape[1], shape[0]) if transposed else shape


def other_base(adapter: Adapter, base: str, local: Mapping[str, object]) -> str:
    """What to say where the adapter names another base than `base`; empty where it does not.

    The last parts of the names are compared, without what quantized copies add to them. `local`: the
    config.json of the base, which may name what it was copied from.
    """
    named = _last_part(adapter.base_name)
    known = {_last_part(base), _last_part(str(local.get("_name_or_path") or ""))}
    if not named or named in known:
        return ""
    return (
        f"the adapter was trained on {adapter.base_name}, the base here is {base}: where only the shapes are "
        "the same the answers will be wrong"
    )


_COPY_OF = (
    "-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit", "-unsloth", "-4bit", "-8bit", "-mlx", "-gptq", "-awq",
    "-int4", "-int8", "-fp8", "-hf", "-nf4",
)  # fmt: skip


def _last_part(name: str) -> str:
    """The model's own name in a hub id, a path of any system or a hub cache's directory, in lower case."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    last = (cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else "").lower()
    last = last.partition("@")[0]
    while end := next((copy for copy in _COPY_OF if last.endswith(copy)), None):
        last = last.removesuffix(end)
    return last
