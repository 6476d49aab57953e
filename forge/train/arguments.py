"""The recipe's `train` section as the configuration of trl's trainer. Runs in a worker."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping
from typing import Any

from forge.errors import DataError
from forge.recipe.training import Train
from forge.train.hardware import Hardware
from forge.train.ranks import rank_count
from forge.train.request import TrainRequest


def arguments(request: TrainRequest, hardware: Hardware, checkpointing: bool) -> Any:
    """trl's configuration of the objective; raises `DataError` for an option that transformers does not take.

    What is `auto` of the fields in `speed.py` was settled by who asks, and is off otherwise.
    """
    settings = request.settings
    # An 8-bit base has its own number types, and float32 around them (A4, A6).
    autocast = "" if settings.method == "int8" else hardware.autocast
    try:
        kind, own = _of_objective(request)
        return kind(
            output_dir=str(request.out / "work"),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,
            lr_scheduler_kwargs=dict(settings.schedule_options) or None,
            per_device_train_batch_size=request.batch_size,
            per_device_eval_batch_size=request.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            optim=settings.optimizer,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_epsilon=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_gradient_norm,
            neftune_noise_alpha=settings.neftune_alpha,
            gradient_checkpointing=checkpointing and settings.strategy != "fsdp",
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            use_liger_kernel=settings.liger is True,
            torch_compile=settings.compile is True,
            bf16=autocast == "bf16",
            fp16=autocast == "fp16",
            use_cpu=hardware.device == "cpu",
            seed=settings.seed,
            data_seed=settings.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=list(settings.report_to),
            disable_tqdm=True,
            save_strategy="no",
            save_total_limit=2,
            eval_strategy="steps" if settings.evaluation_steps else "no",
            eval_steps=settings.evaluation_steps,
            prediction_loss_only=True,
            dataloader_num_workers=0,
            ddp_find_unused_parameters=False if rank_count() > 1 else None,
            **own,
            **_of_strategy(settings, checkpointing),
        )
    except (ValueError, TypeError) as error:
        raise DataError(f"train: transformers refuses these settings: {error}") from error


def _of_strategy(settings: Train, checkpointing: bool) -> Mapping[str, object]:
    """How the model's parts are shared among the devices; nothing where each has it whole.

    FSDP recomputes activations itself, layer by layer as it cuts them; what DeepSpeed calls auto it takes
    from the other arguments.
    """
    match settings.strategy:
        case "fsdp":
            cut = {"version": 2, "cpu_ram_efficient_loading": True, "activation_checkpointing": checkpointing}
            return {"fsdp": True, "fsdp_config": cut}
        case "deepspeed":
            taken = (
                "gradient_accumulation_steps", "gradient_clipping", "train_batch_size",
                "train_micro_batch_size_per_gpu",
            )  # fmt: skip
            zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
            return {
                "deepspeed": {
                    **dict.fromkeys(taken, "auto"),
                    "zero_optimization": zero,
                    "bf16": {"enabled": "auto"},
                    "fp16": {"enabled": "auto"},
                }
            }
    return {}


def _of_objective(request: TrainRequest) -> tuple[Any, Mapping[str, object]]:
    """trl's class, and what not every other takes."""
    import trl

    settings = request.settings
    offload = {"activation_offloading": settings.offload_activations is True}
    order = {"train_sampling_strategy": "group_by_length" if settings.length_groups else "random"}
    match settings.objective:
        case "dpo":
            return trl.DPOConfig, {"beta": settings.beta, "max_length": None, **offload, **order}
        case "kto":
            # The answer that each is compared with is of the same rows, which keep their order for that.
            own = {"beta": settings.beta, "max_length": None, "train_sampling_strategy": "sequential"}
            return trl.KTOConfig, {**own, **offload}
        case "orpo":
            # The rows are ids already, and cut to no length; without a number trl warns.
            own = {"beta": settings.beta, "max_length": request.max_length, "remove_unused_columns": False}
            return experimental("orpo").ORPOConfig, {**own, **order}
    return trl.SFTConfig, {
        "max_length": request.max_length if settings.packing else None,
        "packing": settings.packing,
        "eval_packing": False if settings.evaluation_steps else None,
        **offload,
        **order,
    }


def experimental(name: str) -> Any:
    """A module of trl's experiments, which trl warns of on import."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return importlib.import_module(f"trl.experimental.{name}")


def warmup_steps(settings: Train, steps: int) -> int:
    """How many of `steps` warm up: at least one trains, the first of a warm-up has no learning rate.

    Raises `DataError` where the recipe names as many as there are.
    """
    named = settings.warmup_steps
    if named is not None:
        if named >= steps:
            raise DataError(
                f"train.warmup_steps: {named}, and the run has {steps} steps: it would never train",
                hint="name fewer, or leave it out",
            )
        return named
    return min(math.ceil(steps * settings.warmup_fraction), steps - 1)
