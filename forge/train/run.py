"""The training run: peft's LoRA on the base, through trl's SFTTrainer. Runs in a worker.

Ids and loss mask come ready from `data.prepare`, so what is trained on was seen and checked
before. A killed run goes on from its last finished checkpoint, bit for bit. Not covered: more than
one process (`accelerate launch`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.data.prepare import TRAIN_FILE
from forge.errors import DataError, InterruptedByUserError, StageError
from forge.train.model import (
    Hardware,
    arithmetic_of,
    choose_hardware,
    load_base,
    trainable_to_float32,
    with_lora,
)
from forge.train.save import save_adapter
from forge.train.watch import last_checkpoint, watcher

LOG_FILE = "logs/training.jsonl"


def train(
    base: str, base_name: str, base_revision: str | None, data: str, out: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train an adapter on `data` and save it in `out`; returns what was done.

    `settings` is the recipe's `train` section, `trust_remote_code`, `pad_token` and `tokenizer`, its
    directory; checkpoints live in `out/work`, which the store keeps when the run is killed. Raises
    `StageError` on divergence or lack of memory, `InterruptedByUserError` on SIGTERM, after a checkpoint.
    """
    import torch

    target = Path(out)
    (target / "logs").mkdir(exist_ok=True)
    hardware = choose_hardware(settings["device"], settings["dtype"])
    report.detail(f"training on {hardware.device}, computing in {hardware.compute}")
    trainer, watch = _trainer(base, Path(data), target, settings, hardware)
    checkpoint = last_checkpoint(target / "work")
    if checkpoint:
        report.info(f"train: going on from {checkpoint.name}")
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise StageError(
            "train: the GPU ran out of memory",
            hint="in this order: train.method: qlora, train.gradient_checkpointing: true, "
            "a smaller train.batch_size with more gradient_accumulation, a shorter train.max_length",
        ) from error
    if watch.stopping:
        raise InterruptedByUserError(
            f"training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the checkpoint is kept",
            hint="run the same command again to go on from there",
        )
    save_adapter(
        trainer.model, Path(settings["tokenizer"]), target, base_name=base_name, base_revision=base_revision
    )
    trainable, total = trainer.model.get_nb_trainable_parameters()
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        "mean_loss": outcome.training_loss if checkpoint is None else _mean_loss(target / LOG_FILE),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "device": hardware.device,
        "compute": hardware.compute,
        "arithmetic": arithmetic_of(hardware, quantize=settings["method"] == "qlora"),
        "resumed_from": checkpoint.name if checkpoint else None,
    }


def _mean_loss(log: Path) -> float:
    losses: list[float] = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    return sum(losses) / len(losses)


def _trainer(
    base: str, data: Path, out: Path, settings: Mapping[str, Any], hardware: Hardware
) -> tuple[Any, Any]:
    import datasets
    import transformers
    import trl

    quantize = settings["method"] == "qlora"
    checkpointing = settings["gradient_checkpointing"]
    if checkpointing == "auto":
        checkpointing = hardware.device == "cuda"
    model = load_base(
        base,
        hardware,
        quantize=quantize,
        trust_remote_code=settings["trust_remote_code"],
        seed=settings["seed"],
    )
    model = with_lora(model, settings["lora"], quantize=quantize, checkpointing=checkpointing)
    pad = settings["pad_token"]
    # The rows are ids already: it only pads, and no class of the base's own is needed for that.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(settings["tokenizer"]) / "tokenizer.json"), pad_token=pad
    )
    with (data / TRAIN_FILE).open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    _refuse_foreign_ids(rows, model.get_input_embeddings().weight.shape[0])
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    watch = watcher(out / LOG_FILE, settings["checkpoint_minutes"] * 60)
    trainer = trl.SFTTrainer(
        model=model,
        args=_arguments(settings, hardware, out / "work", checkpointing, pad),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainable_to_float32(trainer.model)
    return trainer, watch


def _refuse_foreign_ids(rows: Sequence[Mapping[str, Any]], embeddings: int) -> None:
    """An id past the embedding is a crash without words on a GPU (pitfall 4)."""
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= embeddings:
        raise DataError(
            f"the rows hold token {largest}, the base's embedding has {embeddings} rows",
            hint="the tokenizer has tokens that the base was never given; use the base's own",
        )


def _arguments(
    settings: Mapping[str, Any], hardware: Hardware, work: Path, checkpointing: bool, pad: str
) -> Any:
    import trl

    return trl.SFTConfig(
        output_dir=str(work),
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"] or -1,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup_fraction"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation"],
        optim=settings["optimizer"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_gradient_norm"],
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        bf16=hardware.autocast == "bf16",
        fp16=hardware.autocast == "fp16",
        use_cpu=hardware.device == "cpu",
        max_length=None,
        packing=settings["packing"],
        pad_token=pad,
        seed=settings["seed"],
        data_seed=settings["seed"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(settings["report_to"]),
        disable_tqdm=True,
        save_strategy="no",
        save_total_limit=2,
        dataloader_num_workers=0,
    )


def forget_checkpoints(out: Path) -> None:
    """Remove unfinished work, for a run that is to start afresh."""
    shutil.rmtree(out / "work", ignore_errors=True)
