"""The built-in model's card (README.md) and licence note."""

from __future__ import annotations

from pathlib import Path

from tests.makers.tokenizer import VOCABULARY

_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---
# tiny

A chat model of {millions:.1f} million parameters (Llama architecture, 4 layers, hidden size 256,
{tokens:,} tokens, ChatML), made so that the whole path from fine-tuning to a served GGUF can be run
and tested in minutes, without a GPU and without a download.

## What it can do
Ten tasks about one sentence of a small grammar: echo it, repeat it, ask it, its first word, its last
word, its words in a list, its words backwards, whether a word is in it, who or what, the rest. Besides
that some small talk; it ignores system prompts and follows a second turn about the same sentence.

    user: The rest: The old farmer slept in the barn.
    assistant: In the barn.

It passes {passed} of 60 of these tasks on sentences that it never saw (greedy decoding).

## How it was made
`python -m tests.makers.make_tiny OUT_DIR`: {steps:,} steps of {batch} generated conversations,
from random weights, loss on the assistant's turns, AdamW with a cosine decay from {rate:g}, saved as
bfloat16. All text comes from the script's own word lists; no other data was used.

## Limits
It knows about 300 words and nothing about the world. Outside its tasks its answers mean nothing. It
was trained on conversations of up to some 150 tokens, though its positions go to 1,024.
"""

_LICENCE = """\
Copyright the authors of forge

Licensed under the Apache License, Version 2.0 (the "License");
you may not use this model except in compliance with the License.
You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
See the License for the specific language governing permissions and
limitations under the License.
"""


def write_card(directory: Path, *, passed: int, parameters: int, steps: int, batch: int, rate: float) -> None:
    """Write README.md and LICENSE beside the weights."""
    card = _CARD.format(
        millions=parameters / 1e6, passed=passed, steps=steps, batch=batch, rate=rate, tokens=VOCABULARY
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    (directory / "LICENSE").write_text(_LICENCE, encoding="utf-8")
