"""What ends a reply: one contract, held against every place that could break it.

The end of turn that the template writes, and every EOS of the base's files, as texts and ids. The places,
in the order of the pipeline: the loss mask before training, generation_config.json, the GGUF's eos
and eot ids, the Modelfiles, the replies of the live server. Each check returns problems whose field
names the place.

Not covered: stops that only one request asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from forge.chat.modelfile import Modelfile
from forge.errors import CheckError, Problem
from forge.model.gguf_header import GgufHeader

LOSS_MASK, GENERATION, GGUF, LIVE = "the loss mask", "generation_config.json", "the GGUF", "the live reply"
_IGNORED = -100


@dataclass(frozen=True)
class StopContract:
    """`ids` has the id of every text of `texts`; `end_of_turn` is one of them."""

    end_of_turn: str
    ids: Mapping[str, int]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that ends a reply, the end of turn first."""
        return tuple(dict.fromkeys((self.end_of_turn, *sorted(self.ids))))

    def in_mask(
        self, rows: Iterable[Mapping[str, Any]], *, may_be_cut: bool, every_turn: bool = False
    ) -> list[Problem]:
        """`rows` have `labels`: each supervises something, and the end of every turn that it supervises.

        Rows that may be cut may lack the last one. `every_turn`: all the assistant turns of a row's
        `messages` are supervised, or as many as `answers` says. Which token pads does not matter: labels
        are made before rows are padded.
        """
        end = self.ids[self.end_of_turn]
        problems: list[Problem] = []
        for number, row in enumerate(rows, 1):
            supervised = [label for label in row["labels"] if label != _IGNORED]
            if not supervised:
                problems.append(Problem(f"row {number}: nothing is supervised", LOSS_MASK))
                continue
            if "messages" in row and not row["messages"]:
                continue  # a plain text: nobody's turn ends in it
            ends = _ends(row["labels"])
            open_turns = sum(token != end for token in (ends[:-1] if may_be_cut else ends))
            answers = row.get("answers", sum(turn["role"] == "assistant" for turn in row.get("messages", ())))
            wanted = answers if every_turn else 0
            if open_turns or (len(ends) < wanted and not may_be_cut):
                problems.append(Problem(f"row {number}: {self.end_of_turn} is not supervised", LOSS_MASK))
        return problems

    def in_generation_config(self, fields: Mapping[str, Any]) -> list[Problem]:
        """transformers and vLLM stop at `eos_token_id` only; a file without it leaves the tokenizer's."""
        eos = fields.get("eos_token_id")
        listed = eos if isinstance(eos, list) else [eos]
        if eos is None or self.ids[self.end_of_turn] in listed:
            return []
        wanted = f"{self.end_of_turn} ({self.ids[self.end_of_turn]})"
        return [Problem(f"eos_token_id is {eos}, without the end of turn {wanted}", GENERATION)]

    def in_gguf(self, header: GgufHeader) -> list[Problem]:
        """llama.cpp ends a reply at `eos` and `eot` (and at tokens that it knows by name)."""
        named = {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
        problems = []
        if self.ids[self.end_of_turn] not in named.values():
            shown = ", ".join(f"{name} {number}" for name, number in named.items())
            wanted = f"{self.end_of_turn} ({self.ids[self.end_of_turn]})"
            problems.append(Problem(f"its end ids are {shown}; the end of turn is {wanted}", GGUF))
        if named["eos"] is None:
            problems.append(Problem("it names no eos id: llama.cpp would take one of its own", GGUF))
        return problems

    def in_modelfile(self, modelfile: Modelfile, name: str) -> list[Problem]:
        """Every text is a PARAMETER stop: those that are set replace all that Ollama would guess."""
        missing = [text for text in self.texts if text not in modelfile.stops]
        return [Problem(f"no PARAMETER stop for {', '.join(missing)}", name)] if missing else []

    def in_replies(self, replies: Sequence[tuple[str, str]], *, should_end: bool) -> list[Problem]:
        """`replies` are (text, finish_reason). `should_end`: the tuned model ended its own."""
        problems = [
            Problem(f"a reply holds {stop} as text: {text[:60]!r}", LIVE)
            for text, _ in replies
            for stop in self.texts
            if stop in text
        ]
        if should_end and replies and all(reason != "stop" for _, reason in replies):
            problems.append(Problem("no reply ends by itself; the tuned model's did", LIVE))
        return problems


def _ends(labels: Sequence[int]) -> list[int]:
    """The last token of every run that is supervised: one run for each assistant turn."""
    return [last for last, after in pairwise((*labels, _IGNORED)) if last != _IGNORED and after == _IGNORED]


def failure_of_stops(problems: Sequence[Problem]) -> CheckError | None:
    """One error that names the places where the contract is broken."""
    if not problems:
        return None
    places = ", ".join(dict.fromkeys(problem.field for problem in problems))
    return CheckError(
        f"what ends a reply is not the same everywhere: broken at {places}",
        hint="a model served so would not stop, or stop too early",
        problems=problems,
    )


def require(problems: Sequence[Problem]) -> None:
    """Raise that error where there is one."""
    if failure := failure_of_stops(problems):
        raise failure
