"""The adapter on its base: which modules, how it starts, what is trained whole. Runs in a worker.

An initialisation that moves part of the base into the factors (PiSSA, OLoRA) is kept as it was at the
start, so that `save` can subtract it: the adapter that is saved fits the base as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from forge.adapter.experts import JOINED
from forge.errors import DataError
from forge.recipe.training import Lora, Train

_HEAD = "lm_head"
# What peft.utils.constants.EMBEDDING_LAYER_NAMES has.
_PEFT_TIES = {"embed_tokens", _HEAD}
# peft's word for a configuration that is to adapt no layer.
_NO_TARGETS = "dummy-target-modules"
_INITIAL = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
# Of the initialisations that peft knows, those after which the base is as it was.
_LEAVE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
_NUMBER = re.compile(r"\.(\d+)\.")
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention)(\.|$)")


def with_lora(model: Any, lora: Lora, *, quantized: bool, checkpointing: bool) -> Any:
    """The model with fresh LoRA layers in float32, everything else frozen.

    An embedding that the base ties to its output layer stays tied when it is trained whole.
    Raises `DataError` when the target names match no layer, listing what there is, or when such an
    embedding is to get factors of its own.
    """
    import peft

    tied = _tied_names(model)
    _refuse_factors(lora.targets, tied)
    _refuse_tied_rows(lora.token_indices, tied)
    _refuse_absent_layers(model, lora.layers)
    whole = _trained_whole(lora.modules_to_save, tied)
    if quantized:
        model = _prepared(model, checkpointing)
    configuration = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets_of(model, lora.targets, lora.layers),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=_INITIAL.get(lora.init, lora.init),
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        target_parameters=[f"experts.{name}" for name in JOINED] if lora.experts else None,
        layers_to_transform=list(lora.layers) or None,
        trainable_token_indices=list(lora.token_indices) or None,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(tied) and _HEAD in whole,
        task_type="CAUSAL_LM",
    )
    try:
        made = peft.get_peft_model(model, configuration)
    except (ValueError, TypeError) as error:
        names = linear_names(model)
        raise DataError(
            f"train.lora.targets: {error}", hint=f"the linear layers are {', '.join(names)}"
        ) from error
    if lora.experts and not any(hasattr(module, "parameter_name") for module in made.modules()):
        raise DataError(
            "train.lora.experts: peft adapts joined experts, and transformers does not join these",
            hint="leave it out; attention can be adapted",
        )
    _refuse_idle(made, lora)
    return made


def balance_experts(model: Any, train: Train) -> None:
    """Add the loss for the balance of a mixture's experts where its routers are trained, else none.

    trl adds it to the loss of every family that knows it, whatever the configuration says, and reads the
    number of the experts by one name alone, which Granite's lacks.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    saved = train.lora.modules_to_save
    has_routers = train.method == "full" or any(
        name.rpartition(".")[2] in ("gate", "router") for name in saved
    )
    if experts and has_routers:
        config.num_experts = experts
    else:
        config.output_router_logits, config.router_aux_loss_coef = False, 0.0


def continued(model: Any, adapter: Path, *, quantized: bool, checkpointing: bool) -> Any:
    """The model with the adapter in the directory `adapter`, to be trained further in its own shape.

    Raises `DataError` where the adapter does not fit the base, or leaves a factor without weights.
    """
    import peft
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    configuration = peft.PeftConfig.from_pretrained(str(adapter))
    if not isinstance(configuration, peft.LoraConfig):
        raise DataError(f"train.continue_from: {adapter} is not a LoRA adapter")
    if configuration.init_lora_weights not in _LEAVE_BASE:
        raise DataError(
            f"train.continue_from: the adapter began as {configuration.init_lora_weights}, which moves the "
            "base's weights",
            hint="save it converted first (peft's path_initial_model_for_weight_conversion)",
        )
    configuration.init_lora_weights = True
    configuration.inference_mode = False
    configuration.base_model_name_or_path = model.name_or_path
    if quantized:
        model = _prepared(model, checkpointing)
    try:
        made = peft.get_peft_model(model, configuration)
        weights = load_peft_weights(str(adapter), device="cpu")
        set_peft_model_state_dict(made, weights)
    except (ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"train.continue_from: the adapter does not fit this base: {str(error).splitlines()[0]}",
            hint="name the base that the adapter was trained on",
        ) from error
    # peft reports neither what an adapter lacks nor all that a base has no place for.
    if wrong := sorted(weights.keys() ^ get_peft_model_state_dict(made).keys()):
        raise DataError(
            f"train.continue_from: {len(wrong)} tensors do not fit adapter and base: {wrong[0]}",
            hint="name the base that the adapter was trained on; forge validate says what the adapter has",
        )
    return made


