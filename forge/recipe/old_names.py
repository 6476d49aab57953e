"""Names that other tools and older releases use, and what they are called here.

Covered: the arguments of transformers, trl, peft and bitsandbytes (today's and the ones they
dropped), and the usual keys of axolotl, unsloth and LLaMA-Factory. A name with a counterpart is
accepted and reported; one without is a problem that says why. A name is looked up only where it is
not a field of this schema, so no field is ever shadowed.

Not covered: whole configuration files of these tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.errors import Problem
from forge.recipe.explain import shown
from forge.recipe.fields import names_in, sections
from forge.recipe.tree import Node, Position
from forge.recipe.words import OUT_OF_SCOPE

DROP = object()
"""Stands for "this value says what is the case anyway": the key is left out with a warning."""


class _Whatever(dict[Any, Any]):
    """Values of which each says what is the case anyway."""

    def __missing__(self, value: Any) -> object:
        return DROP


@dataclass(frozen=True)
class Old:
    """What became of a name: its new dotted name, or none and why."""

    new: str = ""
    why: str = ""
    values: Mapping[Any, Any] | None = None


def _all(new: str, *names: str) -> dict[str, Old]:
    return {name: Old(new) for name in names}


def _gone(why: str, *names: str) -> dict[str, Old]:
    return {name: Old(why=why) for name in names}


def _switch(new: str, when_true: Any, when_false: Any, *names: str) -> dict[str, Old]:
    return {name: Old(new, values={True: when_true, False: when_false}) for name in names}


_DTYPES = {
    **{name: name for name in ("auto", "bf16", "fp16", "fp32")},
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}

_INITIAL: Mapping[Any, Any] = {
    True: "default",
    **{
        name: name for name in ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16")
    },
}

OLD_NAMES: Mapping[str, Old] = {
    # Whole sections.
    **_all("base", "base_model", "base_model_name_or_path", "model_id"),
    **_all("base", "model_name", "model_name_or_path", "pretrained_model_name_or_path"),
    **_all("base.revision", "base_model_revision", "model_revision", "revision_of_model"),
    **_all("base.trust_remote_code", "trust_remote_code"),
    **_all("train", "training", "training_args", "training_arguments", "trainer"),
    **_all("train.lora", "peft", "peft_config", "lora_config", "adapter_config", "lora"),
    **_all("train.from", "adapter_name_or_path", "lora_model_dir", "adapter_path"),
    **_all("name", "run_name", "hub_model_id", "model_alias"),
    **_all("smoke", "smoke_queries", "smoke_tests", "probes"),
    # Data.
    **_all("data.source", "dataset", "dataset_name", "dataset_path", "data_path", "data_files", "train_file"),
    **_all("data.split", "dataset_split", "train_split"),
    **_all("data.format", "dataset_format", "template_format"),
    **_all("data.columns.text", "dataset_text_field", "text_column", "text_field"),
    **_all("data.columns.prompt", "prompt_column", "input_column", "field_instruction"),
    **_all("data.columns.completion", "completion_column", "output_column", "field_output"),
    **_all("data.columns.messages", "messages_column", "field_messages"),
    **_all("data.columns.system", "system_column", "field_system"),
    **_all(
        "data.eval",
        "val_set_size",
        "val_size",
        "test_size",
        "train_test_split",
        "validation_split",
        "eval_split",
        "holdout",
    ),
    **_all("data.eval", "eval_file", "validation_file", "eval_source", "eval_dataset"),
    **_all("data.limit", "max_samples", "max_train_samples", "num_samples"),
    **_all("data.seed", "data_seed", "split_seed"),
    # Training.
    **_all("train.epochs", "num_train_epochs", "num_epochs", "n_epochs", "epoch"),
    **_all("train.learning_rate", "lr"),
    **_all("train.schedule", "lr_scheduler_type", "lr_scheduler", "scheduler"),
    **_all("train.warmup_fraction", "warmup_ratio"),
    **_all("train.batch_size", "per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
    **_all("train.batch_size", "per_gpu_train_batch_size"),
    **_all("train.gradient_accumulation", "gradient_accumulation_steps", "grad_accumulation_steps"),
    **_all("train.max_length", "max_seq_length", "max_seq_len", "sequence_len", "sequence_length"),
    **_all("train.max_length", "cutoff_len", "model_max_length", "max_tokens_per_row", "block_size"),
    **_all("train.optimizer", "optim"),
    **_all("train.max_gradient_norm", "max_grad_norm"),
    **_all("train.gradient_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"),
    **_all("train.gradient_checkpointing", "grad_checkpoint", "enable_activation_checkpointing"),
    **_all("train.packing", "sample_packing", "neat_packing"),
    **_all("train.beta", "pref_beta", "dpo_beta", "rl_beta"),
    **_all("train.max_steps", "iters"),
    **_all("train.continue_from", "resume_adapter_file"),
    **_all("train.lora.rank_pattern", "lora_rank_pattern"),
    **_all("train.lora.alpha_pattern", "lora_alpha_pattern"),
    **_all("train.template_variables", "chat_template_kwargs"),
    **_all("train.seed", "random_state", "random_seed"),
    **_all("train.lora.r", "lora_r", "lora_rank", "rank"),
    **_all("train.lora.alpha", "lora_alpha"),
    **_all("train.lora.dropout", "lora_dropout"),
    **_all("train.lora.targets", "target_modules", "lora_target_modules", "lora_target"),
    **_all("train.lora.rslora", "use_rslora", "peft_use_rslora"),
    **_all("train.lora.dora", "use_dora", "peft_use_dora"),
    **_all("train.lora.modules_to_save", "lora_modules_to_save", "additional_target"),
    **{name: Old("train.dtype", values=_DTYPES) for name in ("torch_dtype", "bnb_4bit_compute_dtype")},
    **_switch("train.lora.targets", "all-linear", DROP, "lora_target_linear"),
    **_switch("train.method", "qlora", "lora", "load_in_4bit"),
    **_switch("train.method", "int8", DROP, "load_in_8bit"),
    **_switch(
        "train.attention",
        "flash_attention_2",
        DROP,
        *("flash_attention", "flash_attn", "flash_attention_2", "use_flash_attention_2"),
    ),
    **_switch("train.attention", "sdpa", DROP, "sdp_attention"),
    **_switch("train.batch_size", "auto", DROP, "auto_find_batch_size"),
    **_switch("train.keep", "best", "last", "load_best_model_at_end"),
    **_switch("train.evaluation_steps", DROP, DROP, "do_eval"),
    **_switch("train.dtype", "bf16", DROP, "bf16"),
    **_switch("train.dtype", "fp16", DROP, "fp16"),
    **_switch("train.device", "cpu", DROP, "use_cpu", "no_cuda"),
    **_all("train.four_bit_type", "bnb_4bit_quant_type"),
    **_all("train.double_quantization", "bnb_4bit_use_double_quant"),
    **_all("train.quant_storage", "bnb_4bit_quant_storage"),
    **_all("train.attention", "attn_implementation", "attnImplementation"),
    **_all("train.evaluation_steps", "eval_steps", "evaluation_steps"),
    **_all("train.patience", "early_stopping_patience"),
    **_all("train.neftune_alpha", "neftune_noise_alpha"),
    **_all("train.length_groups", "group_by_length"),
    **_all("train.liger", "use_liger_kernel", "use_liger", "enable_liger_kernel"),
    **_all("train.compile", "torch_compile"),
    **_all("train.offload_activations", "activation_offloading"),
    **_all("train.devices", "num_processes", "nproc_per_node", "num_gpus"),
    **_all("train.nodes", "num_machines", "nnodes"),
    **_all("train.schedule_options", "lr_scheduler_kwargs"),
    **_all("train.lora.layers", "layers_to_transform", "lora_layers_to_transform"),
    **_all("train.lora.token_indices", "trainable_token_indices"),
    "init_lora_weights": Old("train.lora.init", values=_INITIAL),
    "stage": Old("train.objective", values={name: name for name in ("sft", "dpo", "kto", "orpo")}),
    "pref_loss": Old("train.objective", values={"sigmoid": "dpo", "orpo": "orpo"}),
    "quantization_bit": Old("train.method", values={4: "qlora", 8: "int8"}),
    **_switch("train.method", "full", DROP, "full_finetuning"),
    **_switch("train.backend", "unsloth", DROP, "use_unsloth"),
    "adapter": Old("train.method", values={"qlora": "qlora", "lora": "lora"}),
    "finetuning_type": Old("train.method", values={"qlora": "qlora", "lora": "lora", "full": "full"}),
    # What is the case anyway.
    "bias": Old(why="it breaks disabling the adapter and its export; leave it out", values={"none": DROP}),
    "lora_bias": Old(
        why="it breaks disabling the adapter and its export; leave it out", values={False: DROP}
    ),
    "task_type": Old(why="only causal language models are trained", values={"CAUSAL_LM": DROP}),
    "peft_type": Old(why="only LoRA is trained", values={"LORA": DROP}),
    **{
        name: Old("train.evaluation_steps", values={"steps": DROP, "no": DROP, False: DROP})
        for name in ("eval_strategy", "evaluation_strategy")
    },
    "metric_for_best_model": Old("train.keep", values={"eval_loss": DROP, "loss": DROP}),
    "packing_strategy": Old("train.packing", values={"bfd": DROP}),
    **{name: Old("train.report_to", values=_Whatever()) for name in ("logging_steps", "logging_strategy")},
    "completion_only_loss": Old("train.supervise", values={True: DROP}),
    "assistant_only_loss": Old("train.supervise", values={True: "all"}),
    **{name: Old("train.supervise", values={False: DROP}) for name in ("train_on_inputs", "train_on_prompt")},
    "mask_history": Old("train.supervise", values={True: "last", False: DROP}),
    "do_train": Old("train.method", values={True: DROP}),
    "early_stopping_threshold": Old(
        why="train.patience counts evaluations that are no better, by however little", values={0: DROP}
    ),
    "mlm": Old(why="the next token is learned; no word is masked", values={False: DROP}),
    "shuffle": Old("train.seed", values={True: DROP}),
    "adapter_name": Old(why="a run has one adapter; forge adapters holds several", values={"default": DROP}),
    "loss_type": Old(why="the loss is that of train.objective", values={"sigmoid": DROP}),
    **{
        name: Old(why="it is not built: the loss is that of train.objective", values={False: DROP})
        for name in (
            *("reference_free", "label_smoothing", "label_smoothing_factor", "sync_ref_model"),
            *("router_aux_loss_coef", "loss_weights", "ld_alpha", "f_divergence_type", "discopop_tau"),
            *("f_alpha_divergence_coef", "use_weighting", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            *("desirable_weight", "undesirable_weight"),
        )
    },
    **{
        name: Old(why="of peft's ways train.lora has those that are built", values={False: DROP})
        for name in (
            *("eva_config", "corda_config", "lora_ga_config", "velora_config", "alora_invocation_tokens"),
            *("use_qalora", "qalora_group_size", "monteclora_config", "use_bdlora", "arrow_config"),
            *("kasa_config", "target_parameters"),
        )
    },
    "train_sampling_strategy": Old("train.length_groups", values={"group_by_length": True, "random": DROP}),
    "shuffle_dataset": Old("train.seed", values={True: DROP}),
    "disable_gradient_checkpointing": Old("train.gradient_checkpointing", values={True: False, False: True}),
    "fine_tune_type": Old("train.method", values={"lora": "lora", "full": "full"}),
    "mixed_precision": Old("train.dtype", values={**_DTYPES, "no": "fp32"}),
    # Export and serving.
    **_all("export.quant", "quantization_method", "quantization", "quant_type", "gguf_quant", "ftype"),
    **_all("export.keep_merged", "save_merged", "keep_merged_model"),
    **_all("deploy.context_tokens", "num_ctx", "n_ctx", "ctx_size", "context_length"),
    **_all("deploy.gpu_layers", "n_gpu_layers", "num_gpu"),
    **_all("deploy.parallel", "n_parallel", "num_parallel"),
    **_all("deploy.threads", "n_threads", "num_thread"),
    # No counterpart.
    **_gone(
        "held-out rows are evaluated in batches of train.batch_size, every train.evaluation_steps steps",
        *("evals_per_epoch", "per_device_eval_batch_size", "eval_batch_size", "val_batches", "do_predict"),
        *("eval_on_start", "eval_delay", "eval_accumulation_steps", "eval_do_concat_batches"),
        *("eval_use_gather_object", "generate_during_eval"),
    ),
    **_gone(
        "checkpoints are written by time (train.checkpoint_minutes) and resumed from without being asked",
        *("save_strategy", "save_steps", "save_total_limit", "saves_per_epoch", "resume_from_checkpoint"),
        *("save_only_model", "save_on_each_node", "save_every", "enable_jit_checkpoint", "ignore_data_skip"),
        "restore_callback_states_from_checkpoint",
    ),
    **_gone(
        "files have fixed places, runs/<name>/; the name of the recipe decides",
        *(
            "output_dir",
            "logging_dir",
            "overwrite_output_dir",
            "export_dir",
            "dataset_prepared_path",
        ),
    ),
    **_gone(
        "`forge push RUN --to ORG/NAME --private` sends a run to a hub, with HF_TOKEN or `hf auth login`",
        *("hub_token", "push_to_hub", "push_to_hub_token", "hub_private_repo", "hub_strategy"),
        *("export_hub_model_id", "hub_always_push", "hub_revision"),
    ),
    **_gone(
        "trackers have environment variables for it (WANDB_PROJECT); train.report_to names the trackers",
        *("wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "mlflow_experiment_name"),
        *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    **_gone(
        "the first loss or gradient that is not finite stops a training",
        *("loss_watchdog_threshold", "loss_watchdog_patience"),
    ),
    **_gone(
        "it is not built: all that is trained has train.learning_rate and train.optimizer",
        *("loraplus_lr_ratio", "loraplus_lr_embedding", "use_galore", "galore_rank", "use_apollo"),
        *("use_badam", "badam_mode", "lisa_n_layers", "optim_args", "optim_target_modules"),
    ),
    **_gone(
        "train.method: full trains every weight, LoRA those of train.lora.targets; a base is not divided",
        *("unfrozen_parameters", "freeze_trainable_layers", "freeze_trainable_modules"),
    ),
    **_gone(
        "train.max_length bounds a row, and data.overlong says what becomes of a longer one",
        *("max_prompt_length", "max_completion_length"),
    ),
    **_gone("name the files in data.source", "dataset_dir"),
    **_gone("positions are those of the base", "rope_scaling", "rope_theta", "shift_attn"),
    **_gone("train.attention: eager, sdpa, flash_attention_2 or flash_attention_3", "xformers_attention"),
    **_gone("an adapter that does not fit its base is refused, always", "strict"),
    **_gone(
        "how long an answer may be is for each request to say (max_tokens)",
        *("num_predict", "n_predict", "max_new_tokens", "min_new_tokens"),
    ),
    **_gone("servers draw one token after another", "num_beams"),
    **_gone("model.sampling.temperature: 0 is greedy; another draws", "do_sample"),
    **_gone(
        "rows are padded on the right without loss, prompts on the left where answers are asked for",
        "padding_side",
    ),
    **_gone(
        "every answer ends in the end of turn that is learned, and BOS is as the base has it",
        *("add_eos_token", "add_bos_token"),
    ),
    **_gone("export.quant is the type of the file, which lies in runs/<name>/", "outtype", "outfile"),
    **_gone("the hub's login is asked for by HF_TOKEN or `hf auth login`", "use_auth_token", "token"),
    **_gone("what is fetched lies in the hub's cache (HF_HOME)", "local_dir", "cache_dir"),
    **_gone(
        "what ends an answer is read from the base and proved; more stops are for each request to say", "stop"
    ),
    **_gone("name them all in data.source: [a.jsonl, {source: b.jsonl, weight: 0.5}]", "datasets"),
    **_gone(
        "the tokenizer and the chat template are the base's own; base.chat_template names another",
        *("tokenizer", "processing_class", "template", "prompt_template"),
    ),
    **_all("base.chat_template", "chat_template", "chat_template_path"),
    **_gone("the tokenizer is the base's own", "tokenizer_type"),
    **_gone(
        "PAD, EOS and BOS come from the base, and PAD is never EOS",
        "special_tokens",
        "pad_token",
        *("eos_token", "bos_token", "unk_token", "eos_token_id", "bos_token_id", "pad_token_id"),
    ),
    **_gone("packing is padding-free by itself; say train.packing: true", "padding_free"),
    **_gone(
        "only the answers carry loss, always; prompts never do",
        "response_template",
        "instruction_template",
        "data_collator",
    ),
    **_gone("name the modules in train.lora.targets", "layers_pattern", "exclude_modules"),
    **_gone("layers that stand twice in a model have no GGUF form", "layer_replication"),
    **_gone(
        "a LoftQ adapter fits a base that only its own quantization gives; take train.lora.init: olora",
        "loftq_config",
    ),
    **_gone(
        "forge decides it; there is nothing to set",
        *("quantization_config", "gradient_checkpointing_kwargs", "dataset_kwargs"),
        *("gradient_checkpointing_kw_args", "gradient_checkpointing_kwarg", "formatting_func"),
        *("predict_with_generate", "dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc"),
        *("preprocessing_num_workers", "dataset_processes", "overwrite_cache", "remove_unused_columns"),
        *("pad_to_sequence_len", "eval_sample_packing", "eval_packing", "tf32", "upcast_layernorm"),
        *("torch_empty_cache_steps", "ddp_timeout", "ddp_find_unused_parameters", "local_rank", "device_map"),
        *("greater_is_better", "precompute_ref_log_probs", "plot_loss", "streaming", "visual_inputs"),
        *("export_size", "export_device", "export_legacy_format", "infer_backend", "fan_in_fan_out"),
        *("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"),
        *("llm_int8_has_fp16_weight", "model_init_kwargs", "accelerator_config", "parallelism_config"),
        *("activation_checkpointing_kwargs", "liger_kernel_config", "torch_compile_backend"),
        *("torch_compile_mode", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("dataloader_persistent_workers", "dataloader_in_order", "dataloader_drop_last", "label_names"),
        *("length_column_name", "pad_to_multiple_of", "padding_value", "ddp_bucket_cap_mb", "ddp_backend"),
        *("ddp_broadcast_buffers", "ddp_static_graph", "log_level", "log_level_replica", "debug"),
        *("log_on_each_node", "logging_first_step", "logging_nan_inf_filter", "disable_tqdm", "use_cache"),
        *("include_num_input_tokens_seen", "average_tokens_across_devices", "skip_memory_metrics"),
        *("bf16_full_eval", "fp16_full_eval", "full_determinism", "truncation_mode", "disable_dropout"),
        *("is_encoder_decoder", "precompute_ref_batch_size", "include_for_metrics", "batch_eval_metrics"),
        *("prediction_loss_only", "auto_mapping", "peft_version", "revision", "inference_mode"),
        *("low_cpu_mem_usage", "use_fast", "use_fast_tokenizer", "safe_serialization", "max_shard_size"),
        *("merge_and_unload", "skip_special_tokens", "infinite"),
        *("megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying"),
    ),
    # Out of scope.
    **{name: Old(why=why) for name, why in OUT_OF_SCOPE.items()},
    **_gone(
        "name train.devices and train.strategy: fsdp or deepspeed; forge decides the rest",
        *("deepspeed", "fsdp", "fsdp_config"),
    ),
    **_gone(
        "today's training libraries dropped it and nothing takes its place",
        *("save_safetensors", "jit_mode_eval", "use_ipex", "torchdynamo"),
        *("dataset_batch_size", "num_of_sequences", "chars_per_token", "sharded_ddp"),
        *("half_precision_backend", "include_tokens_per_second", "ray_scope", "mp_parameters", "past_index"),
    ),
}

_ORDER = sorted(sections(), key=lambda path: path.count(".") + bool(path))


@dataclass
class Translation:
    """What was found in a tree: warnings for the user, and what cannot be translated."""

    warnings: list[str]
    problems: list[Problem]


def _says_what_is(old: Old, value: Any) -> bool:
    """Whether a name without a counterpart has a value that changes nothing: nothing at all, too."""
    return value is None or (isinstance(value, str | int | float) and value in (old.values or ()))


def _renamed(old: Old, node: Node) -> Node | None:
    """The node under its new name; None to leave it out. Raises ValueError with the reason."""
    if node.value is None and (old.values is not None or not old.new):
        return None
    if old.values is None:
        return node
    try:
        value = old.values[node.value]
    except (KeyError, TypeError):
        raise ValueError(" or ".join(str(value).lower() for value in old.values)) from None
    return None if value is DROP else Node(value, node.place)


def place_at(root: Node, path: tuple[str, ...], node: Node, *, replace: bool) -> str:
    """Put `node` at `path`, making sections on the way; what stands in the way, or "" when it is done."""
    above = root
    for count, part in enumerate(path[:-1], start=1):
        below = above.value.get(part)
        if below is None or below.empty:
            below = above.value[part] = Node({}, node.place)
        elif part == "base" and isinstance(below.value, str):
            below = above.value[part] = Node({"id": Node(below.value, below.place)}, below.place)
        elif not isinstance(below.value, dict):
            value = "none" if below.value is None else shown(below.value)
            return f"{'.'.join(path[:count])} is {value} ({below.place}) and holds no fields"
        above = below
    there = above.value.get(path[-1])
    if there is not None and not replace and there.value != node.value:
        return f"{'.'.join(path)} is given too ({there.place}); keep one"
    above.value[path[-1]] = node
    return ""


def look_up(path: tuple[str, ...]) -> Old | None:
    """The entry of a dotted name when its section does not know its last part."""
    section = ".".join(path[:-1])
    if section not in sections() or path[-1] in names_in(section):
        return None
    old = OLD_NAMES.get(path[-1])
    return None if old is None or old.new == ".".join(path) else old


def rename(
    root: Node, path: tuple[str, ...], node: Node, old: Old, place: Position, *, replace: bool
) -> tuple[str, Problem | None]:
    """Move one old name's value to its new place: a warning, or a problem."""
    name = ".".join(path)
    if not old.new and not _says_what_is(old, node.value):
        return "", place.problem(name, f"is not a field: {old.why}")
    try:
        renamed = _renamed(old, node)
    except ValueError as wanted:
        return "", place.problem(name, f"is now {old.new}; of its values only {wanted} has a counterpart")
    named = f"{place}: {name}"
    if renamed is None:
        return f"{named} says what is the case anyway; leave it out", None
    in_the_way = place_at(root, tuple(old.new.split(".")), renamed, replace=replace)
    if in_the_way:
        return "", place.problem(name, f"is now {old.new}, but {in_the_way}")
    return f"{named} is now {old.new}", None


