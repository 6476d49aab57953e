"""A LoRA adapter on disk, whoever made it: its layers, their true scale, what may be done with it.

Reads `adapter_config.json` and the header of `adapter_model.safetensors`; no torch. Sources: peft's
`tuners/lora` (scale alpha / r, or alpha / sqrt(r) with rsLoRA; `rank_pattern` and `alpha_pattern`
matched as peft's `get_pattern_key` does) and `utils/save_and_load` (tensor names).

Not covered: other kinds of adapter (prefix, IA3, prompt tuning ...), which have no GGUF form, and what
`settings` says is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.adapter.directory import CONFIG_FILE, WEIGHTS_FILE, without_settings, without_weights
from forge.adapter.experts import JOINED, is_of_expert, parameters
from forge.adapter.names import factor, whole
from forge.adapter.settings import MERGE, faults
from forge.errors import DataError, Problem
from forge.model.safetensors_header import TensorSpec, is_copy, read_header

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""What families call the embedding of tokens."""
_AGAIN = "copy the adapter again, or save it again with peft's save_pretrained"
# What peft keeps of the base's beside what was trained.
_ORIGINALS = (".original_module.", ".trainable_tokens_original", ".token_indices")
_ROWS = ".trainable_tokens_delta"
# A name with one of these inside another prefix is a wrapper's, which peft loads nothing of.
_OUTER = ("model.", "transformer.", "gpt_neox.", "backbone.")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Kinds of peft's that put vectors before the prompt, or choose among adapters: there is nothing to merge.
_PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
    "CARTRIDGE", "POLY", "XLORA",
)  # fmt: skip


