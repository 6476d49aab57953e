"""The section `model`: how the model meets people, and the turns that recipes hold.

Not covered: whether the base's template takes a system message; that is known once the base is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator, model_validator

from forge.recipe.section import Section
from forge.recipe.words import AboveZero, NotNegative, NotNegativeInteger, Text, UpTo


class Message(Section):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="who speaks")
    content: Text = Field(description="what is said")


class SamplingDefaults(Section):
    """How a server draws tokens where a request does not say; unset: as the base, or the server, has it."""

    temperature: NotNegative | None = Field(None, description="0 always takes the likeliest token")
    top_p: UpTo | None = Field(None, description="draw among the likeliest tokens of this share together")
    top_k: NotNegativeInteger | None = Field(
        None, description="draw among so many of the likeliest tokens; 0: all"
    )
    min_p: UpTo | None = Field(
        None, description="leave out tokens with less than this share of the likeliest one's probability"
    )
    repetition_penalty: AboveZero | None = Field(
        None, description="divide what was said already by this; 1: not at all"
    )

    def asked(self) -> Mapping[str, int | float]:
        """What is set, under the names of generation_config.json."""
        return self.model_dump(exclude_none=True)


class Model(Section):
    """How the model meets people: the same in training, in every file and on every server."""

    system: Text | None = Field(
        None,
        description="system prompt of a conversation that has none, of training rows too; it becomes a part "
        "of the chat template, and SYSTEM in the Modelfile",
    )
    sampling: SamplingDefaults = Field(
        SamplingDefaults(), description="how servers draw tokens where a request does not say"
    )
    messages: tuple[Message, ...] = Field(
        (),
        description="example exchanges in front of every conversation, of training rows too; a part of the "
        "chat template",
    )

    @field_validator("system")
    @classmethod
    def _stripped(cls, value: str | None) -> str | None:
        # A block of YAML ends with a line end, which some templates write and others trim.
        return value.strip() if value else value

    @model_validator(mode="after")
    def _whole_exchanges(self) -> Model:
        if any(turn.role != ("user", "assistant")[number % 2] for number, turn in enumerate(self.messages)):
            raise ValueError("messages must be user and assistant in turn; a system prompt goes into system")
        if len(self.messages) % 2:
            raise ValueError("messages must end with the assistant's turn")
        return self
