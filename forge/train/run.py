"""The training run: peft on the base, through trl's trainer of the objective. Runs in a worker.

Ids and loss mask come ready from `data.prepare`, so what is trained on was seen and checked
before. A killed run goes on from its last whole checkpoint, bit for bit. Of several processes that train as
one each does all of this; only the first writes what others read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge import report
from forge.adapter.save import save_adapter
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE, PreparedRow
from forge.errors import DataError, InterruptedByUserError, OutOfMemoryError, StageError
from forge.train.arguments import arguments, warmup_steps
from forge.train.checkpoints import last_checkpoint
from forge.train.hardware import Hardware, choose_hardware
from forge.train.live import LivePage
from forge.train.log import LOG_FILE, Step, read_log
from forge.train.lora import (
    adapted_modules,
    add_rows,
    balance_experts,
    continued,
    keep_initial,
    trainable_to_float32,
    whole_model,
    with_lora,
)
from forge.train.model import arithmetic_of, load_base
from forge.train.packing import refuse_leaks
from forge.train.preferences import drop_reference, trainer_of, trainer_rows
from forge.train.questions import LiveQuestions
from forge.train.ranks import local_rank, rank, rank_count
from forge.train.request import Trained, TrainRequest
from forge.train.unsloth import import_unsloth, unsloth_model
from forge.train.watch import Best, peak_bytes, watcher

_INITIAL = "initial"
# With less than this free, a write that torch could not finish found the disk full.
_FULL_BYTES = 1 << 20
# Of the packages that follow a run, where each is to leave its files.
_TRACKER_DIRECTORIES = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR"}


def within_memory(request: TrainRequest, attempt: Callable[[TrainRequest], Trained]) -> Trained:
    """What `attempt`, which trains, gives; under `train.retry_smaller` with fewer rows at once, as many a
    step, for as long as memory runs out (B6). Each attempt goes on from the checkpoints of the one before.
    """
    while True:
        try:
            return attempt(request)
        except OutOfMemoryError as error:
            smaller = with_fewer_rows(request) if request.settings.retry_smaller else None
            if smaller is None:
                raise
            report.warning(error.message)
        request = smaller
        report.warning(
            f"train: again with train.batch_size: {request.batch_size} and train.gradient_accumulation: "
            f"{request.settings.gradient_accumulation}, as many rows a step"
        )


def with_fewer_rows(request: TrainRequest) -> TrainRequest | None:
    """The same steps, of more and smaller parts: half the rows at once where their number is even.

    None where the objective needs as many rows at once as there are.
    """
    most = request.batch_size // request.settings.least_batch
    parts = next((parts for parts in range(2, most + 1) if request.batch_size % parts == 0), None)
    if parts is None:
        return None
    accumulation = request.settings.gradient_accumulation * parts
    settings = request.settings.model_copy(update={"gradient_accumulation": accumulation})
    return replace(request, batch_size=request.batch_size // parts, settings=settings)


def train(request: TrainRequest) -> Trained:
    """Train an adapter on the rows and save it.

    Checkpoints live in `out/work`, which the store keeps when the run is killed. Raises `StageError` on
    divergence or lack of disk, `OutOfMemoryError`, and `InterruptedByUserError` on SIGTERM, after a
    checkpoint.
    """
    settings, out = request.settings, request.out
    (out / "work").mkdir(exist_ok=True)
    if settings.backend == "unsloth":
        import_unsloth(out / "work")
    import torch

    for name, variable in _TRACKER_DIRECTORIES.items():
        os.environ.setdefault(variable, str(request.trackers / name))
    hardware = choose_hardware(settings.device, settings.dtype)
    if hardware.device == "cuda":
        torch.cuda.set_device(local_rank())
    arithmetic = arithmetic_of(hardware, request.loading)
    report.info(f"train: {settings.method} on {hardware.device}, computing in {arithmetic.training}")
    trainer, watch = _trainer(request, hardware)
    with trainer.args.main_process_first(local=False):  # of all machines: it removes a damaged one
        checkpoint = last_checkpoint(out / "work")
    if checkpoint:
        report.info(f"train: going on from {checkpoint.name}")
    _loop(trainer, checkpoint, hardware.device, out)
    if watch.stopping:
        raise InterruptedByUserError(
            f"training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the checkpoint is kept",
            hint="run the same command again to go on from there",
        )
    best = watch.best.restore(trainer.model) if settings.keep == "best" else None
    if settings.has_reference:
        drop_reference(trainer.model)
    weights = None
    if settings.strategy != "ddp":
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all give their parts
    if rank() == 0:
        _save(request, trainer.model, weights, watch.log)
    trainable, total = trainer.model.get_nb_trainable_parameters()
    return Trained(
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0, 3),
        mean_loss=_mean_loss(watch.log),
        trainable_parameters=trainable,
        total_parameters=total,
        modules=_short_names(adapted_modules(trainer.model)),
        method=settings.method,
        device=hardware.device,
        compute=hardware.compute,
        arithmetic=arithmetic,
        attention=trainer.model.config.get_text_config()._attn_implementation,
        threads=torch.get_num_threads(),
        processor=torch.backends.cpu.get_cpu_capability(),
        evaluations=tuple(watch.best.evaluations),
        best_step=best,
        stopped_early=watch.is_patience_spent,
        resumed_from=checkpoint.name if checkpoint else None,
        seconds=None if checkpoint else watch.seconds,
        peak_memory_bytes=peak_bytes(),
        questions=tuple(question.text for question in watch.asked.questions),
        answers=tuple(watch.asked.answers),
        batch_size=request.batch_size,
        processes=rank_count(),
    )


def _save(request: TrainRequest, model: Any, weights: Any, log: Path) -> None:
    """`weights` are the model's, put together, where its parts are shared among devices."""
    initial = request.out / "work" / _INITIAL
    save_adapter(
        model,
        request.tokenizer,
        request.out,
        base_name=request.base_name,
        base_revision=request.base_revision,
        initial=initial if initial.is_dir() else None,
        weights=weights,
    )
    (request.out / LOG_FILE).parent.mkdir(exist_ok=True)
    shutil.copyfile(log, request.out / LOG_FILE)


