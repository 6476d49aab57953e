"""What a ship is about: the recipe and what its names turned out to be.

Everything that a stage's request depends on is settled here, before anything runs: which base at
which commit, whose tokenizer, which template with which variables, which data. So bad input is
reported at once, and `forge plan` needs no more than this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from forge import report
from forge.adapter.read import read_adapter
from forge.adapter.vocabulary import Fitted, fit, is_of_tokens
from forge.chat.beginning import with_beginning
from forge.chat.stops import StopContract
from forge.chat.template import DAY_VARIABLE, ChatTemplate
from forge.errors import DataError
from forge.model.architectures import needs_own_code, own_code_note
from forge.model.base import (
    UNKNOWN,
    ResolvedBase,
)
from forge.model.checkpoint import Checkpoint, open_checkpoint
from forge.model.config import Configuration, read_configuration
from forge.model.safetensors_header import TensorSpec
from forge.model.tokenizer_files import TokenizerFiles, open_tokenizer, read_tokenizer
from forge.recipe.load import Loaded
from forge.recipe.schema import Recipe, Train
from forge.resolve import digests
from forge.resolve.experts import WHY, holds_experts
from forge.resolve.taught import template_text, trained_tokenizer, with_template, with_tokens
from forge.runs.manifest import Pins
from forge.store.artifacts import Store
from forge.store.digest import file_digest
from forge.train.memory import PLANNING_LENGTH, choose_method

if TYPE_CHECKING:
    from forge.data.prompt_format import PromptFormat
    from forge.data.reading import Source

_READ_BY_A_PLAN = 1_000_000_000  # bytes of weights: about a second


@dataclass(frozen=True)
class Resolved:
    """One recipe, resolved. `directory` of the base or adapter is None only in a plan."""

    loaded: Loaded
    store: Store
    run_directory: Path
    base: ResolvedBase
    adopted: ResolvedBase | None
    sources: tuple[Source, ...]
    heldout: float | int | Path
    headers: Mapping[str, TensorSpec] | None = None
    """The base's tensors, where a plan read only their headers and the weights are not here."""
    further_type: str | None = None
    """The type of the file that the stages of this one are about, where it is not the first of several."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def data_files(self) -> tuple[Path, ...]:
        """Those of all sources."""
        return tuple(path for source in self.sources for path in source.files)

    @property
    def log(self) -> Path:
        return self.run_directory / "log.txt"

    @cached_property
    def training(self) -> Train | None:
        """The training run, with what the recipe leaves to the machine and to the base chosen."""
        train = self.recipe.train
        if not isinstance(train, Train) or self.base.directory is None:
            return train if isinstance(train, Train) else None
        if train.method == "auto":
            length = train.max_length or PLANNING_LENGTH
            method, reason = choose_method(train, self.tensors, self.configuration, length)
            report.info(f"train.method: auto means {method} here: {reason}")
            train = train.model_copy(update={"method": method})
        if train.method in ("qlora", "int8") and self.holds_experts:
            report.warning(
                f"train.method: {train.method} leaves experts in 32 bits: transformers joins "
                "them to parameters, bitsandbytes quantizes layers; train.method: lora holds them in 16 bits"
            )
        if train.method != "full" and train.lora.targets == "auto" and self.holds_experts:
            report.info(f"train.lora.targets: auto means attention beside experts: {WHY}")
            lora = train.lora.model_copy(update={"targets": "attention"})
            train = train.model_copy(update={"lora": lora})
        if train.method != "full" and self.recipe.base.tokens.add:
            modules = tuple(dict.fromkeys([*train.lora.modules_to_save, *self.token_modules]))
            lora = train.lora.model_copy(update={"modules_to_save": modules})
            train = train.model_copy(update={"lora": lora})
        return train

    @cached_property
    def token_modules(self) -> tuple[str, ...]:
        """What has a row for each token: the embedding, and the output layer where it has one of its own."""
        names = [name for name in self.tensors if is_of_tokens(name) and name.endswith(".weight")]
        return tuple(dict.fromkeys(name.split(".")[-2] for name in names))

    @property
    def tied_embedding(self) -> str | None:
        """The embedding, where it is the output layer too."""
        return self.token_modules[0] if len(self.token_modules) == 1 else None

    @cached_property
    def rows_to_add_to(self) -> int | None:
        """The rows that training gives the embedding, where the added tokens need more than it has."""
        if not self.recipe.base.tokens.add or self.base.directory is None:
            return None
        there = max((spec.shape[0] for name, spec in self.tensors.items() if is_of_tokens(name)), default=0)
        return self.tokenizer.vocabulary_size if self.tokenizer.vocabulary_size > there else None

    @property
    def holds_experts(self) -> bool:
        """Whether the base is a mixture of experts."""
        return holds_experts(self.tensors, self.configuration.experts)

    @property
    def base_directory(self) -> Path:
        if self.base.directory is None:
            raise DataError(f"{self.base.spec} is {UNKNOWN}", hint="run: forge plan --fetch, or forge ship")
        return self.base.directory

    @cached_property
    def configuration(self) -> Configuration:
        return read_configuration(self.base_directory)

    @property
    def runs_own_code(self) -> bool:
        """Whether Python code of the base is run: it is asked for, and transformers lacks the family."""
        return self.recipe.base.trust_remote_code and needs_own_code(self.configuration)

    @property
    def notes(self) -> list[str]:
        """What a person should know of the base, and need not act on."""
        note = own_code_note(self.configuration, trust_remote_code=self.recipe.base.trust_remote_code)
        unread = (
            f"a plan does not read {self.unread_bytes / 1e9:.1f} GB of weights: what hangs on them shows as "
            "to be made; the next ship reads them once and remembers"
        )
        return [*([note] if note else []), *([unread] if self.unread_bytes else [])]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base's, without files where only its headers are here; `DataError` where it is not whole."""
        if self.headers is not None:
            return Checkpoint(self.base_directory, self.headers, ())
        return open_checkpoint(self.base_directory)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The base's tensors; raises as `checkpoint`."""
        return self.checkpoint.tensors

    @cached_property
    def fitted(self) -> Fitted | None:
        """The adapter that is adopted, on this base; None where none is here."""
        if self.adopted is None or self.adopted.directory is None:
            return None
        return fit(read_adapter(self.adopted.directory), self.checkpoint)

    @property
    def parameters(self) -> int:
        """Those of the tuned model."""
        tensors = self.fitted.checkpoint.tensors if self.fitted else self.tensors
        return sum(tensor.numel for tensor in tensors.values())

    @cached_property
    def tokenizer(self) -> TokenizerFiles:
        """The tokenizer that was trained with, with the template that the recipe names, if any."""
        limit = self.configuration.max_positions
        adopted = self.adopted.directory if self.adopted else None
        own = trained_tokenizer(self.base_directory, adopted, max_positions=limit)
        if asked := self.recipe.base.chat_template:
            text = template_text(asked, self.loaded.directory, own.templates)
            own = read_tokenizer(with_template(own.directory, text), max_positions=limit)
        if self.beginning != (None, ()) and own.chat_template is not None:
            text = with_beginning(own.chat_template, *self.beginning)
            own = read_tokenizer(with_template(own.directory, text), max_positions=limit)
        tokens = self.recipe.base.tokens
        if tokens.add or tokens.pad:
            own = read_tokenizer(with_tokens(own.directory, tokens.add, tokens.pad), max_positions=limit)
        return own

    @property
    def beginning(self) -> tuple[str | None, tuple[Mapping[str, str], ...]]:
        """The system prompt and the exchanges that stand in front of every conversation."""
        model = self.recipe.model
        return model.system, tuple({"role": turn.role, "content": turn.content} for turn in model.messages)

    @cached_property
    def template(self) -> ChatTemplate:
        source = self.tokenizer.chat_template
        if source is None:
            named = sorted(self.tokenizer.templates)
            where = self.tokenizer.directory
            if named:
                raise DataError(
                    f"{where} has chat templates named {', '.join(named)} and no default one",
                    hint=f"choose one: base: {{id: ..., chat_template: {named[0]}}}",
                )
            raise DataError(
                f"{where} has no chat template, so nothing says how a prompt is written",
                hint="use the base's instruct version, or name a template: base: {id: ..., "
                "chat_template: alpaca} (a shipped one, a file, or the text itself)",
            )
        variables = self.training.template_variables if self.training else {}
        template = ChatTemplate(source, self.tokenizer.template_tokens, variables)
        read = {*template.variables_read(), DAY_VARIABLE}
        if idle := sorted(variables.keys() - read):
            raise DataError(
                f"train.template_variables: the chat template reads no {', '.join(idle)}",
                hint=f"leave it out; it reads {', '.join(sorted(read))}",
            )
        return template

    @property
    def template_digest(self) -> str:
        """sha256 of the chat template as the GGUF carries it, for the requests of the stages that use it."""
        source = self.template.pinned_source() if self.base.directory else UNKNOWN
        return hashlib.sha256(source.encode()).hexdigest()

    @cached_property
    def prompt_format(self) -> PromptFormat:
        from forge.data.prompt_format import prompt_format

        files = self.tokenizer
        return prompt_format(self.template, open_tokenizer(files.directory), files.eos_ids)

    @property
    def pad_token(self) -> str:
        """The tokenizer's PAD, else another special token, one that ends a reply last (D3).

        Padding has the label -100 and no attention, so which token it is changes nothing.
        """
        known, vocabulary = self.tokenizer.tokens, self.prompt_format.tokenizer
        ends = [token for token in (known.get("eos"), self.prompt_format.end_of_turn) if token]
        named = [known[name] for name in ("pad", "unk") if name in known]
        last = {*ends, known.get("bos")}
        first = [token for token in (*named, *self.tokenizer.special_tokens) if token not in last]
        return next(token for token in (*first, *ends) if vocabulary.token_to_id(token) is not None)

    @cached_property
    def stops(self) -> StopContract:
        """What ends a reply, for every stage that could break it."""
        form = self.prompt_format
        ends = {form.tokenizer.id_to_token(number): number for number in self.tokenizer.eos_ids}
        ids = {text: number for text, number in ends.items() if text}
        return StopContract(form.end_of_turn, {form.end_of_turn: form.end_of_turn_id, **ids})

    @cached_property
    def pad_token_id(self) -> int:
        number = self.prompt_format.tokenizer.token_to_id(self.pad_token)
        assert number is not None  # `pad_token` has an id
        return number

    @cached_property
    def base_digest(self) -> str:
        """sha256 over the base's weights and configuration, remembered by the store."""
        if self.base.directory is None or self.headers is not None or self.unread_bytes:
            return UNKNOWN
        return digests.base_digest(self.base.directory, self.store.digests)

    @cached_property
    def unread_bytes(self) -> int:
        """Bytes of weights that a plan, which writes nothing down, would read again at every call."""
        if not self.store.read_only or self.headers is not None:
            return 0
        sizes = {path: path.stat() for path in self.checkpoint.files}
        new = sum(size.st_size for path, size in sizes.items() if not self.store.digests.find(path, size))
        return new if new > _READ_BY_A_PLAN else 0

    @cached_property
    def tokenizer_digest(self) -> str:
        if self.base.directory is None:
            return UNKNOWN
        return digests.tokenizer_digest(self.tokenizer.directory, self.store.digests)

    @cached_property
    def adapter_digest(self) -> str:
        assert self.adopted is not None
        if self.adopted.directory is None:
            return UNKNOWN
        return digests.adapter_digest(self.adopted.directory, self.store.digests)

    @property
    def continued(self) -> Path | None:
        """The adapter that training goes on from."""
        named = self.training.continue_from if self.training else None
        return self.loaded.directory / Path(named).expanduser() if named else None

    @cached_property
    def continued_digest(self) -> str:
        assert self.continued is not None
        return digests.adapter_digest(self.continued, self.store.digests)

    def file_digest(self, paths: Sequence[Path]) -> str:
        return "+".join(file_digest(path, self.store.digests) for path in paths) or UNKNOWN

    def pins(self) -> Pins:
        """What later ships of this run must find again."""
        adopted, named = self.adopted, self.recipe.data.sources if self.recipe.data else ()
        return Pins(
            base=self.base.spec,
            base_revision=self.base.revision,
            adapter=adopted.spec if adopted else None,
            adapter_revision=adopted.revision if adopted else None,
            data={
                written.source: source.commit
                for written, source in zip(named, self.sources, strict=True)
                if source.commit and written.revision is None
            },
        )
