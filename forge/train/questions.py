"""The recipe's questions to a model while it trains: what it answered before, and at each evaluation.

Greedy, so that nothing is drawn: a run that is asked questions trains as one that is not. Runs in a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import report
from forge.train.log import Answers, append, keep_until

_MOST_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """What a person asks, and the ids of its prompt as a server has them."""

    text: str
    ids: tuple[int, ...]
    end_of_turn_id: int
    pad_token_id: int


class LiveQuestions:
    """Asks the questions, and keeps the answers in a file that a resumed run finds again."""

    def __init__(self, log: Path, questions: Sequence[Question], tokenizer: Any) -> None:
        self._log, self.questions, self._tokenizer = log, questions, tokenizer
        self.answers: list[Answers] = []

    def begin(self, step: int, model: Any) -> None:
        """Ask before the first step; a resumed run repeats what came after its checkpoint."""
        self.answers = keep_until(self._log, step, Answers)
        if not self.answers:
            self.ask(step, model)

    def ask(self, step: int, model: Any) -> None:
        """Note what the model answers after `step`, and say it."""
        if not self.questions:
            return
        was_training = model.training
        model.eval()
        try:
            texts = [self._answer(model, question) for question in self.questions]
        finally:
            model.train(was_training)
        self.answers.append(Answers(step, tuple(texts)))
        append(self._log, self.answers[-1])
        for question, text in zip(self.questions, texts, strict=True):
            report.info(f"train: step {step}: {question.text} → {text}")

    def _answer(self, model: Any, question: Question) -> str:
        (ids,) = greedy(
            model,
            [question.ids],
            longest=_MOST_TOKENS,
            end_of_turn_id=question.end_of_turn_id,
            pad_token_id=question.pad_token_id,
        )
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def greedy(
    model: Any, prompts: Sequence[Sequence[int]], *, longest: int, end_of_turn_id: int, pad_token_id: int
) -> list[list[int]]:
    """The ids of greedy answers; prompts are padded on the left, as generation needs (pitfall 29)."""
    import torch
    import transformers

    width = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = transformers.GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=longest,
        eos_token_id=end_of_turn_id,
        pad_token_id=pad_token_id,
    )
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
    answers: list[list[int]] = out[:, width:].tolist()
    return answers
