"""Does this checkpoint hold what its architecture wants? Runs in a worker.

transformers itself is asked: it loads tensors without values (the meta device) by its own table of names,
its own fusing of experts and its own tying, and reports what was missing, surplus or of another shape. A
7B base costs seconds, and no weight is read.

Not covered: values; families that run by the base's own code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge.errors import DataError, Problem
from forge.model.safetensors_header import TensorSpec

Stored = Mapping[str, TensorSpec]
_MOST_NAMED = 5
# What training with rewards or labels leaves in a checkpoint, by the start of its name.
_HEADS = ("v_head.", "score.", "value_head.", "classifier.", "reward_head.")


@dataclass(frozen=True)
class Loading:
    """What transformers makes of a checkpoint; `misshapen` has name, stored and wanted shape.

    `unlike`: what of the configuration llama.cpp calculates otherwise, and how.
    """

    architecture: str
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    unlike: str = ""


def read_transformers(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of the base in `directory`; raises `DataError` where it takes none."""
    import transformers

    with _refused(directory):
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _refused(directory: Path) -> Iterator[None]:
    """What transformers raises for a configuration that nothing can be made of, as `DataError`."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (
        ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, ArithmeticError,
        AssertionError, StrictDataclassError,
    ) as error:  # fmt: skip
        words = " ".join(str(error.__cause__ if isinstance(error, StrictDataclassError) else error).split())
        raise DataError(
            f"{directory}: transformers cannot make a model of its config.json: "
            f"{type(error).__name__}: {words[:300]}",
            hint="compare config.json with the one on the hub",
        ) from error


def configuration_in(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of the base in `directory`, as every model of it is to be made.

    A multimodal one that ties embedding and output layer ties them in its text model too: transformers takes
    only the text part, which often does not say so, and would start with a random output layer.
    """
    configuration = read_transformers(directory, trust_remote_code=trust_remote_code)
    text = configuration.get_text_config()
    if text is not configuration and getattr(configuration, "tie_word_embeddings", False) is True:
        text.tie_word_embeddings = True
    return configuration


def load_without_values(directory: Path, tensors: Stored, *, trust_remote_code: bool = False) -> Loading:
    """Load the checkpoint in `directory`, whose tensors are `tensors`, without their values.

    Raises `DataError` for a configuration that transformers cannot make a model of.
    """
    import torch
    import transformers

    with _refused(directory):
        configuration = configuration_in(directory, trust_remote_code=trust_remote_code)
        kind = transformers.AutoModelForCausalLM._model_mapping.get(type(configuration), None)
        if kind is None:
            return Loading(type(configuration).__name__)  # it runs by code of its own
        if isinstance(kind, tuple):
            kind = kind[0]
        if kind.config_class == configuration.sub_configs.get("text_config"):
            configuration = configuration.get_text_config()
        values = {
            name: torch.empty(spec.shape, dtype=_torch_type(spec.dtype), device="meta")
            for name, spec in tensors.items()
        }
        _, info = kind.from_pretrained(
            None,
            config=configuration,
            state_dict=values,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        unlike = next(_unlike_llama_cpp(configuration), "")
    return Loading(
        kind.__name__,
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(info["unexpected_keys"])),
        tuple(
            sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"])
        ),
        unlike,
    )


# Whether llama.cpp makes the weights of the chosen experts one in sum, where its converter does not write it.
_WEIGHTS_IN_SUM = {
    "lfm2_moe": True, "mellum": True, "olmoe": False, "qwen2_moe": False, "qwen3_moe": True,
    "qwen3_next": True, "qwen3_vl_moe_text": True,
}  # fmt: skip


def _unlike_llama_cpp(configuration: Any) -> Iterator[str]:
    for field in ("hidden_act", "hidden_activation", "activation_function"):
        stated, usual = (getattr(source, field, None) for source in (configuration, type(configuration)()))
        if isinstance(stated, str) and isinstance(usual, str) and _curve(stated) != _curve(usual):
            yield f"{field} is {stated}, the family's is {usual}, which is the one that llama.cpp calculates"
    normalized, usual = (
        getattr(configuration, "norm_topk_prob", None),
        _WEIGHTS_IN_SUM.get(configuration.model_type),
    )
    if usual is not None and normalized is not usual:
        yield (
            f"norm_topk_prob is {json.dumps(normalized)}, and llama.cpp weighs this family's experts as with "
            f"{json.dumps(usual)}"
        )
    rotation = getattr(configuration, "rope_parameters", None) or {}
    for each in [each for each in rotation.values() if isinstance(each, Mapping)] or [rotation]:
        if each.get("rope_type") == "yarn" and each.get("truncate") is False:
            yield "YaRN's truncate is false, and llama.cpp rounds the ends of its range, as with true"