def _prepared(model: Any, checkpointing: bool) -> Any:
    import peft

    return peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def add_rows(model: Any, rows: int) -> None:
    """Give embedding and output layer `rows` rows; those that are new start as the mean of the others.

    peft trains and saves both whole where they are in modules_to_save.
    """
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = layer.weight
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


def keep_initial(model: Any, directory: Path) -> None:
    """Save the factors as they are now, which is what is subtracted when the adapter is saved."""
    configuration = model.peft_config["default"]
    initial, configuration.init_lora_weights = configuration.init_lora_weights, True
    model.save_pretrained(str(directory))
    configuration.init_lora_weights = initial


def adapted_modules(model: Any) -> Sequence[str]:
    """The full names of the layers and the parameters that carry factors."""
    return sorted(
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}"
        if hasattr(module, "parameter_name")
        else name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and (module.lora_A or module.lora_embedding_A)
    )


def targets_of(model: Any, targets: str | Sequence[str], layers: Sequence[int]) -> str | list[str]:
    """As peft takes them; `attention` becomes names with their parent (`self_attn.q_proj`).

    A list always where `layers` are chosen by number, which is what peft wants. Beside a vision or an audio
    tower it is whole names in the language model: text moves no other factors.
    """
    if inner := _language_model(model):
        names = _inner_targets(model, targets, inner)
        # peft does not ask for the number of a module that is named in whole.
        wanted = {str(number) for number in layers}
        return [name for name in names if not wanted or wanted.intersection(_NUMBER.findall(name)[:1])]
    if layers and isinstance(targets, str) and targets != "attention":
        head = model.get_output_embeddings()
        linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
        if targets not in ("auto", "all-linear"):
            linear = [name for name in linear if re.fullmatch(targets, name)]
        return sorted({".".join(name.split(".")[-2:]) for name in linear})
    if targets in ("auto", "all-linear"):
        return "all-linear"
    if targets == "attention":
        of_attention = {
            ".".join(name.split(".")[-2:])
            for name, module in model.named_modules()
            if _is_linear(module) and _ATTENTION.search(name.rpartition(".")[0])
        }
        if not of_attention:
            raise DataError(
                "train.lora.targets: attention: no linear layer of this base is in a module of attention",
                hint=f"name them; the linear layers are {', '.join(linear_names(model))}",
            )
        return sorted(of_attention)
    return targets if isinstance(targets, str) else list(targets)


def _language_model(model: Any) -> str:
    """The name of the language model in a model with other towers; empty where there is no other."""
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    if all(
        id(module) in inside or module is head for _, module in model.named_modules() if _is_linear(module)
    ):
        return ""
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(decoder)]


def _inner_targets(model: Any, targets: str | Sequence[str], inner: str) -> list[str]:
    """The whole names of the layers in the language model `inner` that `targets` means."""
    head = model.get_output_embeddings()
    modules = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    if targets == "attention":
        fits = [name for name in modules if _ATTENTION.search(name.rpartition(".")[0])]
    elif isinstance(targets, str):
        fits = [name for name in modules if targets in ("auto", "all-linear") or re.fullmatch(targets, name)]
    else:
        fits = [name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets)]
    inside = [name for name in fits if name.startswith(f"{inner}.")]
    if not inside:
        raise DataError(
            f"train.lora.targets: fits no linear layer of the language model ({inner})",
            hint=f"its layers are {', '.join(sorted({_last(name) for name in modules if inner in name}))}; "
            "rows of text move no other factors",
        )
    return sorted(inside)