def _base_called_model(path: tuple[str, ...], key: str, node: Node) -> Old | None:
    """`model: NAME`, or with a base's fields: before the section of that name it was the base."""
    if path or key != "model":
        return None
    held = node.value.keys() if isinstance(node.value, dict) else set()
    is_base = isinstance(node.value, str) or (held and not held & set(names_in("model")))
    return Old("base") if is_base else None


def _both_off(section: str, holder: Node) -> str:
    """`bf16: false` and `fp16: false` together ask for float32; a warning when that was so."""
    pair = [holder.value.get(name) for name in ("bf16", "fp16")]
    if section not in ("", "train") or any(node is None or node.value is not False for node in pair):
        return ""
    place = pair[0].place
    for name in ("bf16", "fp16"):
        del holder.value[name]
    target = ("train", "dtype") if not section else ("dtype",)
    if in_the_way := place_at(holder, target, Node("fp32", place), replace=False):
        return f"{place}: bf16 and fp16 are both off, but {in_the_way}"
    return f"{place}: bf16 and fp16 are both off: that is now train.dtype: fp32"


def translate(root: Node) -> Translation:
    """Rename every old name of a tree in place. Sections first, then what they hold."""
    translation = Translation([], [])
    for section in _ORDER:
        path = tuple(section.split(".")) if section else ()
        holder, depth = root.follow(path)
        if depth < len(path) or not isinstance(holder.value, dict):
            continue
        if warning := _both_off(section, holder):
            translation.warnings.append(warning)
        for key in list(holder.value):
            old = look_up((*path, key)) or _base_called_model(path, key, holder.value[key])
            if old is None:
                continue
            node = holder.value.pop(key)
            warning, problem = rename(root, (*path, key), node, old, node.place, replace=False)
            translation.warnings += [warning] if warning else []
            translation.problems += [problem] if problem else []
    return translation