@dataclass(frozen=True)
class LoraLayer:
    """One adapted module: delta of its weight = scale x B A.

    `a` has shape (rank, in), `b` (out, rank); of an embedding A is (rank, vocabulary) and B
    (hidden, rank). Of joined `experts` there is a pair of factors for each, and `module` is the parameter:
    A has one expert behind the other, (experts x rank, in), B the experts' columns of one rank side by
    side, (out, rank x experts). `is_parameter`: `target_parameters` names it.
    """

    module: str
    a: TensorSpec
    b: TensorSpec
    scale: float
    is_embedding: bool
    magnitude: TensorSpec | None
    is_parameter: bool = False
    experts: int | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0] // (self.experts or 1)


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that were trained alone (`trainable_token_indices`): (tokens, hidden)."""

    tokens: tuple[int, ...]
    values: TensorSpec


@dataclass(frozen=True)
class Adapter:
    """`layers` by module name; `replaced` holds whole tensors (modules_to_save) by tensor name.

    `rows` holds tokens' own rows by tensor name; they go over what is replaced.
    """

    directory: Path
    configuration: Mapping[str, Any]
    layers: Mapping[str, LoraLayer]
    replaced: Mapping[str, TensorSpec]
    rows: Mapping[str, TokenRows]

    @property
    def base_name(self) -> str:
        return str(self.configuration.get("base_model_name_or_path") or "")

    @property
    def impurities(self) -> tuple[str, ...]:
        """Why it has no adapter-only GGUF form over any base; empty when it is pure (D13, pitfall 52)."""
        reasons = []
        if self.replaced:
            reasons.append("it carries whole tensors: " + ", ".join(sorted(self.replaced)))
        if self.rows:
            reasons.append("it carries rows of tokens: " + ", ".join(sorted(self.rows)))
        if any(layer.magnitude for layer in self.layers.values()):
            reasons.append("DoRA magnitudes have no place in a GGUF adapter")
        if any(layer.is_embedding for layer in self.layers.values()):
            reasons.append("it adapts the embedding")
        if experts := next(
            (n for n, layer in self.layers.items() if layer.is_parameter or is_of_expert(n)), ""
        ):
            reasons.append(f"it adapts experts or routers, which a GGUF adapter has no place for: {experts}")
        return tuple(reasons)


def read_adapter(directory: Path) -> Adapter:
    """Read and check an adapter's directory.

    Raises `DataError` when it is not a LoRA adapter that forge can use, with every reason.
    """
    configuration = _configuration(directory)
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        raise without_weights(directory)
    tensors = read_header(weights)
    layers, kept = _sort_tensors(tensors, configuration)
    _require_adapted(configuration, [name for name, layer in layers.items() if not layer.is_parameter])
    trained = {name.removesuffix(_ROWS): spec for name, spec in kept.items() if name.endswith(_ROWS)}
    rows = {f"{name}.weight": _token_rows(name, spec, configuration) for name, spec in trained.items()}
    replaced = {name: spec for name, spec in kept.items() if not name.endswith(_ROWS)}
    _require_what_is_named(configuration, replaced, rows)
    if not layers and not replaced and not rows:
        raise DataError(f"{weights} holds no tensor of a LoRA adapter", hint="is it the right directory?")
    return Adapter(directory, configuration, layers, replaced, rows)


def _require_what_is_named(
    configuration: Mapping[str, Any], replaced: Mapping[str, TensorSpec], rows: Mapping[str, TokenRows]
) -> None:
    """What the settings say was saved whole, or token by token, is in the file.

    A state dict that was gathered without these parts loads nowhere, or as if they had not been trained.
    """
    tied = configuration.get("ensure_weight_tying") is True
    for named in configuration.get("modules_to_save") or ():
        if not tied and not any(f"{named}." in name for name in replaced):
            raise DataError(
                f"modules_to_save names {named}, and the file has no tensor of it: it was not saved whole",
                hint=_AGAIN,
            )
    if configuration.get("trainable_token_indices") and not rows:
        raise DataError(
            "trainable_token_indices names tokens, and the file has no rows of them: it was not saved whole",
            hint=_AGAIN,
        )


def _require_adapted(configuration: Mapping[str, Any], layers: Collection[str]) -> None:
    """Every layer with factors is one that the settings adapt: peft leaves the others out without a word.

    What the settings adapt beyond these is compared with peft's own choice by `validate`.
    """
    targets = configuration.get("target_modules")
    if targets in (None, "all-linear") or configuration.get("ensure_weight_tying"):
        return
    left_out = configuration.get("exclude_modules") or ()

    def is_adapted(module: str) -> bool:
        fits = _is_named(module, targets) and not _is_named(module, left_out)
        return fits and _has_number(module, configuration)

    # Other tools' files leave out the outer part of the name.
    odd = [module for module in layers if not is_adapted(module) and not is_adapted(f"model.{module}")]
    if odd:
        raise DataError(
            f"{len(odd)} of the {len(layers)} layers with factors are not adapted by adapter_config.json: "
            "peft would leave them out",
            hint=f"take the adapter_config.json of this training; else {_AGAIN}",
            problems=[Problem("has factors, the configuration does not adapt it", name) for name in odd[:8]],
        )


def _is_named(module: str, named: str | Collection[str]) -> bool:
    """As peft matches: a regular expression on the whole name, or a name by its end."""
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module == suffix or module.endswith(f".{suffix}") for suffix in named)


def _has_number(module: str, configuration: Mapping[str, Any]) -> bool:
    """Whether the layer's number is among `layers_to_transform`, where there are any."""
    numbers = configuration.get("layers_to_transform")
    if numbers is None or numbers == []:
        return True
    patterns = configuration.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf".*\.{pattern}\.(\d+)\.", module):
            return int(match.group(1)) in (numbers if isinstance(numbers, list) else [numbers])
    return False


def _token_rows(module: str, values: TensorSpec, configuration: Mapping[str, Any]) -> TokenRows:
    """`values` with the tokens that the configuration names: one list for all, or one by module."""
    named = configuration.get("trainable_token_indices")
    if isinstance(named, dict):
        fits = [value for key, value in named.items() if module.endswith(key)]
        # Of tied modules one may be named for both.
        named = next(iter(fits or named.values()), None) if fits or len(named) == 1 else None
    if not isinstance(named, list) or any(type(token) is not int or token < 0 for token in named):
        raise DataError(f"{module}: the configuration does not say whose rows it trained", hint=_AGAIN)
    if len(named) != values.shape[0]:
        raise DataError(
            f"{module}: the configuration names {len(named)} tokens, the file holds {values.shape[0]} rows",
            hint=_AGAIN,
        )
    return TokenRows(tuple(named), values)


