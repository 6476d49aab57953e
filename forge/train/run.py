"""The training run: peft on the base, through trl's SFTTrainer. Runs in a worker.

Ids and loss mask come ready from `data.prepare`, so what is trained on was seen and checked
before. A killed run goes on from its last whole checkpoint, bit for bit. Not covered: more than
one process (`accelerate launch`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE
from forge.errors import DataError, InterruptedByUserError, StageError
from forge.train.arguments import arguments, warmup_steps
from forge.train.checkpoints import last_checkpoint
from forge.train.hardware import Hardware, choose_hardware
from forge.train.live import LivePage
from forge.train.lora import (
    adapted_modules,
    add_rows,
    continued,
    keep_initial,
    moves_base,
    trainable_to_float32,
    whole_model,
    with_lora,
)
from forge.train.model import BaseSettings, arithmetic_of, load_base
from forge.train.packing import refuse_leaks
from forge.train.save import save_adapter
from forge.train.watch import Best, peak_bytes, watcher

LOG_FILE = "logs/training.jsonl"
_INITIAL = "initial"
# Of the packages that follow a run, where each is told to leave its files.
_TRACKER_DIRECTORIES = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR"}


def train(
    base: str, base_name: str, base_revision: str | None, data: str, out: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train an adapter on `data` and save it in `out`; returns what was done.

    `settings` is the recipe's `train` section and `trust_remote_code`, `max_length`, `pad_token`,
    `tokenizer` (its directory) and `trackers` (where they leave their files). Checkpoints live in
    `out/work`, which the store keeps when the run is killed. Raises `StageError` on divergence or lack
    of memory or disk, `InterruptedByUserError` on SIGTERM, after a checkpoint.
    """
    import torch

    target = Path(out)
    (target / "work").mkdir(exist_ok=True)
    for name, variable in _TRACKER_DIRECTORIES.items():
        os.environ.setdefault(variable, str(Path(settings["trackers"]) / name))
    hardware = choose_hardware(settings["device"], settings["dtype"])
    loading = BaseSettings.of(settings)
    arithmetic = arithmetic_of(hardware, loading)
    report.info(f"train: {settings['method']} on {hardware.device}, computing in {arithmetic['training']}")
    trainer, watch = _trainer(base, Path(data), target, settings, hardware)
    checkpoint = last_checkpoint(target / "work")
    if checkpoint:
        report.info(f"train: going on from {checkpoint.name}")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise StageError(
            "train: the GPU ran out of memory",
            hint="in this order: train.method: qlora, train.gradient_checkpointing: true, "
            "a smaller train.batch_size with more gradient_accumulation, a shorter train.max_length",
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StageError(
            "train: the disk is full: a checkpoint could not be written",
            hint="make room (forge gc shows what can go) and run the same command again; it goes on from "
            "the checkpoint before",
        ) from error
    if watch.stopping:
        raise InterruptedByUserError(
            f"training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the checkpoint is kept",
            hint="run the same command again to go on from there",
        )
    best = watch.best.restore(trainer.model) if settings["keep"] == "best" else None
    initial = target / "work" / _INITIAL
    save_adapter(
        trainer.model,
        Path(settings["tokenizer"]),
        target,
        base_name=base_name,
        base_revision=base_revision,
        initial=initial if initial.is_dir() else None,
    )
    (target / LOG_FILE).parent.mkdir(exist_ok=True)
    shutil.copyfile(watch.log, target / LOG_FILE)
    trainable, total = trainer.model.get_nb_trainable_parameters()
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        "mean_loss": _mean_loss(watch.log),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "modules": _short_names(adapted_modules(trainer.model)),
        "method": settings["method"],
        "device": hardware.device,
        "compute": hardware.compute,
        "arithmetic": arithmetic,
        "attention": trainer.model.config.get_text_config()._attn_implementation,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "evaluations": watch.best.evaluations,
        "best_step": best,
        "stopped_early": watch.is_patience_spent,
        "resumed_from": checkpoint.name if checkpoint else None,
        "seconds": None if checkpoint else watch.seconds,
        "peak_memory_bytes": peak_bytes(),
    }


def _mean_loss(log: Path) -> float:
    losses: list[float] = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    return sum(losses) / len(losses)


def _short_names(modules: Sequence[str]) -> dict[str, int]:
    """How many modules of each name carry factors."""
    names = [module.rpartition(".")[2] for module in modules]
    return {name: names.count(name) for name in sorted(set(names))}


def _trainer(
    base: str, data: Path, out: Path, settings: Mapping[str, Any], hardware: Hardware
) -> tuple[Any, Any]:
    import transformers
    import trl

    checkpointing = settings["gradient_checkpointing"]
    if checkpointing == "auto":
        checkpointing = hardware.device == "cuda"
    model = _model(base, out, settings, hardware, checkpointing)
    # The rows are ids already: it only pads, and no class of the base's own is needed for that.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(settings["tokenizer"]) / "tokenizer.json"), pad_token=settings["pad_token"]
    )
    rows = _rows(data / TRAIN_FILE)
    _refuse_foreign_ids(rows, model.get_input_embeddings().weight.shape[0])
    if settings["packing"]:
        refuse_leaks(model, rows)
    heldout = _rows(data / HELDOUT_FILE) if settings["evaluation_steps"] else []
    if settings["evaluation_steps"] and not heldout:
        raise DataError("train.evaluation_steps: there are no held-out rows", hint="set data.eval")
    work = out / "work"
    page = Path(settings["page"]) if settings.get("page") else None
    watch = watcher(
        work / "training.jsonl",
        settings["checkpoint_minutes"] * 60,
        Best(work, settings["patience"]),
        vocabulary=model.config.get_text_config().vocab_size,
        page=LivePage(page),
    )

    class Trainer(trl.SFTTrainer):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.args.warmup_steps = warmup_steps(settings, num_training_steps)
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            except TypeError as error:
                raise DataError(
                    f"train.schedule_options: {error}",
                    hint=f"transformers' documentation says what {settings['schedule']} takes",
                ) from error

    trainer = Trainer(
        model=model,
        args=arguments(settings, hardware, work, checkpointing),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(heldout) if heldout else None,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainable_to_float32(trainer.model)
    return trainer, watch


def _model(base: str, out: Path, settings: Mapping[str, Any], hardware: Hardware, checkpointing: bool) -> Any:
    loading = BaseSettings.of(settings)
    model = load_base(base, hardware, loading)
    if settings.get("rows"):
        add_rows(model, settings["rows"])
    if settings["method"] == "full":
        return whole_model(model)
    lora = settings["lora"]
    if settings.get("continue_from"):
        return continued(
            model, settings["continue_from"], quantized=loading.is_quantized, checkpointing=checkpointing
        )
    model = with_lora(model, lora, quantized=loading.is_quantized, checkpointing=checkpointing)
    counts = _short_names(adapted_modules(model))
    report.info("train: factors on " + ", ".join(f"{count} x {name}" for name, count in counts.items()))
    if moves_base(lora["init"]):
        keep_initial(model, out / "work" / _INITIAL)
    return model


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    import datasets

    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    return datasets.Dataset.from_dict(columns)


def _refuse_foreign_ids(rows: Sequence[Mapping[str, Any]], embeddings: int) -> None:
    """An id past the embedding is a crash without words on a GPU (pitfall 4)."""
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= embeddings:
        raise DataError(
            f"the rows hold token {largest}, the base's embedding has {embeddings} rows",
            hint="the tokenizer has tokens that the base was never given; use the base's own",
        )