def _refuse_idle(model: Any, lora: Lora) -> None:
    """A pattern that changes nothing is a mistake."""
    modules = adapted_modules(model)
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        idle = [
            pattern
            for pattern in patterns
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules)
        ]
        if idle:
            raise DataError(
                f"train.lora.{field}: {', '.join(idle)} fits no adapted module",
                hint=f"the adapted modules are {', '.join(sorted({_last(name) for name in modules}))}",
            )


def _refuse_absent_layers(model: Any, numbers: Sequence[int]) -> None:
    count: int = model.config.get_text_config().num_hidden_layers
    if absent := sorted(number for number in set(numbers) if number >= count):
        raise DataError(
            f"train.lora.layers: the base has no layer {', '.join(map(str, absent))}",
            hint=f"its layers are 0 to {count - 1}",
        )


def _refuse_tied_rows(indices: Sequence[int], tied: Collection[str]) -> None:
    """trl reads the output layer's weight by itself, and peft's wrapper of rows hides it there."""
    if indices and tied:
        raise DataError(
            "train.lora.token_indices: the base ties its output layer to the embedding",
            hint="name embed_tokens in train.lora.modules_to_save, which trains the two as one",
        )


def _tied_names(model: Any) -> Collection[str]:
    """Where the embedding and the output layer are, where the base has one tensor for both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return ()  # whatever the configuration says
    tied = {id(embedding), id(head)}
    return {name for name, module in model.named_modules() if id(module) in tied}


def _refuse_factors(targets: str | Sequence[str], tied: Collection[str]) -> None:
    """Factors would move only one of two tied tensors: some families have no place for a second."""
    if isinstance(targets, str):
        wrong = [name for name in tied if re.fullmatch(targets, name)]
    else:
        wrong = [name for name in targets if any(f".{module}".endswith(f".{name}") for module in tied)]
    if wrong:
        raise DataError(
            f"train.lora.targets: {', '.join(sorted(wrong))}: the base ties its output layer to the "
            "embedding",
            hint="name it in train.lora.modules_to_save, where the two are trained as one, or leave it out",
        )


def _trained_whole(named: Sequence[str], tied: Collection[str]) -> list[str]:
    """The modules to save, the output layer for an embedding that is tied to it: peft then ties both.

    peft matches the end of a name, and ties an embedding of no other name.
    """
    others = [name for name in named if not any(module.endswith(name) for module in tied)]
    if len(others) == len(named):
        return list(named)
    if not {_last(module) for module in tied} <= _PEFT_TIES:
        raise DataError(
            "train.lora.modules_to_save: the base ties its output layer to the embedding, and peft would "
            f"train them apart: it knows {' and '.join(sorted(_PEFT_TIES))}, "
            f"these are {', '.join(sorted(tied))}",
            hint="leave both out",
        )
    return [*others, _HEAD]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def linear_names(model: Any) -> Sequence[str]:
    """Short names of the layers that LoRA can adapt."""
    return sorted({_last(name) for name, module in model.named_modules() if _is_linear(module)})


def trainable_to_float32(model: Any) -> None:
    """Keep adapter weights in float32 whatever the trainer made of them.

    trl casts the adapters of a quantized base to bfloat16, but a resumed run reloads them as
    float32: the two would differ. float32 from the start makes resuming exact.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def whole_model(model: Any) -> Any:
    """Every weight of the model trained, as an adapter without factors: modules saved whole.

    So what comes out of full fine-tuning is validated, compared with its base and merged as every
    adapter is. The base stays in memory beside it.
    """
    import peft

    tied = _tied_names(model)
    names = {_last(name) for name, module in model.named_modules() if any(True for _ in _own(module))}
    whole = _trained_whole(sorted(names), tied)
    configuration = peft.LoraConfig(
        target_modules=_NO_TARGETS,
        modules_to_save=whole,
        ensure_weight_tying=bool(tied) and _HEAD in whole,
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(model, configuration)
    frozen = [
        name
        for name, parameter in made.named_parameters()
        if not parameter.requires_grad and ".original_module." not in name
    ]
    if frozen:
        raise DataError(
            f"train.method: full: peft cannot train {len(frozen)} tensors of this family whole: {frozen[0]}",
            hint="take train.method: lora",
        )
    return made


def _own(module: Any) -> Any:
    return module.parameters(recurse=False)