def _configuration(directory: Path) -> Mapping[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise without_settings(directory)
    try:
        configuration: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))  # as peft does
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}", hint=_AGAIN) from error
    if not isinstance(configuration, dict):
        raise DataError(f"{path} is not an object with settings", hint=_AGAIN)
    kind = configuration.get("peft_type")
    if kind is None:
        is_mlx = bool({"fine_tune_type", "lora_parameters"} & configuration.keys())
        made_by = "MLX's (adapters.safetensors)" if is_mlx else "not peft's"
        tool = f"mlx_lm.fuse --adapter-path {directory}" if is_mlx else "the tool that made it"
        raise DataError(
            f"{directory} is no adapter for peft: its settings name no peft_type; they are {made_by}",
            hint=f"fuse it with {tool} and ship the result with train: none",
        )
    if kind != "LORA":
        raise DataError(
            f"{directory} is no LoRA adapter: its peft_type is {kind}; forge merges LoRA only",
            hint="it has no merged form: serve it with peft and transformers, or train a LoRA"
            if kind in _PROMPTS
            else MERGE,
        )
    problems = [Problem(fault.message, fault.field, str(path)) for fault in faults(configuration)]
    if problems:
        count = "1 setting" if len(problems) == 1 else f"{len(problems)} settings"
        hints = dict.fromkeys(fault.hint or _AGAIN for fault in faults(configuration))
        raise DataError(f"{path}: {count} cannot be used", hint="; ".join(hints), problems=problems)
    return configuration


def _sort_tensors(
    tensors: Mapping[str, TensorSpec], configuration: Mapping[str, Any]
) -> tuple[dict[str, LoraLayer], dict[str, TensorSpec]]:
    parts: dict[str, dict[str, TensorSpec]] = {}
    replaced: dict[str, TensorSpec] = {}
    embeddings: set[str] = set()
    owners: set[str] = set()
    twice: list[Problem] = []

    def put(into: dict[str, TensorSpec], part: str, spec: TensorSpec) -> None:
        # Of a module that is trained whole, peft may write an embedding twice.
        if (other := into.get(part)) and not is_copy(other, spec):
            twice.append(Problem(f"stands for the same as {other.name}", spec.name))
        into[part] = spec

    for name, spec in tensors.items():
        if owned := factor(name):
            module, part, owner = owned
            owners.add(owner)
            if part == "rows":
                put(replaced, module + _ROWS, spec)
                continue
            put(parts.setdefault(module, {}), part.removeprefix("embedding "), spec)
            if part.startswith("embedding"):
                embeddings.add(module)
        elif not any(original in name for original in _ORIGINALS):
            put(replaced, whole(name), spec)
    if strange := sorted(name for name in replaced if "lora" in name.lower()):
        raise DataError(
            f"the file has tensors of LoRA that peft does not write, such as {strange[0]}",
            hint="merge it with the tool that made it and ship the result with train: none",
        )
    if len(owners) > 1:
        names = ", ".join(sorted(owner or "no name" for owner in owners))
        raise DataError(f"the file holds several adapters ({names})", hint="save one of them by itself")
    if twice:
        raise DataError(
            f"{len(twice)} of the file's tensors are there twice, under two names and with other values",
            hint="save the adapter again with peft's save_pretrained, which writes each once",
            problems=twice[:8],
        )
    for module, own in parts.items():
        if odd := next((spec for spec in own.values() if spec.dtype not in _FLOATS), None):
            raise DataError(
                f"{odd.name} is {odd.dtype}: factors are floating-point numbers of at least 16 bits",
                hint="save the adapter as it was trained, before it was quantized",
            )
        if shapes := [
            spec.shape for part, spec in own.items() if part in ("A", "B") and len(spec.shape) != 2
        ]:
            raise DataError(
                f"{module}: a factor has the shape {shapes[0]}; forge merges factors of linear layers only",
                hint=MERGE,
            )
    of_parameters = parameters(parts, configuration)
    _check_lengths(parts, bool(configuration.get("use_dora")))
    incomplete = sorted(module for module, factors in parts.items() if not {"A", "B"} <= factors.keys())
    if incomplete:
        raise DataError(f"the adapter has only one LoRA factor for {', '.join(incomplete)}", hint=_AGAIN)
    layers = {}
    for module, own in parts.items():
        if module not in of_parameters.values():
            scale = scale_of(module, own["A"].shape[0], configuration)
            layers[module] = LoraLayer(
                module, own["A"], own["B"], scale, module in embeddings, own.get("magnitude")
            )
    _refuse_apart(layers, configuration)
    for parameter, module in of_parameters.items():
        layer = _of_parameter(parameter, parts[module]["A"], parts[module]["B"], configuration)
        layers[layer.module] = layer
    return layers, replaced


