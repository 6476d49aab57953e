"""Experts that transformers joins to one parameter: what peft calls their factors, where each is stored.

peft wraps a module once for each of `target_parameters` that it has, in the order of the parameters: the
factors of the last have the module's own name, those of the one before `base_layer` behind it. A checkpoint
has the experts apart, gate and up too, or joined as the parameter is.

Not covered, and refused: parameters other than `settings.PARAMETERS`, and joined experts of families that
`_JOINED` does not name: transformers may turn them as it loads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from forge.adapter.settings import PARAMETERS
from forge.errors import DataError
from forge.model.safetensors_header import TensorSpec

JOINED = PARAMETERS[:2]
"""Parameters that hold a matrix for each expert, in the order in which peft nests their factors."""
_WRAPPED = ".base_layer"
_APART: Mapping[str, Sequence[Sequence[str]]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_GRANITE = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}
# Whether each expert's matrix is stored transposed, (in, out).
_JOINED = {
    "gpt_oss": True, "granitemoe": False, "granitemoeshared": False, "granitemoehybrid": False,
    "qwen3_5_moe": False, "qwen3_5_moe_text": False,
}  # fmt: skip
_OF_ONE = re.compile(r"\.experts\.(?:\d+\.)?[^.]+$")
_LEAVES = "|".join(leaf for shares in _APART.values() for leaves in shares for leaf in leaves)
_MATRIX = re.compile(
    rf"\.experts\.(?:\d+\.(?:{_LEAVES})\.weight|{'|'.join(JOINED)})$|"
    rf"\.block_sparse_moe\.(?:{'|'.join(_GRANITE.values())})$"
)


def parameters(modules: Collection[str], configuration: Mapping[str, object]) -> dict[str, str]:
    """Of the names with factors in a file those that are of parameters, by the parameter's name in the model.

    Raises `DataError` where the file has factors for more or fewer parameters of a module than the settings.
    """
    named = configuration.get("target_parameters")
    targets = tuple(f".{target}" for target in named) if isinstance(named, list) else ()
    nested: dict[str, dict[int, str]] = {}
    for name in modules:
        nested.setdefault(name.replace(_WRAPPED, ""), {})[name.count(_WRAPPED)] = name
    names: dict[str, str] = {}
    for module, by_depth in nested.items():
        has = JOINED if module.endswith(".experts") else ("weight",)
        adapted = [own for own in has if targets and f".{module}.{own}".endswith(targets)]
        if not adapted:
            continue
        if sorted(by_depth) != list(range(len(adapted))):
            raise DataError(
                f"target_parameters adapts {len(adapted)} parameters of {module}, the file has factors for "
                f"{len(by_depth)}",
                hint="take the adapter_config.json of this training",
            )
        for number, own in enumerate(adapted, start=1):
            names[f"{module}.{own}"] = by_depth[len(adapted) - number]
    return names


def expert_tensors(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Those of a checkpoint that factors of joined experts would be of."""
    return {name: tensor for name, tensor in tensors.items() if _MATRIX.search(name)}


def can_be_merged(tensors: Mapping[str, TensorSpec], model_type: str) -> bool:
    """Whether forge knows how such factors go into a checkpoint of these tensors."""
    matrices = expert_tensors(tensors).values()
    is_joined = any(len(tensor.shape) > 2 for tensor in matrices)
    return bool(matrices) and not (is_joined and is_stored_transposed(model_type) is None)


def is_of_expert(module: str) -> bool:
    """Whether factors of that name are of one expert, or of all of them."""
    return _OF_ONE.search(module) is not None


def owner(module: str) -> str:
    """The module of transformers that factors of that name are of: experts are joined there."""
    joined = _OF_ONE.sub(".experts", module.replace(_WRAPPED, ""))
    return joined.replace(".block_sparse_moe.", ".mlp.")


def is_stored_transposed(model_type: str) -> bool | None:
    """Whether joined experts of that family are stored as (in, out); None where forge does not know."""
    return _JOINED.get(model_type)


def names_joined(parameter: str) -> Iterator[str]:
    """What a checkpoint may call all experts' `parameter`."""
    module, _, own = parameter.rpartition(".")
    yield parameter
    yield f"{module.removesuffix('.experts')}.{_GRANITE[own]}"


def names_apart(parameter: str, expert: int) -> Iterator[list[str]]:
    """What a checkpoint may call the tensors that make one expert's share of `parameter`, in order."""
    module, _, own = parameter.rpartition(".")
    for around in (module, module.replace(".mlp.experts", ".block_sparse_moe.experts")):
        for leaves in _APART[own]:
            yield [f"{around}.{expert}.{leaf}.weight" for leaf in leaves]