def _loop(trainer: Any, checkpoint: Path | None, device: str, out: Path) -> None:
    """Train to the end, from `checkpoint` on; raises as `train`."""
    import safetensors

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError, MemoryError, safetensors.SafetensorError) as error:
        if _is_of_full_memory(error):
            raise OutOfMemoryError(
                f"train: {'the GPU' if device == 'cuda' else 'this machine'} ran out of memory",
                hint="in this order: train.method: qlora, train.gradient_checkpointing: true, a smaller "
                "train.batch_size with more gradient_accumulation (train.retry_smaller: true does it), a "
                "shorter train.max_length",
            ) from None
        if not _is_of_full_disk(error, out):
            raise
        raise StageError(
            "train: the disk is full: a checkpoint could not be written",
            hint="make room (forge gc shows what can go) and run the same command again; it goes on from "
            "the checkpoint before",
        ) from error


def _is_of_full_memory(error: Exception) -> bool:
    """Whether the GPU's memory or the main memory was full; for the latter torch has no class of its own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _is_of_full_disk(error: Exception, directory: Path) -> bool:
    """Whether a checkpoint failed for want of room: Python, safetensors and torch each say so otherwise."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return True
    return "inline_container" in str(error) and shutil.disk_usage(directory).free < _FULL_BYTES


def _mean_loss(log: Path) -> float:
    losses = [step.loss for step in read_log(log, Step)]
    return sum(losses) / len(losses)


def _short_names(modules: Sequence[str]) -> Mapping[str, int]:
    """How many modules of each name carry factors."""
    names = [module.rpartition(".")[2] for module in modules]
    return {name: names.count(name) for name in sorted(set(names))}