def _refuse_apart(layers: Mapping[str, LoraLayer], configuration: Mapping[str, Any]) -> None:
    """Factors of each expert apart (transformers 4), whose scale peft changes as it joins them."""
    plain = float(configuration["lora_alpha"]) / configuration["r"]
    changed = [name for name, layer in layers.items() if is_of_expert(name) and layer.scale != plain]
    if changed:
        raise DataError(
            f"{changed[0]} and {len(changed) - 1} others are of experts apart, with rsLoRA or a pattern of "
            "ranks or alphas: peft would join them at another scale than they were trained at",
            hint="merge it with the transformers 4 and peft that it was trained with, and ship that with "
            "train: none",
        )


def _of_parameter(name: str, a: TensorSpec, b: TensorSpec, configuration: Mapping[str, Any]) -> LoraLayer:
    """The factors of the parameter `name`: of all its experts, or of the one matrix that a router has."""
    module, _, own = name.rpartition(".")
    if own not in JOINED:
        return LoraLayer(
            module, a, b, scale_of(name, a.shape[0], configuration), False, None, is_parameter=True
        )
    rank = _by_pattern(name, configuration.get("rank_pattern") or {}, configuration.get("r"))
    experts, rest = divmod(a.shape[0], rank)
    scale = scale_of(name, rank if not rest else a.shape[0], configuration)
    return LoraLayer(name, a, b, scale, False, None, is_parameter=True, experts=experts)


def _check_lengths(parts: Mapping[str, Mapping[str, TensorSpec]], dora: bool) -> None:
    """The file has learned lengths where the settings say DoRA, and nowhere else."""
    odd = sorted(module for module, own in parts.items() if ("magnitude" in own) is not dora)
    if odd and dora:
        raise DataError(f"use_dora is set, and {len(odd)} layers have no magnitude: {odd[0]}", hint=_AGAIN)
    if odd:
        raise DataError(
            f"{len(odd)} layers have the magnitudes of DoRA, such as {odd[0]}, but use_dora is not set",
            hint=f"set use_dora: true in adapter_config.json if it was trained so; else {_AGAIN}",
        )


def scale_of(module: str, rank: int, configuration: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA; alpha from the pattern that fits the module.

    `rank` is what the file holds. Raises `DataError` when the configuration says otherwise.
    """
    configured = _by_pattern(module, configuration.get("rank_pattern") or {}, configuration.get("r"))
    if configured != rank:
        raise DataError(
            f"{module}: the configuration says rank {configured}, the file holds rank {rank}", hint=_AGAIN
        )
    alpha = _by_pattern(module, configuration.get("alpha_pattern") or {}, configuration.get("lora_alpha"))
    return float(alpha) / (math.sqrt(rank) if configuration.get("use_rslora") else rank)


def _by_pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def find_base_tensor(name: str, base: Mapping[str, Any]) -> str | None:
    """The checkpoint's name for a module's tensor.

    Checkpoints may lack the outer prefix (GPT-2), adapters may too; the text model of a multimodal base has
    had its part of the name before and behind `model.`.
    """
    _, part, rest = name.partition("language_model.")
    inner = name.partition(".")[2]
    outer = [] if part or inner.startswith(_OUTER) else [inner]
    candidates = [name, *outer, f"model.{name}"]
    if part:
        rest = rest.removeprefix("model.")
        candidates += [
            f"language_model.model.{rest}",
            f"model.language_model.{rest}",
            f"language_model.{rest}",
        ]
    return next((candidate for candidate in candidates if candidate in base), None)
