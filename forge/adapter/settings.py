"""What every setting of an adapter_config.json means to forge, as data: supported, harmless or refused.

The table has each field of peft's LoraConfig (0.18 to 0.21, and what older ones wrote), its effect on the
tuned model, and the values that forge can use. A key that is not in it is refused: it may change the model
in a way that nobody here knows. `tests/test_adapter_settings.py` walks the installed peft's fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

MERGE = "merge it with peft's merge_and_unload and ship the result with train: none"
CONVERT = (
    "save it convertibly: model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=START), "
    "START being the adapter as it was before the first step"
)
PARAMETERS = ("gate_up_proj", "down_proj", "weight")
"""What peft may adapt by `target_parameters`: of joined experts the first two, of a router the last."""
Check = Callable[[object], "str | None"]
"""What is wrong with a value ("must be ..." or a whole reason); None for one that can be used."""


@dataclass(frozen=True)
class Setting:
    """One key: what it does, what becomes of it, and which of its values can be used.

    `supported`: it changes the tuned model, and forge does as it says. `harmless`: it changes nothing of an
    adapter that is trained. `refused`: only the values that switch it off can be used.
    """

    verdict: Literal["supported", "harmless", "refused"]
    effect: str
    check: Check
    hint: str = ""


def _typed(words: str, *kinds: type) -> Check:
    """A value of one of `kinds`; a bool is no number. null is what most fields have when unset."""

    def check(value: object) -> str | None:
        fits = value is None or type(value) in kinds
        return None if fits else f"must be {words} (got {_shown(value)})"

    return check


def _unset(reason: str) -> Check:
    """null, false or an empty list; any other value is refused for `reason`. peft takes `{}` for settings."""
    return lambda value: f"{_shown(value)}: {reason}" if value or value == {} else None


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _rank(value: object) -> str | None:
    return None if _is_rank(value) else f"must be a whole number above 0 (got {_shown(value)})"


def _alpha(value: object) -> str | None:
    fits = _is_number(value) and value != 0
    return None if fits else f"must be a number other than 0 (got {_shown(value)})"


def _dropout(value: object) -> str | None:
    fits = _is_number(value) and 0 <= value < 1  # type: ignore[operator]
    return None if fits else f"must be a number from 0 to below 1 (got {_shown(value)}); peft writes 0.0"


def _names(value: object) -> str | None:
    fits = value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    return None if fits else f"must be a list of names (got {_shown(value)})"


def _names_or_pattern(value: object) -> str | None:
    if isinstance(value, str):
        return _regular(value)
    return _names(value) and f"must be a list of names, or a regular expression (got {_shown(value)})"


def _targets(value: object) -> str | None:
    return "names no layer" if value == "" else _names_or_pattern(value)


def _regular(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return None


def _patterns(fits: Callable[[object], bool], words: str) -> Check:
    def check(value: object) -> str | None:
        if not isinstance(value, dict):
            return f"must be an object (got {_shown(value)})"
        wrong = [f"{key} must be {words} (got {_shown(v)})" for key, v in value.items() if not fits(v)]
        return "; ".join([*wrong, *filter(None, map(_regular, value))]) or None

    return check


def _parameters(value: object) -> str | None:
    if _names(value):
        return _names(value)
    assert value is None or isinstance(value, list)
    if strange := [name for name in value or () if name.rpartition(".")[2] not in PARAMETERS]:
        return f"{', '.join(strange)}: forge knows {', '.join(PARAMETERS)} only"
    return None


def _layers(value: object) -> str | None:
    numbers = value if isinstance(value, list) else [value]
    fits = value is None or all(type(number) is int and number >= 0 for number in numbers)
    return None if fits else f"must be a layer's number, or a list of them (got {_shown(value)})"


def _tokens(value: object) -> str | None:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    fits = value is None or all(
        isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids) for ids in lists
    )
    if fits and value is not None and not all(lists):
        return f"{_shown(value)} names no token; peft writes null where it is unset"
    return None if fits else f"must be a list of token ids, or one for each module (got {_shown(value)})"


_TAKEN_OUT = {
    "pissa": "PiSSA took the base's principal part out of its weights",
    "olora": "OLoRA took its start out of the base's weights",
    "corda": "CorDA took its start out of the base's weights",
    "lora_ga": "LoRA-GA took its start out of the base's weights",
    "loftq": "LoftQ put quantized values in the place of the base's weights",
}
_STARTS = ("gaussian", "eva", "orthogonal", "mica")


def _start(value: object) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    name = value.lower() if isinstance(value, str) else ""
    for kind, reason in _TAKEN_OUT.items():
        if name.startswith(kind):
            return f"{_shown(value)}: {reason}, so these factors do not belong to the base as it is"
    return None if name in _STARTS else f"{_shown(value)} is no start that forge knows ({', '.join(_STARTS)})"


def _task(value: object) -> str | None:
    if value in (None, "CAUSAL_LM"):
        return None
    return f"{_shown(value)}: only CAUSAL_LM adapters answer in text that a GGUF can give"


def _mapping(value: object) -> str | None:
    if not isinstance(value, dict):
        return _OBJECT(value)
    library, base_class = str(value.get("parent_library") or ""), str(value.get("base_model_class") or "")
    if "diffusers" in library:
        return f"made for {base_class or 'a diffusion model'} of diffusers, which makes pictures"
    ends = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    return f"made for {base_class}, which writes no text" if base_class.endswith(ends) else None


def _bias(value: object) -> str | None:
    if value in ("all", "lora_only"):
        return f"{_shown(value)}: it trained biases too, which forge does not merge"
    return None if value == "none" else f'must be "none", "all" or "lora_only" (got {_shown(value)})'


_BOOL = _typed("true or false", bool)
_TEXT = _typed("a text", str)
_OBJECT = _typed("an object", dict)
_START = "only read while training starts"

SETTINGS: Mapping[str, Setting] = {
    # What it is and where it is from.
    "peft_type": Setting("supported", "the kind of adapter; read before all others", _TEXT),
    "task_type": Setting("supported", "which of peft's model classes loads it", _task,
        "if the base is a decoder that writes text, set task_type to CAUSAL_LM in adapter_config.json; "
        "classifiers, encoder-decoders and embedding models are served with transformers"),
    "auto_mapping": Setting("harmless", "the class of the base, where no task is set", _mapping,
        "serve it with the library that it was made for"),
    "peft_version": Setting("harmless", "who wrote the file", _TEXT),
    "base_model_name_or_path": Setting("supported", "the base; compared with the recipe's", _TEXT),
    "revision": Setting("supported", "the base's revision; compared with the recipe's", _TEXT),
    "inference_mode": Setting("harmless", "whether the factors are frozen when it is loaded", _BOOL),
    # Which layers have factors: peft's own choice is compared with what the file holds.
    "target_modules": Setting("supported", "the layers that have factors", _targets),
    "exclude_modules": Setting("supported", "layers that have none all the same", _names_or_pattern),
    "layers_to_transform": Setting("supported", "the numbers of the layers that have factors", _layers),
    "layers_pattern": Setting("supported", "what the list of layers is called", _names_or_pattern),
    "target_parameters": Setting("supported", "joined experts and routers that have factors", _parameters,
        MERGE),
    # The size of the change: alpha / r, or alpha / sqrt(r).
    "r": Setting("supported", "the rank", _rank),
    "lora_alpha": Setting("supported", "the numerator of the scale", _alpha),
    "rank_pattern": Setting("supported", "ranks of single layers",
        _patterns(_is_rank, "a whole number above 0")),
    "alpha_pattern": Setting("supported", "alphas of single layers", _patterns(_is_number, "a number")),
    "use_rslora": Setting("supported", "divides alpha by the root of the rank", _BOOL),
    "use_dora": Setting("supported", "gives each row the length that was learned", _BOOL),
    # Beside the factors.
    "modules_to_save": Setting("supported", "modules that are saved whole", _names),
    "trainable_token_indices": Setting("supported", "tokens whose rows were trained", _tokens),
    "ensure_weight_tying": Setting("supported", "keeps embedding and output layer tied", _BOOL),
    "bias": Setting("refused", "biases of the base that were trained", _bias, MERGE),
    "lora_bias": Setting("refused", "a bias on each second factor",
        _unset("each layer got a bias, which forge does not merge"), MERGE),
    # The layer's kind is the base's word: peft overrides this one, with a warning.
    "fan_in_fan_out": Setting("harmless", "whether the base stores W transposed, as it itself says", _BOOL),
    # Of training only.
    "lora_dropout": Setting("harmless", "dropout while training", _dropout),
    "init_lora_weights": Setting("supported", "what the factors started from", _start, CONVERT),
    "loftq_config": Setting("harmless", f"of LoftQ; {_START}", _OBJECT),
    "eva_config": Setting("harmless", f"of EVA; {_START}", _OBJECT),
    "corda_config": Setting("harmless", f"of CorDA; {_START}", _OBJECT),
    "lora_ga_config": Setting("harmless", f"of LoRA-GA; {_START}", _OBJECT),
    "velora_config": Setting("harmless", "of VeLoRA, which changes gradients only", _OBJECT),
    "qalora_group_size": Setting("harmless", "of QA-LoRA; read where use_qalora is set",
        _typed("a whole number", int)),
    "megatron_core": Setting("harmless", "read where megatron_config is set", _TEXT),
    "runtime_config": Setting("harmless", "how it is loaded; peft drops it", _OBJECT),
    # Other functions than W + scale x B A.
    "alora_invocation_tokens": Setting("refused", "switches the adapter on behind certain tokens",
        _unset("an activated LoRA works only behind its invocation tokens; no merge and no GGUF can do that"),
        "serve it with peft or vLLM"),
    "use_qalora": Setting("refused", "pools the input of the factors",
        _unset("QA-LoRA pools the inputs of a GPTQ base, which forge does not merge"),
        "serve it with peft and transformers"),
    "use_bdlora": Setting("refused", "block-diagonal factors",
        _unset("its factors are block-diagonal, which forge does not merge"), MERGE),
    "arrow_config": Setting("refused", "chooses among several adapters, token by token",
        _unset("Arrow chooses adapters token by token; no merge and no GGUF can do that"),
        "ship one of its adapters by itself"),
    "kasa_config": Setting("refused", "cuts the base's weights and puts singular values between the factors",
        _unset("KaSA changed the base's weights too, which forge does not do"), MERGE),
    "monteclora_config": Setting("refused", "adds samples to the factors",
        _unset("MonteCLoRA samples its factors, which forge does not merge"), MERGE),
    "megatron_config": Setting("refused", "factors of layers that are split over several devices",
        _unset("its layers are those of Megatron, which are named and split otherwise"),
        "convert base and adapter to the transformers layout first"),
    "layer_replication": Setting("refused", "repeats layers of the base",
        _unset("it stacks layers of the base anew, so the tuned model has other layers than the base"),
        "merge it with peft's merge_and_unload, set num_hidden_layers in config.json, and ship that with "
        "train: none"),
    # peft of early 2023.
    "enable_lora": Setting("refused", "factors for parts of a fused layer",
        _unset("factors for parts of a fused layer have no meaning in today's peft"), MERGE),
    "merge_weights": Setting("harmless", "how it was loaded", _BOOL),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A setting that cannot be used, why, and what to do."""

    field: str
    message: str
    hint: str = ""


