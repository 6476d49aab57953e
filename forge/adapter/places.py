"""Which tensor of the base each part of an adapter is for: asked by plan, validate and the merge alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from forge.adapter.names import PREFIX
from forge.adapter.read import Adapter, LoraLayer, TokenRows, find_base_tensor
from forge.adapter.vocabulary import Fitted, is_of_tokens
from forge.errors import DataError, Problem
from forge.model.safetensors_header import TensorSpec

_MOST_NAMED = 8
_ABSENT = "the base has no such tensor"


@dataclass(frozen=True)
class Parts:
    """An adapter's parts by the names of the base's tensors."""

    layers: dict[str, LoraLayer] = field(default_factory=dict)
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
        name = find_base_tensor(part, base)
        if name is None:
            yield Problem(_ABSENT, part)
        elif base[name].shape != spec.shape and not (
            is_of_tokens(name) and base[name].shape[1:] == spec.shape[1:]
        ):
            yield Problem(f"{spec.shape} does not fit the base's {base[name].shape}", part)
        else:
            parts.replaced[name] = spec


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
        transposed = fitted.is_transposed(layer)
        name = find_base_tensor(f"{module}.weight", base)
        if layer.magnitude and transposed:
            yield Problem("DoRA is merged on linear layers only", module)
        elif name is None:
            yield Problem(_ABSENT, f"{module}.weight")
        elif (shape := parts.shape(name, base)) != (delta := _delta_shape(layer, transposed)):
            yield Problem(f"{delta} does not fit the base's {shape}", module)
        else:
            parts.layers[name] = layer


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
