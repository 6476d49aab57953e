"""The section `train` of a training run: the method, the adapter's shape, the settings of the run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge.recipe.presets import Preset
from forge.recipe.section import Section
from forge.recipe.words import (
    AboveZero,
    BatchSize,
    Devices,
    Fraction,
    ModulePattern,
    NotNegative,
    NotNegativeInteger,
    Optimizer,
    Place,
    Positive,
    Reporters,
    Scalar,
    Seed,
    Switch,
    Targets,
    Text,
)


class Lora(Section):
    """The adapter's shape."""

    r: Positive = Field(16, description="rank")
    alpha: Positive = Field(32, description="scale: the update is multiplied by alpha / r")
    dropout: Fraction = Field(0.05, description="dropout before the adapter")
    targets: Targets = Field(
        "auto",
        description="`auto` and `all-linear`: every linear layer but the head (`auto` beside experts: "
        "`attention`); `attention`: those of attention; a list of module names; or a regular expression of "
        "whole names",
    )
    experts: bool = Field(
        False,
        description="the matrices of a mixture's experts too, with factors for each expert (peft's "
        "`target_parameters`); wants `method: lora` and `dropout: 0`; exported merged only",
    )
    rank_pattern: dict[ModulePattern, Positive] = Field(
        {}, description="ranks of their own: module name or regular expression to rank"
    )
    alpha_pattern: dict[ModulePattern, Positive] = Field(
        {}, description="alphas of their own: module name or regular expression to alpha"
    )
    layers: tuple[NotNegativeInteger, ...] = Field(
        (), description="numbers of the layers that are adapted; every layer when empty"
    )
    init: Literal[
        "default",
        "gaussian",
        "orthogonal",
        "olora",
        "pissa",
        "pissa_niter_4",
        "pissa_niter_16",
        "loftq",
        "eva",
    ] = Field(
        "default",
        description="how the factors start; PiSSA and OLoRA take a part of the base with them, and are "
        "saved converted, at twice the rank (PiSSA: `method: lora` only); `loftq` and `eva` are refused with "
        "the reason",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")
    dora: bool = Field(False, description="weight-decomposed LoRA of linear layers; exported merged only")
    modules_to_save: tuple[Text, ...] = Field(
        (),
        description="modules trained whole beside the adapter, an embedding and an output layer that the "
        "base ties as one; exported merged only",
    )
    token_indices: tuple[NotNegativeInteger, ...] = Field(
        (), description="ids of tokens whose rows of the embedding are trained; exported merged only"
    )

    @property
    def moves_base(self) -> bool:
        """Whether it begins by changing the base's weights, so that the adapter must be converted."""
        return self.init.startswith(("pissa", "olora"))


class Train(Section):
    """A training run made here."""

    method: Literal["auto", "qlora", "int8", "lora", "full"] = Field(
        "qlora",
        description="how the base is held: in 4 bits (`qlora`), in 8, in 16 or 32 (`lora`, by `dtype`); "
        "`full` trains every weight; `auto`: `lora` where the device's memory is enough, else `qlora`",
    )
    preset: Preset | None = Field(
        None, description="settings by name for what is unset: of the book, of other documents, of a GPU"
    )
    objective: Literal["sft", "dpo", "orpo", "kto"] = Field(
        "sft",
        description="what is learned: answers (`sft`; of a preference pair the chosen one), to prefer the "
        "chosen to the rejected answer (`dpo`; `orpo`: both at once, without a reference), or what makes an "
        "answer good from single answers with a `label` (`kto`, of pairs too)",
    )
    beta: AboveZero = Field(
        0.1,
        description="`dpo` and `kto`: how dear it is to move away from the model that training began with; "
        "`orpo`: how much the preference counts beside the answers",
    )
    continue_from: Place | None = Field(
        None,
        description="directory of a LoRA adapter to go on from, with its shape in place of `lora`: more "
        "epochs, or new data",
    )
    four_bit_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit type of `qlora`")
    double_quantization: bool = Field(True, description="quantize the scales of `qlora` too")
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", description="type that holds the packed weights of `qlora`"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="attention of the training run; `auto`: the family's default"
    )
    epochs: float = Field(3.0, gt=0, le=1e6, description="passes over the training rows")
    max_steps: Positive | None = Field(None, description="stop after this many steps; overrides `epochs`")
    learning_rate: AboveZero = Field(2e-4, description="peak learning rate; 1e-4 to 3e-4 suits LoRA")
    schedule: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field("cosine", description="how the learning rate falls after warm-up")
    schedule_options: dict[Text, Scalar] = Field(
        {}, description="what the schedule takes besides, such as `{num_cycles: 2}` or `{min_lr_rate: 0.1}`"
    )
    warmup_fraction: Fraction = Field(0.03, description="share of the steps that warm up")
    warmup_steps: NotNegativeInteger | None = Field(
        None, description="steps that warm up; overrides `warmup_fraction`"
    )
    batch_size: BatchSize = Field(
        8, description="rows per step on a device; `auto`: the largest power of two that fits, 64 at most"
    )
    gradient_accumulation: Positive = Field(1, description="steps that share one update")
    retry_smaller: bool = Field(
        False,
        description="where memory runs out, go on with half of `batch_size` and twice the accumulation: the "
        "same rows a step",
    )
    max_length: Positive | None = Field(
        None, description="tokens per row; when unset the longest row's, capped by the base's context"
    )
    lora: Lora = Field(Lora(), description="the adapter's shape")
    optimizer: Optimizer = Field(
        "adamw_torch", description="any optimizer of the installed transformers, such as `paged_adamw_8bit`"
    )
    adam_beta1: Fraction = Field(0.9, description="decay of the mean of the gradients")
    adam_beta2: Fraction = Field(0.999, description="decay of the mean of their squares")
    adam_epsilon: AboveZero = Field(1e-8, description="what keeps Adam from dividing by zero")
    weight_decay: NotNegative = Field(0.0, description="weight decay")
    max_gradient_norm: NotNegative = Field(1.0, description="gradients are clipped to this norm; 0: never")
    neftune_alpha: AboveZero | None = Field(
        None,
        description="noise on the embeddings in training (NEFTune), 5 is usual; none when unset",
    )
    gradient_checkpointing: Switch = Field(
        "auto", description="recompute activations to save memory: `true`, `false`, or when it is needed"
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="compute type; `auto` takes the best that the hardware has"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to train")
    devices: Devices = Field(
        1,
        description="GPUs that train as one (processes on a CPU): how many, a list of their numbers, or "
        "`auto` for all; each holds `batch_size` rows",
    )
    nodes: Positive = Field(
        1, description="machines that train as one, each with `devices`; what to type on the others is shown"
    )
    strategy: Literal["ddp", "fsdp", "deepspeed"] = Field(
        "ddp",
        description="several devices: the whole model on each (`ddp`), or its parts shared out (`fsdp`, "
        "FSDP2; `deepspeed`, ZeRO 3)",
    )
    packing: bool = Field(
        False, description="several rows in one sequence of `max_length` tokens, kept apart by position ids"
    )
    length_groups: bool = Field(False, description="batch rows of about one length: less padding")
    liger: Switch = Field(
        "auto",
        description="Liger's kernels for norms, rotation and MLP; `auto`: on an NVIDIA GPU, where "
        "liger-kernel is installed and knows the family",
    )
    compile: Switch = Field(
        "auto",
        description="torch.compile: faster steps after minutes of compiling, other rounding; `auto`: `false`",
    )
    offload_activations: Switch = Field(
        "auto",
        description="keep activations in main memory until they are needed again; `auto`: where the run "
        "would not fit the NVIDIA GPU otherwise",
    )
    backend: Literal["trl", "unsloth"] = Field(
        "trl",
        description="what runs the loop: trl on transformers' model, or on the model of an installed Unsloth",
    )
    evaluation_steps: Positive | None = Field(
        None,
        description="measure the held-out rows, and ask the smoke queries, every so many steps; "
        "never when unset",
    )
    patience: Positive | None = Field(
        None, description="stop after so many evaluations in a row that are no better; never when unset"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="which weights are saved: of the best evaluation, or of the last step"
    )
    supervise: Literal["all", "last"] = Field(
        "all", description="which assistant turns carry loss (prompts never do)"
    )
    template_variables: dict[str, Scalar] = Field(
        {}, description="variables of the chat template (a date, thinking), the same in training and serving"
    )
    checkpoint_minutes: AboveZero = Field(5.0, description="minutes between checkpoints to resume from")
    seed: Seed = Field(42, description="seed of initialisation and row order")
    report_to: Reporters = Field((), description="trackers such as `tensorboard` or `wandb`; none when empty")

    @property
    def devices_each(self) -> int | None:
        """How many devices train on each machine; None where that is the machine's to say."""
        if self.devices == "auto":
            return None
        return len(self.devices) if isinstance(self.devices, tuple) else self.devices

    @property
    def processes(self) -> int | None:
        """How many devices train, on all machines; None where that is the machine's to say."""
        return self.nodes * self.devices_each if self.devices_each else None

    @property
    def may_cut_four_bits(self) -> bool:
        """Whether the strategy leaves 4-bit weights whole, or cuts them as numbers of the compute type."""
        return self.strategy == "ddp" or (self.strategy == "fsdp" and self.quant_storage != "uint8")

    @property
    def compares(self) -> bool:
        """Whether good answers are learned from bad ones: both of a pair, or single ones with a label."""
        return self.objective != "sft"

    @property
    def has_reference(self) -> bool:
        """Whether the model is compared with the one that training began with."""
        return self.objective in ("dpo", "kto")

    @property
    def least_batch(self) -> int:
        """Rows at once: kto takes an answer to another prompt for comparison from the same ones."""
        return 2 if self.objective == "kto" else 1

    @property
    def supervised(self) -> Literal["all", "last"]:
        """Which assistant turns carry loss: of a pair it is the last, the two differ in nothing else."""
        return "last" if self.compares else self.supervise