def _curve(activation: str) -> str:
    """Its name without the ways to calculate it, which llama.cpp has one of."""
    return "gelu" if "gelu" in activation else activation.replace("swish", "silu")


def refuse_unlike(loading: Loading, where: str) -> None:
    """Raise `DataError` for a model that llama.cpp would calculate otherwise, whatever its file says."""
    if loading.unlike:
        raise DataError(
            f"{where} cannot become a GGUF: {loading.unlike}",
            hint="compare config.json with the one on the hub; a copy of the base that says what llama.cpp "
            "calculates is trained and served alike; or choose another base, or export: none",
        )


def _torch_type(dtype: str) -> Any:
    import torch

    names = {"F64": "float64", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
    return getattr(torch, names.get(dtype, "float32"))


def refuse_incomplete(loading: Loading, where: str) -> None:
    """Raise `DataError` for tensors that are missing or of another shape than the architecture's.

    transformers would fill them with random numbers and go on.
    """
    problems = [
        Problem(f"the architecture wants {list(wanted)}, the checkpoint has {list(stored)}", name)
        for name, stored, wanted in loading.misshapen
    ]
    if loading.missing and (renamed := _renamed(loading)):
        wanted, stored = renamed
        raise DataError(
            f"{where}: its tensors are not named as {loading.architecture} names them: "
            f"{stored} is there, {wanted} is not",
            hint="rename them, or load it with the tool that wrote it and save it with transformers",
            problems=_named(loading.missing, "missing"),
        )
    problems += _named(loading.missing, "missing")
    if not problems:
        return
    count = len(loading.missing) + len(loading.misshapen)
    names = [*loading.missing, *(name for name, _, _ in loading.misshapen)]
    more = f" and {count - 1} more" if count > 1 else ""
    what = "lacks" if loading.missing else "has another shape of"
    raise DataError(
        f"{where}: the checkpoint {what} {names[0]}{more}, which {loading.architecture} needs",
        hint="copy or download the checkpoint again, or merge and save it again, whole"
        if loading.missing
        else "config.json and the weights are of two models: copy both from one place",
        problems=problems,
    )


def refuse_surplus(loading: Loading, where: str) -> None:
    """Raise `DataError` for tensors that the architecture has no place for."""
    if not loading.surplus:
        return
    heads = sorted({head for name in loading.surplus for head in _HEADS if name.startswith(head)})
    named = f"{heads[0]}*" if heads else loading.surplus[0]
    raise DataError(
        f"{where}: the checkpoint holds {named}, which {loading.architecture} has no place for",
        hint=resave(where),
        problems=_named(loading.surplus, "no place for it"),
    )


def refuse_biases(loading: Loading, stored: Collection[str], where: str) -> None:
    """Raise `DataError` for biases that transformers leaves out, of layers that it has.

    llama.cpp takes whatever biases there are in a file.
    """
    surplus = {*loading.surplus}
    layers = {name.removesuffix(".weight") for name in stored if name not in surplus}
    biases = tuple(sorted(name for name in surplus if name.endswith(".bias") and name[:-5] in layers))
    refuse_surplus(replace(loading, surplus=biases), where)


def resave(where: str) -> str:
    """How to save a checkpoint without what does not belong to it."""
    return (
        f"save it without: AutoModelForCausalLM.from_pretrained({where!r}).save_pretrained(OTHER), "
        "and copy the tokenizer's files beside it"
    )


def _named(names: Collection[str], what: str) -> list[Problem]:
    shown = [Problem(what, name) for name in sorted(names)[:_MOST_NAMED]]
    return [*shown, Problem(f"and {len(names) - len(shown)} more")] if len(names) > len(shown) else shown


def _renamed(loading: Loading) -> tuple[str, str] | None:
    """A missing and a surplus tensor that differ by what stands before their names only."""
    for wanted in loading.missing:
        for stored in loading.surplus:
            short, long = sorted((wanted, stored), key=len)
            if long.endswith(f".{short}") or _tail(wanted) == _tail(stored):
                return wanted, stored
    return None


def _tail(name: str) -> str:
    """The name from its first number on, such as `0.mlp.up_proj.weight`; the whole name without one."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[at:])
