"""What memory probes say: a fact is planted, acknowledged, later asked for, and answered.

Every value is from a small closed set, so that guessing has a known chance, and always ends its
sentence, so that its words look the same wherever they are said. Facts have keys ("my code", "my
sister's code"): several facts of one kind can be alive, and only the key tells which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast facts follow one another, and how soon they are asked for."""

    gap_shares: dict[float, float]
    """Intended seconds from the last mention of a value to the question for it, and how often."""
    plant_every_sec: tuple[float, float]
    """From one planting to the next; asking takes time too."""


CALM = Pace(
    {4: 0.45, 10: 0.20, 20: 0.10, 40: 0.05, 60: 0.05, 90: 0.05, 120: 0.04, 180: 0.03, 240: 0.03},
    (7.0, 20.0),
)
SPREAD = Pace(dict.fromkeys(CALM.gap_shares, 1 / len(CALM.gap_shares)), (7.0, 20.0))
"""Every gap as often as any other: to measure with."""
DRILL = Pace({1: 0.4, 3: 0.4, 6: 0.2}, (1.0, 4.0))
"""Planted, asked and answered within a 15 s clip, again and again: to learn recall from."""
PACES = {"train": (CALM, DRILL), "heldout": (SPREAD,)}
"""Those of a split's conversations, each as often as any other."""
ECHO_SHARE = 0.8
"""How often the other side repeats the value when it is planted."""
USER_ASKS_SHARE = 0.85
"""How often the user plants and asks, and Moshi answers."""
SAME_KIND_SHARE = 0.25
"""How often a fact is of a kind that is already alive, beside those that are by accident."""

VALUES: dict[str, tuple[str, ...]] = {
    "code": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "colour": ("red", "blue", "green", "yellow", "purple", "orange", "grey", "brown"),
    "city": (
        "Paris",
        "London",
        "Dublin",
        "Boston",
        "Berlin",
        "Madrid",
        "Vienna",
        "Chicago",
        "Rome",
    ),
    "animal": ("dog", "cat", "horse", "rabbit", "parrot", "turtle", "goat"),
    "drink": ("tea", "coffee", "water", "juice", "milk", "lemonade", "cocoa"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "name": (
        "Anna",
        "Peter",
        "Laura",
        "Simon",
        "Clara",
        "Martin",
        "Julia",
        "Oscar",
        "Nina",
        "Paul",
    ),
}
KEYS: dict[str, tuple[str, ...]] = {
    "code": ("my code", "my sister's code", "my brother's code", "the code of the door"),
    "colour": ("my favourite colour", "my mother's colour", "the colour of my car"),
    "city": ("my favourite city", "my father's city", "the city of the meeting"),
    "animal": ("my favourite animal", "my sister's animal", "the animal in my dream"),
    "drink": ("my favourite drink", "my brother's drink", "the drink for tonight"),
    "day": ("my free day", "my mother's day", "the day of the party"),
    "name": ("my teacher's name", "my father's name", "the name of the doctor"),
}
_WORDS = {"code": 3}
"""Words of a value, where it is not one."""
_ARTICLES = {"animal": "a "}

# short ones are more frequent: what is planted, asked and answered should fit into a 15 s clip
_PLANT = (
    "{key} is {value}.",
    "{key} is {value}.",
    "{key} is {value}.",
    "Remember, {key} is {value}.",
    "By the way, {key} is {value}.",
    "Do not forget, {key} is {value}.",
    "Please remember, {key} is {value}.",
    "I want to tell you something. {key} is {value}.",
)
_ECHO = (
    "Okay, {value}.",
    "All right, {value}.",
    "I see, {value}.",
    "Got it, {value}.",
    "{key} is {value}.",
)
_NO_ECHO = ("Okay, I will.", "Sure, I can remember that.", "All right, thank you.", "Good to know.")
_ASK = (
    "What was {key}?",
    "What was {key}?",
    "What is {key}?",
    "And {key}?",
    "What was {key} again?",
    "Tell me, what was {key}?",
    "Do you remember {key}?",
    "By the way, what was {key}?",
)
_ANSWER = (
    "It is {value}.",
    "It is {value}.",
    "It was {value}.",
    "You said {value}.",
    "{key} is {value}.",
    "{key} was {value}.",
)


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to remember, as its owner puts it."""

    kind: str
    key: str
    value: str

    @property
    def words(self) -> int:
        """Words of the value."""
        return _WORDS.get(self.kind, 1)

    @property
    def chance(self) -> float:
        """How often a guess among the kind's words finds one word of the value."""
        return 1 / len(VALUES[self.kind])

    def plant(self, rng: np.random.Generator) -> str:
        """The owner says it."""
        return self.say(_one(_PLANT, rng), self.key)

    def echo(self, rng: np.random.Generator) -> str:
        """The other side repeats the value."""
        return self.say(_one(_ECHO, rng), _yours(self.key))

    def no_echo(self, rng: np.random.Generator) -> str:
        """The other side promises to remember, and does not say what."""
        return _one(_NO_ECHO, rng)

    def ask(self, rng: np.random.Generator) -> str:
        """The owner wants to know it again."""
        return self.say(_one(_ASK, rng), self.key)

    def answer(self, rng: np.random.Generator) -> str:
        """The other side says the value."""
        return self.say(_one(_ANSWER, rng), _yours(self.key))

    def say(self, template: str, key: str) -> str:
        """The template filled in; `key` as the one who says it calls it."""
        return template.format(key=key, value=_ARTICLES.get(self.kind, "") + self.value)


def draw(rng: np.random.Generator, alive: Collection[Fact]) -> Fact:
    """A new fact under a key that no fact in `alive` has."""
    taken = {fact.key for fact in alive}
    kinds = [kind for kind in VALUES if set(KEYS[kind]) - taken]
    rivals = sorted({fact.kind for fact in alive} & set(kinds))
    if rivals and rng.random() < SAME_KIND_SHARE:
        kinds = rivals
    kind = kinds[rng.integers(len(kinds))]
    keys = [key for key in KEYS[kind] if key not in taken]
    key = keys[rng.integers(len(keys))]
    return Fact(kind, key, _value(kind, rng))


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """Every template with every key, each with some value."""
    for kind, keys in KEYS.items():
        for key in keys:
            for key_said, templates in (
                (key, _PLANT + _ASK),
                (_yours(key), _ECHO + _NO_ECHO + _ANSWER),
            ):
                for template in templates:
                    text = Fact(kind, key, _value(kind, rng)).say(template, key_said)
                    yield from split(text)


def _one(templates: tuple[str, ...], rng: np.random.Generator) -> str:
    return templates[rng.integers(len(templates))]


def _value(kind: str, rng: np.random.Generator) -> str:
    picks = rng.integers(len(VALUES[kind]), size=_WORDS.get(kind, 1))
    return " ".join(VALUES[kind][pick] for pick in picks)


def _yours(key: str) -> str:
    return re.sub(r"\bmy\b", "your", key)


def split(text: str) -> tuple[str, ...]:
    """The sentences of a turn, each beginning with a capital."""
    found = (sentence.strip() for sentence in re.findall(r"[^.?!]+[.?!]", text))
    return tuple(sentence[0].upper() + sentence[1:] for sentence in found)
