"""The stage *train*: a LoRA adapter, trained in a worker."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from forge import report, worker
from forge.adapter.vocabulary import saved_whole
from forge.codec import Json
from forge.data.account import Prepared
from forge.errors import MissingToolError, require_each
from forge.model.estimate import lora_parameters
from forge.pipeline.stage import Result
from forge.recipe.schema import Train
from forge.resolve.queries import queries_in
from forge.resolve.rehearsal import rehearse
from forge.resolve.stage import ShipStage, installed
from forge.runs.files import ADAPTER, REPORT
from forge.runs.publish import publish_output
from forge.stages.data import DATA_STAGE
from forge.store.artifacts import Artifact
from forge.train.checkpoints import MARKER
from forge.train.join import Joining, invite
from forge.train.log import LOG_FILE, Step, read_log
from forge.train.memory import Device, choose_batch, job_of, memory_of, training_device
from forge.train.questions import Question
from forge.train.ranks import Ranks, gpus_of, processes_each, ranks_of
from forge.train.request import Trained, TrainRequest
from forge.train.run import train, within_memory
from forge.train.speed import choose_speed, require_available

ADAPTER_STAGE = "train"
TRAINING_STACK = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
# How the base is held while it is trained and evaluated, besides its method and number type.
BASE_FIELDS = ("four_bit_type", "double_quantization", "quant_storage", "attention")
# Trackers whose package has another name than transformers gives them; any of several will do.
_TRACKERS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)
}  # fmt: skip
# Fields of `train` that change no byte of the adapter, or do so only through the data stage.
_NOT_KEYED = {
    "preset", "continue_from", "retry_smaller", "offload_activations",
    "checkpoint_minutes", "report_to", "max_length", "supervise", "template_variables",
}  # fmt: skip


def adapter_of(inputs: Mapping[str, Artifact]) -> Path | None:
    """The adapter's directory; None of a plain base."""
    return inputs[ADAPTER_STAGE].path if ADAPTER_STAGE in inputs else None


class AdapterStage(ShipStage):
    """Whatever makes the adapter of a run, and publishes it."""

    name = ADAPTER_STAGE

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        for name in artifact.outputs:
            publish_output(artifact, name, run / ADAPTER / name, published)

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        return {"adapter": str(run / ADAPTER)}


