"""The grammar of the built-in model and data: short English sentences made of a few word lists.

Every sentence is a head and a tail ("the old farmer slept" + "in the barn"), so that whoever
needs a part, or another order, takes it from the parts and never parses text. Five kinds: where
something happened, what was done to what, how something is, what there is, what somebody must do.

Not covered: questions, negation, plurals and any tense beyond what the lists hold.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, fields
from random import Random

DETERMINERS = ("the", "the", "this", "that")
PRONOUNS = ("I", "you", "we", "they", "she", "he")
MODALS = ("must", "will", "can", "should")
PREPOSITIONS = ("in", "near", "behind", "beside", "outside")
_FUNCTION_WORDS = {*DETERMINERS, *PRONOUNS, *MODALS, *PREPOSITIONS, "there", "is"}
FUNCTION_WORDS = frozenset(word.lower() for word in _FUNCTION_WORDS)

_FRESH_EVERY = 4
_KEPT_BACK_OF_TEN = 5


@dataclass(frozen=True)
class Words:
    """The content words by what they can do in a sentence; verbs of deeds are `base/past`."""

    beings: tuple[str, ...]
    being_adjectives: tuple[str, ...]
    being_states: tuple[str, ...]
    things: tuple[str, ...]
    thing_adjectives: tuple[str, ...]
    thing_states: tuple[str, ...]
    stuff: tuple[str, ...]
    vessels: tuple[str, ...]
    places: tuple[str, ...]
    happenings: tuple[str, ...]
    deeds: tuple[str, ...]


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


ALL_WORDS = Words(
    beings=_listed(
        "farmer sailor baker teacher soldier painter child doctor king queen pilot hunter dancer thief"
        " monk clerk weaver miller robot wizard merchant captain dog cat horse fox crow goat wolf bear"
        " owl mouse duck rabbit snake turtle spider pony frog tailor"
    ),
    being_adjectives=_listed(
        "old young small tall brave clever gentle lonely quiet noisy proud wise strange kind"
    ),
    being_states=_listed(
        "tired hungry happy angry late safe asleep afraid strong weak sick ready rich thirsty"
    ),
    things=_listed(
        "lamp book key rope basket letter coin hammer ladder bottle blanket mirror drum candle clock"
        " ring wagon kite broom helmet map flute knife pillow shield sword crown carpet barrel cup"
        " shovel needle saddle bell hat canoe"
    ),
    thing_adjectives=_listed(
        "red blue green white black heavy broken golden wooden shiny dusty narrow round smooth cheap"
        " ancient silver useful"
    ),
    thing_states=_listed("cold empty lost wet dry clean dirty warm new sharp soft missing"),
    stuff=_listed(
        "bread honey milk bacon salt water sugar butter cheese rice sand coal smoke paper snow mud dust"
        " ink soup wool oil flour tea glue"
    ),
    vessels=_listed(
        "box bowl jar sandwich sack pot bag pocket drawer crate pan bin bucket tin chest vase tray tub"
    ),
    places=_listed(
        "kitchen garden river forest tower market cellar barn harbor valley village castle desert meadow"
        " cave attic school station temple palace tent swamp hotel library"
    ),
    happenings=_listed(
        "slept waited danced sang laughed fell worked walked slid rested wept jumped stood sat ran swam"
        " cried prayed shouted whispered vanished arrived stumbled paused"
    ),
    deeds=_listed(
        "carry/carried find/found break/broke sell/sold lift/lifted paint/painted bury/buried steal/stole"
        " drop/dropped wash/washed hold/held buy/bought bring/brought follow/followed watch/watched"
        " love/loved draw/drew fix/fixed burn/burned pull/pulled push/pushed mend/mended"
        " polish/polished count/counted borrow/borrowed throw/threw catch/caught open/opened"
        " close/closed choose/chose"
    ),
)


def _selected(fresh: bool) -> Words:
    chosen = {
        field.name: tuple(
            word
            for index, word in enumerate(getattr(ALL_WORDS, field.name), start=1)
            if (index % _FRESH_EVERY == 0) == fresh
        )
        for field in fields(Words)
    }
    return Words(**chosen)


# Two vocabularies without a content word in common: data made of the common one can be tested on the
# fresh one. Every fourth word is fresh, so each list has some.
COMMON_WORDS = _selected(fresh=False)
FRESH_WORDS = _selected(fresh=True)


@dataclass(frozen=True)
class Sentence:
    """`head` and `tail` in their plain order, in lower case; `topic` is who or what it is about."""

    kind: str
    topic: str
    head: str
    tail: str

    @property
    def text(self) -> str:
        return capitalized(f"{self.head} {self.tail}") + "."


def capitalized(text: str) -> str:
    """`text` with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation; the pronoun I keeps its case."""
    return [word if word == "I" else word.lower() for word in re.findall(r"[A-Za-z]+", text)]


def content_words(text: str) -> set[str]:
    """The nouns, verbs and adjectives of a sentence of this grammar."""
    return {word.lower() for word in words_of(text)} - FUNCTION_WORDS


def is_kept_back(text: str) -> bool:
    """Whether pre-training never sees the sentence `text`: one in ten, by its checksum."""
    return zlib.crc32(text.encode()) % 10 == _KEPT_BACK_OF_TEN


def vocabulary() -> list[str]:
    """Every word of the grammar as it stands inside a sentence, in alphabetical order."""
    listed = (entry for field in fields(Words) for entry in getattr(ALL_WORDS, field.name))
    return sorted(_FUNCTION_WORDS.union(*(entry.split("/") for entry in listed)))


def make_sentence(kind: str, random: Random, words: Words = ALL_WORDS) -> Sentence:
    """A sentence of one of `KINDS`, drawn with `random` from `words`."""
    return KINDS[kind](random, words)


def _noun(random: Random, nouns: tuple[str, ...], adjectives: tuple[str, ...]) -> str:
    adjective = f"{random.choice(adjectives)} " if random.random() < 0.5 else ""
    return f"{random.choice(DETERMINERS)} {adjective}{random.choice(nouns)}"


def _being(random: Random, words: Words) -> str:
    return _noun(random, words.beings, words.being_adjectives)


def _thing(random: Random, words: Words) -> str:
    return _noun(random, words.things, words.thing_adjectives)


def _place(random: Random, words: Words) -> Sentence:
    being = _being(random, words)
    place = _noun(random, words.places, words.thing_adjectives)
    head = f"{being} {random.choice(words.happenings)}"
    return Sentence("place", being, head, f"{random.choice(PREPOSITIONS)} {place}")


def _deed(random: Random, words: Words) -> Sentence:
    being = _being(random, words)
    past = random.choice(words.deeds).partition("/")[2]
    return Sentence("deed", being, f"{being} {past}", _thing(random, words))


def _state(random: Random, words: Words) -> Sentence:
    alive = random.random() < 0.5
    topic = _being(random, words) if alive else _thing(random, words)
    state = random.choice(words.being_states if alive else words.thing_states)
    return Sentence("state", topic, f"{topic} is", state)


def _existence(random: Random, words: Words) -> Sentence:
    stuff = random.choice(words.stuff)
    vessel = _noun(random, words.vessels, words.thing_adjectives)
    return Sentence("existence", stuff, f"there is {stuff}", f"in {vessel}")


def _duty(random: Random, words: Words) -> Sentence:
    topic = random.choice(PRONOUNS)
    base = random.choice(words.deeds).partition("/")[0]
    return Sentence("duty", topic, f"{topic} {random.choice(MODALS)}", f"{base} {_thing(random, words)}")


KINDS = {"place": _place, "deed": _deed, "state": _state, "existence": _existence, "duty": _duty}
