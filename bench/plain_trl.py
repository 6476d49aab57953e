"""QLoRA as a person writes it with trl, without forge: `python plain_trl.py BASE TRAIN.jsonl OUT`.

The yardstick of `bench/training.py`, which makes forge's recipe from the figures below, so that
both do the same work in the same number types; the rows come as token ids, as forge's own training
gets them. Prints one JSON line: the mean loss of all steps, and when the first and the last ended.

Not covered: whatever forge does beside training (checks, resuming, the loss of every step).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 100
LEARNING_RATE = 2e-3
WARMUP = 0.03
BATCH_SIZE = 16
RANK, ALPHA = 16, 32
SEED = 42
# A special token that ends no turn.
PAD_TOKEN = "<|endoftext|>"


def main(base: str, rows: Path, out: str) -> None:
    """Train an adapter for `base` on `rows` and save it in `out`."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    transformers.set_seed(SEED)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(out),
        train_dataset=datasets.Dataset.from_list(read(rows)),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        peft_config=lora,
    )
    # trl turns the adapters of a quantized base to bfloat16, forge keeps them in float32. On a CPU
    # the former costs a quarter more: without this line forge's own cost would hide behind it.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    clock = step_clock()
    trainer.add_callback(clock)
    outcome = trainer.train()
    trainer.save_model(out)
    print(json.dumps({"loss": outcome.training_loss, "first": clock.ends[0], "last": clock.ends[-1]}))


def read(rows: Path) -> list[dict[str, Any]]:
    with rows.open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    return [{"input_ids": line["input_ids"], "labels": line["labels"]} for line in lines]


def arguments(out: str) -> Any:
    """trl's configuration; what is not named here is trl's default, as logging every ten steps is."""
    import trl

    return trl.SFTConfig(
        output_dir=out,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        per_device_train_batch_size=BATCH_SIZE,
        optim="adamw_torch",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        max_length=None,
        pad_token=PAD_TOKEN,
        seed=SEED,
        data_seed=SEED,
        save_strategy="no",
        report_to="none",
    )


def step_clock() -> Any:
    """A callback that notes when steps end; its class is made here as its parent is transformers'."""
    import transformers

    class StepClock(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.time())

    return StepClock()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