def _trainer(request: TrainRequest, hardware: Hardware) -> tuple[Any, Any]:
    import accelerate
    import tokenizers
    import transformers

    settings = request.settings
    checkpointing = settings.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = hardware.device == "cuda"
    if settings.strategy != "ddp":
        # What cuts the model up while it is loaded asks whether the processes know each other.
        accelerate.PartialState()
    model = _model(request, hardware, checkpointing and settings.strategy != "fsdp")
    # The rows are ids already: it only pads, and no class of the base's own is needed for that.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(request.tokenizer / "tokenizer.json"), pad_token=request.pad_token
    )
    rows = _rows(request.data / TRAIN_FILE)
    _refuse_foreign_ids(rows, model.get_input_embeddings().weight.shape[0])
    if settings.packing:
        refuse_leaks(model, rows)
    heldout = _rows(request.data / HELDOUT_FILE) if settings.evaluation_steps else []
    if settings.evaluation_steps and not heldout:
        raise DataError("train.evaluation_steps: there are no held-out rows", hint="set data.eval")
    # Each process notes what it sees in files of its own; those of the first are read by others.
    work = request.out / "work" / (f"rank-{rank()}" if rank() else "")
    work.mkdir(exist_ok=True)
    asked = LiveQuestions(
        work / "answers.jsonl",
        request.questions if settings.evaluation_steps and rank() == 0 else (),
        tokenizers.Tokenizer.from_file(str(request.tokenizer / "tokenizer.json")),
    )
    watch = watcher(
        work / "training.jsonl",
        settings.checkpoint_minutes * 60,
        Best(work, settings.patience),
        asked,
        vocabulary=model.config.get_text_config().vocab_size,
        page=LivePage(request.page if rank() == 0 else None, asked),
    )

    def dataset(rows: Sequence[PreparedRow]) -> Any:
        return trainer_rows(settings.objective, rows, request.batch_size, settings.seed)

    parent = trainer_of(settings.objective)
    accumulation = settings.gradient_accumulation

    class Trainer(parent):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *rows: Any) -> Any:
            # Rows of about one length are looked for among those of whole steps, however many share one.
            self.args.gradient_accumulation_steps = accumulation * rank_count()
            try:
                return super()._get_train_sampler(*rows)
            finally:
                self.args.gradient_accumulation_steps = accumulation

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.args.warmup_steps = warmup_steps(settings, num_training_steps)
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            except (TypeError, ValueError, ArithmeticError) as error:
                raise DataError(
                    f"train.schedule_options: {error}",
                    hint=f"transformers' documentation says what {settings.schedule} takes",
                ) from error

    trainer = Trainer(
        model=model,
        args=arguments(request, hardware, checkpointing),
        train_dataset=dataset(rows),
        eval_dataset=dataset(heldout) if heldout else None,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if settings.has_reference and not request.continue_from:
        drop_reference(trainer.model)  # the base is one: the model without its new adapter
    trainable_to_float32(trainer.model)
    return trainer, watch


def _model(request: TrainRequest, hardware: Hardware, checkpointing: bool) -> Any:
    if request.settings.backend == "unsloth":
        return unsloth_model(request, hardware, checkpointing)
    model = load_base(request.base, hardware, request.loading)
    if request.rows:
        add_rows(model, request.rows)
    balance_experts(model, request.settings)
    if request.settings.method == "full":
        return whole_model(model)
    lora, quantized = request.settings.lora, request.loading.is_quantized
    if request.continue_from:
        return continued(model, request.continue_from, quantized=quantized, checkpointing=checkpointing)
    model = with_lora(model, lora, quantized=quantized, checkpointing=checkpointing)
    counts = _short_names(adapted_modules(model))
    report.info("train: factors on " + ", ".join(f"{count} x {name}" for name, count in counts.items()))
    if lora.moves_base and rank() == 0:
        keep_initial(model, request.out / "work" / _INITIAL)
    return model


def _rows(path: Path) -> list[PreparedRow]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _refuse_foreign_ids(rows: Sequence[PreparedRow], embeddings: int) -> None:
    """An id past the embedding is a crash without words on a GPU (pitfall 4)."""
    largest = max(max([*row["input_ids"], *row.get("rejected_ids", ())]) for row in rows)
    if largest >= embeddings:
        raise DataError(
            f"the rows hold token {largest}, the base's embedding has {embeddings} rows",
            hint="the tokenizer has tokens that the base was never given; use the base's own",
        )
