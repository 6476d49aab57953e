"""The measurement behind a certificate; the verdict is in `verdict`. Runs in a worker.

A GGUF is compared with transformers in float32, hand-over by hand-over, and with what llama.cpp's own
conversion and quantization of the same weights come to. Nothing here decides whether that is good.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from forge import report
from forge.chat.template import ChatTemplate
from forge.export import upstream
from forge.model.checkpoint import open_checkpoint
from forge.model.estimate import available
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import read_tokenizer
from forge.verify import reference, sample, served
from forge.verify.asked import GREEDY_TOKENS, answer, expected_live, prompts_of
from forge.verify.compare import (
    MOST_BEYOND_VENDOR,
    compare,
    converts,
    distances,
    excess,
    times_as_far,
)
from forge.verify.decide import undecided
from forge.verify.inputs import (
    file_facts,
    read_token_rows,
    refuse_long,
    refuse_other_importance,
    refuse_other_model,
    refuse_other_tokenizer,
    refuse_other_vocabulary,
    refuse_too_large,
)
from forge.verify.kept import Kept, kept_of
from forge.verify.loader import Weights, changes_nothing
from forge.verify.measurement import (
    Drawn,
    FileFacts,
    Greedy,
    Leg,
    Legs,
    Lost,
    Measurement,
    VerifyRequest,
    Vocabulary,
)
from forge.verify.rounding import RoundedTypes, most_lost, rounding_of, rounding_of_checkpoint
from forge.verify.session import Session, Yardsticks
from forge.verify.vocabulary import added_tokens, check_vocabulary

_ADDED = 100
_LOOKS = (768, sample.TOKENS)
"""Tokens of the rows that are compared, until every gate is decided."""
_FIRST_IN_TIME = 96
"""The same of the first look where time is short: what it takes says what the next would take."""


def measure(request: VerifyRequest) -> Measurement:
    """Compare a GGUF with what it should have been made of.

    Raises `DataError` for files that cannot be compared at all, `CheckError` for a vocabulary that cannot be
    read, with what was compared before.
    """
    upstream.load_converters(request.converters)  # before anything imports another gguf
    session = Session(request)
    facts = session.facts
    with session.step("the file's header"):
        header = read_gguf(request.gguf)
        refuse_other_model(header, facts)
        refuse_other_tokenizer(header, request.tokenizer)
        refuse_other_importance(header, request.importance)
    rows = read_token_rows(request.rows)
    file = file_facts(request.gguf, header)
    with session.step("token ids, prompt and stops"):
        vocabulary = _vocabulary(request, rows)
    with session.step("rows drawn"):
        refuse_too_large(open_checkpoint(request.base).tensors, available().free)
        tokens = facts.vocabulary_size or read_tokenizer(request.base).vocabulary_size
        refuse_long(rows, facts, header)
        refuse_other_vocabulary(rows, file.vocabulary)
        draw = partial(_draw, request, rows, tokens, facts.max_positions)
        longest = draw(sample.TOKENS)
    prompts = prompts_of(rows)
    context = max([*map(len, longest.rows), *(len(prompt) + GREEDY_TOKENS for prompt in prompts)])
    with (
        session.step("the file's greedy answers"),
        served.loaded(request.gguf, context, request.lora) as model,
    ):
        answered = answer(model, prompts)
    with session.step("what its server should answer"):
        with served.loaded(request.gguf, context, request.lora, like_server=True) as model:
            live = expected_live(model, prompts, answered.precise)
    started = time.monotonic()
    with kept_of(request) as kept:
        yardsticks = Yardsticks(session, kept, Kept(request.shared) if request.shared else kept)
        file = yardsticks.held(file)
        sizes = _LOOKS if request.minutes is None else (_FIRST_IN_TIME, *_LOOKS)
        for looks, size in enumerate(sizes, start=1):
            began, drawn = time.monotonic(), draw(size)
            with session.step("the reference in float32"):
                expected, greedy = _expected(kept, session.source, drawn, answered.made)
            legs = _Comparison(session, drawn, context, expected, yardsticks).legs(file)
            kept.forget(_named(drawn, "reference"))
            left = undecided(legs, facts.experts or 0, request.max_kl, request.min_top1)
            report.detail(
                f"{len(drawn.positions)} positions compared, undecided: {', '.join(left) or 'nothing'}"
            )
            now, larger = time.monotonic(), sizes[looks] / size if looks < len(sizes) else 1.0
            until = now - started + larger * (now - began)
            late = request.minutes is not None and until > 60 * request.minutes
            if not left or late or len(drawn.rows) == len(longest.rows):
                break
        is_sound = converts(legs.conversion, legs.arithmetic)
        fits = yardsticks.weights(file, is_sound)
    return Measurement(
        file=file,
        experts=facts.experts or 0,
        merge_base=request.merge_base,
        tokens=vocabulary.tokens,
        prompt=vocabulary.prompt,
        stops=vocabulary.stops,
        sample=_drawn(rows, drawn, looks, left if facts.experts is None or facts.experts < 2 else ()),
        legs=legs,
        greedy=greedy,
        live=live,
        weights=fits,
        seconds=session.seconds,
    )


def _named(drawn: sample.Sample, name: str) -> str:
    return f"{name.replace(' ', '-')}-{len(drawn.positions)}"


def _expected(
    kept: Kept, source: Weights, drawn: sample.Sample, made: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Any, Greedy]:
    """The reference's logits and what it says to the file's answers, from one pass."""
    greedy: list[Greedy] = []

    def logits() -> Any:
        array, own = reference.with_greedy(source, drawn, made, "the reference")
        greedy.append(kept.value(Greedy, _named(drawn, "greedy"), lambda: own))
        return array

    array = kept.array(_named(drawn, "reference"), logits)
    return array, kept.value(Greedy, _named(drawn, "greedy"), greedy.pop)


def _draw(
    request: VerifyRequest, rows: Sequence[sample.Row], tokens: int, context: int | None, size: int
) -> sample.Sample:
    if request.positions:
        return sample.draw_again(rows, request.positions, context)
    return sample.draw(rows, tokens, context, tokens=size)


def _vocabulary(request: VerifyRequest, rows: Sequence[Mapping[str, Any]]) -> Vocabulary:
    source = request.chat_template
    template = ChatTemplate(source, read_tokenizer(request.tokenizer).template_tokens) if source else None
    own = [row["messages"] for row in rows[: sample.FIRST_ROWS] if row.get("messages")]
    hello = [[{"role": "user", "content": "Hello!"}]]
    system = [[{"role": "system", "content": "Be brief."}, *hello[0]]]
    asked = [messages[:-1] for messages in own if len(messages) > 1]
    added = added_tokens(request.base, request.tokenizer)[:_ADDED]
    asked += [[{"role": "user", "content": token}] for token in added]
    conversations = [*hello, *system, *asked, *own]
    return check_vocabulary(request.gguf, request.tokenizer, template, conversations, request.end_of_turn_id)


def _drawn(rows: Sequence[Any], drawn: sample.Sample, looks: int, left: tuple[str, ...]) -> Drawn:
    return Drawn(
        rows=len(drawn.rows),
        rows_given=len(rows),
        positions=len(drawn.positions),
        answers=sum(drawn.answers),
        longest=max(map(len, drawn.rows)),
        cut_at=sample.LONGEST,
        seed=sample.SEED,
        positions_in=drawn.positions_in,
        looks=looks,
        undecided=left,
    )


@dataclass(frozen=True)
class _Conversion:
    """An unquantized file from the reference with its weights rounded as the file has them."""

    conversion: Leg
    rounded: Leg | None = None
    arithmetic: Leg | None = None
    most_lost: Lost | None = None


@dataclass(frozen=True)
class _Comparison:
    """Makes every set of logits once; each is compared and let go."""

    session: Session
    drawn: sample.Sample
    context: int
    expected: Any
    """The reference's logits."""
    yardsticks: Yardsticks

    def legs(self, file: FileFacts) -> Legs:
        """The file, the checkpoints behind it, and its yardsticks."""
        request, source = self.session.request, self.session.source
        shifts = source.adapter is not None and request.trained_in_4bit and not source.nf4
        shared = self.yardsticks.shared
        base = self._checkpoint(shared, "base", replace(source, plain=True)) if source.adapter else None
        trained = self._checkpoint(shared, "trained", replace(source, nf4=True)) if shifts else None
        merged, as_merged = self._merged() if request.merged else (None, None)
        logits = self._logits("file", request.gguf)
        file_s = self._compare(logits)
        legs = partial(Legs, file=file_s, base=base, trained=trained, merged=merged, as_merged=as_merged)
        if self.yardsticks.vendor is None:
            return legs(**vars(self._conversion(request.gguf, logits, file_s)))
        direct = self._logits("f16", self.yardsticks.f16)
        f16, against = self._compare(direct), self._compare(logits, direct)
        legs = partial(legs, **vars(self._conversion(self.yardsticks.f16, direct, f16)), f16=f16)
        if self.yardsticks.is_own:
            return legs(file_against_f16=against, vendor=against, beyond_vendor=1.0)
        theirs = self._logits("vendor", self.yardsticks.vendor)
        apart = distances(direct, logits, theirs, self.drawn)
        return legs(
            file_against_f16=against,
            vendor=self._compare(theirs, direct),
            beyond_vendor=times_as_far(apart, self.drawn),
            beyond=excess(apart, MOST_BEYOND_VENDOR),
        )

    def _merged(self) -> tuple[Leg, Leg | None]:
        """A merged checkpoint, and the reference rounded as it is."""
        merged, source = self.session.request.merged, self.session.source
        assert merged is not None
        held = rounding_of_checkpoint(open_checkpoint(merged))
        kept = self.yardsticks.kept
        made = self._checkpoint(kept, "merged", replace(source, base=merged, adapter=None, nf4=False))
        if held.is_exact:
            return made, None
        return made, self._checkpoint(kept, "as merged", replace(source, rounding=held))

    def _conversion(self, path: Path, logits: Any, leg: Leg) -> _Conversion:
        """The unquantized file in `path`, `leg` from the reference; `rounded` is what its type does to it.

        A base that is rounded so already is not computed again. `arithmetic` is what llama.cpp's sums in 16
        bits do beside it: the scale for what is left.
        """
        session = self.session
        rounding = rounding_of(path, session.facts.layers or 0)
        if rounding.is_exact:
            own = reference.with_table(session.source, rounding, self.drawn)
            return _Conversion(leg, None, None if own is None else self._compare(own))
        with session.step("the reference, rounded"):
            make = partial(self._rounded, rounding, logits, leg)
            kept = self.yardsticks.kept if path == session.request.gguf else self.yardsticks.shared
            return kept.value(_Conversion, _named(self.drawn, "conversion"), make)

    def _rounded(self, rounding: RoundedTypes, logits: Any, leg: Leg) -> _Conversion:
        session = self.session
        source = replace(session.source, rounding=rounding, beside=session.request.lora is not None)
        same = session.source.adapter is None and changes_nothing(
            rounding, open_checkpoint(session.source.base)
        )
        lost: dict[str, float] = {}
        held = self.expected if same else reference.logits(source, self.drawn, "the reference, rounded", lost)
        source = replace(source, rounding=replace(rounding, inputs=True))
        computed = reference.logits(source, self.drawn, "the reference, in 16 bits")
        arithmetic = self._compare(computed, held)
        converted = leg if same else self._compare(logits, held)
        return _Conversion(converted, self._compare(held), arithmetic, most_lost(lost))

    def _checkpoint(self, kept: Kept, name: str, source: Weights) -> Leg:
        def leg() -> Leg:
            return self._compare(reference.logits(source, self.drawn, f"the reference, {name}"))

        with self.session.step(name):
            return kept.value(Leg, _named(self.drawn, name), leg)

    def _logits(self, name: str, path: Path) -> Any:
        with self.session.step(name), served.loaded(path, self.context, self.session.request.lora) as model:
            return model.logits(self.drawn, f"logits of {path.name}")

    def _compare(self, logits: Any, against: Any = None) -> Leg:
        return compare(self.expected if against is None else against, logits, self.drawn)
