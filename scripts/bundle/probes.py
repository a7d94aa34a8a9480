"""What memory probes say: a fact is planted, acknowledged, later asked for, and answered.

Every value is from a small closed set, so that guessing has a known chance, and always ends its
sentence, so that its words look the same wherever they are said. Facts have keys ("my code", "my
sister's code"): several facts of one kind can be alive, and only the key tells which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from probe_words import ANSWER, ASK, ECHO, KINDS, PLANT, PROMISE, Choice

USER_ASKS_SHARE = 0.95
"""How often the user plants and asks, and Moshi answers: only Moshi's answers are measured."""

RecallClass = Literal["own", "heard"]
"""Whether the one who answers has said the fact before, key and value, or has only heard it."""
Part = Literal["template", "key", "value"]
_UNSEEN: tuple[tuple[Part, ...], ...] = (
    ("template",),
    ("key",),
    ("value",),
    ("template", "key", "value"),
)
"""What may be unseen of a probe, each as often as any other."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to remember, as its owner puts it."""

    kind: str
    key: str
    value: str
    recall_class: RecallClass = "own"
    unseen: tuple[Part, ...] = ()
    """What of it no training recording has."""

    @property
    def words(self) -> int:
        """Words of the value."""
        return KINDS[self.kind].words

    @property
    def chance(self) -> float:
        """How often a guess among the kind's words finds one word of the value."""
        return KINDS[self.kind].chance

    def plant(self, rng: np.random.Generator) -> str:
        """The owner says it."""
        return self.say(self._one(PLANT, rng), self.key)

    def acknowledge(self, rng: np.random.Generator) -> str:
        """The other side says it again, or only that it will remember."""
        said = ECHO if self.recall_class == "own" else PROMISE
        return self.say(self._one(said, rng), _yours(self.key))

    def ask(self, rng: np.random.Generator) -> str:
        """The owner wants to know it again."""
        return self.say(self._one(ASK, rng), self.key)

    def answer(self, rng: np.random.Generator) -> str:
        """The other side says key and value."""
        return self.say(self._one(ANSWER, rng), _yours(self.key))

    def say(self, template: str, key: str) -> str:
        """The template filled in; `key` as the one who says it calls it."""
        return template.format(key=key, value=KINDS[self.kind].article + self.value)

    def _one(self, templates: Choice, rng: np.random.Generator) -> str:
        return _pick(templates.of("template" in self.unseen), rng)


def draw(
    rng: np.random.Generator,
    alive: Collection[Fact],
    *,
    own_share: float = 1.0,
    unseen_share: float = 0.0,
    same_kind_share: float = 0.25,
) -> Fact:
    """A new fact under a key that no fact in `alive` has.

    Args:
        rng: decides everything.
        alive: facts still to be asked for.
        own_share: how often its class is "own".
        unseen_share: how often something about it is in no training recording.
        same_kind_share: how often it is of a kind that is alive, beside what is so by accident.
    """
    recall_class: RecallClass = "own" if rng.random() < own_share else "heard"
    unseen = _UNSEEN[rng.integers(len(_UNSEEN))] if rng.random() < unseen_share else ()
    taken = {fact.key for fact in alive}
    keys = {
        name: [key for key in kind.keys.of("key" in unseen) if key not in taken]
        for name, kind in KINDS.items()
    }
    kinds = [name for name in KINDS if keys[name]]
    rivals = sorted({fact.kind for fact in alive} & set(kinds))
    name = _pick(rivals if rivals and rng.random() < same_kind_share else kinds, rng)
    value = _value(name, "value" in unseen, rng)
    return Fact(name, _pick(keys[name], rng), value, recall_class, unseen)


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """Every template with every key, each with some value, unseen ones too."""
    for name, kind in KINDS.items():
        for key in kind.keys.all:
            for key_said, templates in (
                (key, PLANT.all + ASK.all),
                (_yours(key), ECHO.all + PROMISE.all + ANSWER.all),
            ):
                for template in templates:
                    fact = Fact(name, key, _value(name, rng.random() < 0.25, rng))
                    yield from split(fact.say(template, key_said))


def _pick(options: Collection[str], rng: np.random.Generator) -> str:
    return list(options)[rng.integers(len(options))]


def _value(kind: str, unseen: bool, rng: np.random.Generator) -> str:
    options = KINDS[kind].values.of(unseen)
    return " ".join(_pick(options, rng) for _ in range(KINDS[kind].words))


def _yours(key: str) -> str:
    return re.sub(r"\bmy\b", "your", key)


def split(text: str) -> tuple[str, ...]:
    """The sentences of a contribution, each beginning with a capital."""
    found = (sentence.strip() for sentence in re.findall(r"[^.?!]+[.?!]", text))
    return tuple(sentence[0].upper() + sentence[1:] for sentence in found)