def faults(configuration: Mapping[str, object]) -> Iterator[Fault]:
    """Every setting of `configuration` that forge does not know, cannot use or does not support."""
    version = configuration.get("peft_version")
    writer = f" (written by peft {version})" if isinstance(version, str) else ""
    for field, value in configuration.items():
        if (setting := SETTINGS.get(field)) is None:
            yield Fault(
                field,
                f"forge does not know this setting{writer}, so not what it does to the model",
                "if it is of another tool and changes nothing, take it out of adapter_config.json; "
                f"else {MERGE}",
            )
        elif message := setting.check(value):
            yield Fault(field, message, setting.hint)
    for field in ("r", "lora_alpha"):
        if field not in configuration:
            yield Fault(field, "is missing: the scale is made from it")
    yield from _contradictions(configuration)


def _contradictions(configuration: Mapping[str, object]) -> Iterator[Fault]:
    """What peft refuses to load: settings that are only meant together, or never."""
    if configuration.get("target_modules") == [] and not configuration.get("target_parameters"):
        yield Fault("target_modules", "names no layer")
    if configuration.get("target_parameters"):
        for field in ("lora_dropout", "use_dora", "fan_in_fan_out"):
            if configuration.get(field):
                yield Fault(field, "has no meaning with target_parameters: peft loads no such adapter")
    numbered = configuration.get("layers_to_transform") is not None
    pattern = configuration.get("layers_pattern")
    if numbered and isinstance(configuration.get("target_modules"), str):
        yield Fault("layers_to_transform", "has no meaning where target_modules is a regular expression")
    if pattern and not numbered:
        yield Fault("layers_pattern", "has no meaning without layers_to_transform")
