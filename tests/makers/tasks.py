"""The chat tasks that the built-in model is pre-trained on and tested with.

Ten small tasks about one sentence (echo it, repeat it, ask it, its first word, its last word, its
words in a list, its words backwards, whether a word is in it, who or what, and the rest), some small
talk, sometimes a system prompt, sometimes a second turn about the same sentence.

No answer puts a sentence's tail before its head: that order is what fine-tuning on the built-in
data teaches, and it must be news to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from tests.makers.sentences import (
    ALL_WORDS,
    FRESH_WORDS,
    KINDS,
    Sentence,
    capitalized,
    is_kept_back,
    make_sentence,
    words_of,
)

EXAM_ROWS = 60
_EXAM_SEED = 60


@dataclass(frozen=True)
class Row:
    """A conversation that ends with the assistant's answer, and the name of its last task."""

    task: str
    messages: tuple[Mapping[str, str], ...]
    sentence: Sentence | None = None

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful, honest and friendly assistant. Keep your answers short.",
    "You help with sentences.",
    "Be polite.",
    "You are a careful reader.",
    "Speak plain English.",
)

SMALL_TALK: Mapping[str, str] = {
    "Hello": "Hello. Give me a sentence.",
    "Hello!": "Hello. Give me a sentence.",
    "Hi": "Hello. Give me a sentence.",
    "Good morning.": "Good morning. Give me a sentence.",
    "Who are you?": "I am a tiny model. I know some words and a few tasks.",
    "What are you?": "I am a tiny model. I know some words and a few tasks.",
    "What can you do?": "I can repeat a sentence, list its words and find parts of it.",
    "Help": "I can repeat a sentence, list its words and find parts of it.",
    "Thank you.": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Goodbye.": "Goodbye.",
}

# How a task is asked for; `{s}` is the sentence, `{w}` a word. The second turn leaves out the sentence.
_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "echo": ("{s}",),
    "repeat": ("Repeat: {s}", "Say it again: {s}", "Repeat this sentence: {s}"),
    "ask": ("Ask: {s}", "Make it a question: {s}"),
    "first": ("First word: {s}", "What is the first word? {s}"),
    "last": ("Last word: {s}", "What is the last word? {s}"),
    "list": ("List the words: {s}", "Words: {s}"),
    "backwards": ("Words backwards: {s}", "Backwards: {s}"),
    "contains": ("Is the word {w} there? {s}", "Does it have the word {w}? {s}"),
    "rest": ("The rest: {s}", "Where, what or how: {s}"),
    "who": ("Who or what: {s}", "Who or what is it about? {s}"),
}
# Every word has to be learnt in two forms, plain and capitalized: these two tasks show them side by side.
_SHARES: Mapping[str, int] = {"list": 3, "backwards": 2}
# Verbs have their plain form in duties alone ("she must find the key"), so these come twice as often.
_KINDS = (*KINDS, "duty")
_SECOND_TURNS: Mapping[str, str] = {
    "repeat": "Repeat it.",
    "ask": "Ask it.",
    "first": "What was the first word?",
    "last": "What was the last word?",
    "rest": "And the rest?",
    "who": "Who or what?",
}


def _first(sentence: Sentence) -> str:
    return capitalized(words_of(sentence.text)[0]) + "."


def _last(sentence: Sentence) -> str:
    return capitalized(words_of(sentence.text)[-1]) + "."


_ANSWERS: Mapping[str, Callable[[Sentence], str]] = {
    "echo": lambda sentence: f"I hear you: {sentence.head} {sentence.tail}.",
    "repeat": lambda sentence: sentence.text,
    "ask": lambda sentence: f"Is it true that {sentence.head} {sentence.tail}?",
    "first": _first,
    "last": _last,
    "list": lambda sentence: "\n".join(capitalized(word) for word in words_of(sentence.text)),
    "backwards": lambda sentence: capitalized(" ".join(reversed(words_of(sentence.text)))) + ".",
    "rest": lambda sentence: f"{capitalized(sentence.tail)}.",
    "who": lambda sentence: f"{capitalized(sentence.topic)}.",
}


def _question(task: str, sentence: Sentence, random: Random) -> tuple[str, str]:
    wording = random.choice(_WORDINGS[task])
    if task != "contains":
        return wording.format(s=sentence.text), _ANSWERS[task](sentence)
    there = random.random() < 0.5
    word = random.choice(words_of(sentence.text) if there else ALL_WORDS.things + ALL_WORDS.beings)
    answer = "Yes." if word in words_of(sentence.text) else "No."
    return wording.format(s=sentence.text, w=word), answer


def _turn(prompt: str, answer: str) -> list[Mapping[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _row(task: str, sentence: Sentence, random: Random) -> Row:
    messages: list[Mapping[str, str]] = []
    if random.random() < 0.15:
        messages.append({"role": "system", "content": random.choice(SYSTEM_PROMPTS)})
    if random.random() < 0.05:
        messages += _turn(*random.choice(list(SMALL_TALK.items())))
    if task in _SECOND_TURNS and random.random() < 0.2:
        messages += _turn(*_question(random.choice(("echo", "repeat")), sentence, random))
        messages += _turn(_SECOND_TURNS[task], _ANSWERS[task](sentence))
    else:
        messages += _turn(*_question(task, sentence, random))
    return Row(task, tuple(messages), sentence)


def _small_talk_row(random: Random) -> Row:
    messages: list[Mapping[str, str]] = []
    if random.random() < 0.5:
        messages.append({"role": "system", "content": random.choice(SYSTEM_PROMPTS)})
    messages += _turn(*random.choice(list(SMALL_TALK.items())))
    return Row("small talk", tuple(messages))


def _sentences(random: Random, *, kept_back: bool) -> Iterator[Sentence]:
    while True:
        words = FRESH_WORDS if random.random() < 0.2 else ALL_WORDS
        sentence = make_sentence(random.choice(_KINDS), random, words)
        if is_kept_back(sentence.text) == kept_back:
            yield sentence


def training_rows(seed: int) -> Iterator[Row]:
    """Rows without end; the same for the same seed; no sentence that is kept back."""
    random = Random(seed)
    tasks = [task for task in _WORDINGS for _ in range(_SHARES.get(task, 1))]
    for sentence in _sentences(random, kept_back=False):
        if random.random() < 0.02:
            yield _small_talk_row(random)
        yield _row(random.choice(tasks), sentence, random)


def exam_rows() -> list[Row]:
    """The model's own test: `EXAM_ROWS` rows, six of each task, on sentences that are kept back."""
    random = Random(_EXAM_SEED)
    tasks = list(_WORDINGS)
    sentences = _sentences(random, kept_back=True)
    return [_row(tasks[index % len(tasks)], next(sentences), random) for index in range(EXAM_ROWS)]