class TrainStage(AdapterStage):
    """A LoRA adapter, trained in a worker; resumable."""

    rank = 30
    version = 2
    needs = (DATA_STAGE,)

    def section_values(self, result: Result) -> Mapping[str, object]:
        """The loss by step, of the training log in the store."""
        log = result.artifact.path / LOG_FILE if result.artifact else None
        return {"losses": [(step.step, step.loss) for step in read_log(log, Step)] if log else []}

    @property
    def _train(self) -> Train:
        assert self.ship.training is not None
        return self.ship.training

    @cached_property
    def _device(self) -> Device:
        return training_device(self._train.device)

    def params(self) -> Mapping[str, Json]:
        fields: dict[str, Json] = {}
        for name, value in self._train.model_dump(mode="json", exclude=_NOT_KEYED).items():
            if name == "lora":
                fields |= {f"train.lora.{key}": item for key, item in value.items()}
            else:
                fields[f"train.{name}"] = value
        # How many devices share a step, not which.
        fields["train.devices"] = processes_each(self._train, self._device)
        if self._train.packing:
            fields["train.max_length"] = self._train.max_length
        if self.ship.continued:
            fields["train.continue_from"] = self.ship.continued_digest
        # The tokenizer's files are part of the adapter.
        return {"base": self.ship.base_digest, "base.tokenizer": self.ship.tokenizer_digest, **fields}

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in TRAINING_STACK}

    def packages(self) -> Collection[str]:
        quantizer = ("bitsandbytes",) if self._train.method in ("qlora", "int8") else ()
        return (
            "torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", *quantizer
        )  # fmt: skip

    def require_tools(self) -> None:
        """What the recipe asks for by name, and training would miss only after the data stage."""
        self.look()

    def _require_trackers(self) -> None:
        absent = [
            name
            for name in self._train.report_to
            if not any(importlib.util.find_spec(package) for package in _TRACKERS.get(name, (name,)))
        ]
        if absent:
            packages = " ".join(_TRACKERS.get(name, (name,))[0] for name in absent)
            raise MissingToolError(
                f"train.report_to: {', '.join(absent)} is not installed",
                hint=f"pip install {packages}, or leave it out",
            )

    def look(self) -> None:
        """Refuse what cannot be had on this machine (H1)."""
        if self.ship.base.directory is None:
            self._require_trackers()
            return
        require_each(
            [
                partial(require_available, self._train, self.ship.configuration, self._device),
                partial(gpus_of, self._train, self._device),
                self._require_trackers,
            ]
        )

    def bytes_beside(self) -> Mapping[str, int]:
        """Two checkpoints with Adam's two moments, all in float32."""
        return {"checkpoints": self._adapter_bytes() * 2 * 3}

    def bytes_kept(self) -> Mapping[str, int]:
        return {"adapter": self._adapter_bytes()}

    def _adapter_bytes(self) -> int:
        """The adapter of every matrix and what is saved whole, in float32: the most that it can be."""
        if self._train.method == "full":
            return 4 * self.ship.parameters
        lora = self._train.lora
        matrices = [spec for spec in self.ship.tensors.values() if len(spec.shape) > 1]
        rank = max(lora.r, *lora.rank_pattern.values()) if lora.rank_pattern else lora.r
        factors = lora_parameters(matrices, rank, dora=lora.dora) * (2 if lora.moves_base else 1)
        return 4 * (factors + saved_whole(self.ship.tensors, lora.modules_to_save))

    def goes_on(self, work: Path) -> bool:
        return any(work.glob(f"*/{MARKER}"))

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Trained:
        rehearse(self.ship, log=self.ship.log)  # what is not whole, or cannot be exported, is not trained
        ship, data = self.ship, inputs[DATA_STAGE].read(Prepared)
        batch = self._train.batch_size
        if batch == "auto":
            batch = choose_batch(self._train, ship.tensors, ship.configuration, data.longest_tokens)
            report.info(f"train.batch_size: auto means {batch} here")
        job = replace(job_of(self._train, data.longest_tokens, self._device), batch=batch)
        memory = memory_of(job, ship.tensors, ship.configuration, self._device)
        speed = choose_speed(self._train, ship.configuration, memory)
        request = TrainRequest(
            base=ship.base_directory,
            base_name=ship.base.spec,
            base_revision=ship.base.revision,
            tokenizer=ship.tokenizer.directory,
            pad_token=ship.pad_token,
            data=inputs[DATA_STAGE].path,
            out=out,
            settings=self._train.model_copy(
                update={
                    "liger": speed.liger,
                    "compile": speed.compile,
                    "offload_activations": speed.offload_activations,
                }
            ),
            batch_size=batch,
            max_length=data.max_length,
            trackers=ship.run_directory / "trackers",
            continue_from=ship.continued,
            rows=ship.rows_to_add_to,
            page=ship.run_directory / REPORT,
            trust_remote_code=ship.runs_own_code,
            questions=tuple(self._questions()) if self._train.evaluation_steps else (),
        )
        ranks = ranks_of(self._train, self._device)
        self._report(ranks, data.rows, batch)

        def attempt(request: TrainRequest) -> Trained:
            invite(Joining(request, ranks))
            return worker.perform(train, request, log=ship.log, together=ranks.environments())

        trained = within_memory(request, attempt)
        return replace(trained, choices=speed.choices)

    def _report(self, ranks: Ranks, rows: int, batch: int) -> None:
        """What several processes change: the rows a step, and which are seen twice."""
        if ranks.count == 1:
            return
        together = batch * ranks.count
        report.info(
            f"train: {ranks.count} processes hold {batch} rows each: a step has "
            f"{together * self._train.gradient_accumulation} rows"
        )
        if not self._train.packing and (twice := -rows % together):
            report.info(f"train: the last step of an epoch sees {twice} rows again: all hold as many")

    def _questions(self) -> Iterator[Question]:
        """The smoke queries as the model is prompted with them (I2)."""
        ship = self.ship
        for query in queries_in(ship.recipe):
            prompt = ship.template.render(query.messages, add_generation_prompt=True, tools=query.tools)
            yield Question(
                query.messages[-1]["content"],
                tuple(ship.prompt_format.ids(prompt)),
                ship.prompt_format.end_of_turn_id,
                ship.pad_token_id,
            )
