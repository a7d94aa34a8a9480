"""The text of the bundled conversations: a small seeded grammar of small talk.

An exchange (`topics.txt`) is a few lines between the roles A and B. `{slot}` is filled from `SLOTS`
and stays bound for the rest of the exchange, so that what was said is what is later talked about;
`{slot2}` is another filling of the same slot. `[one|other]` picks one. Every line is plain words
and `.,?!`, which a synthesiser reads one word at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import probes
from probe_words import KINDS

MOSHI, USER = 0, 1  # speakers, as the channels: left, right

# what a probe may ask for is talked about too, in the same words: unseen ones are no strange words
SLOTS: dict[str, tuple[str, ...]] = {
    **{name: KINDS[name].values.all for name in KINDS if name not in ("code", "number")},
    "number": (*KINDS["number"].values.all[2:], "ten"),
    "dish": (*KINDS["dish"].values.all, "apple pie"),
    "spice": ("garlic", "ginger", "pepper", "lemon", "basil", "honey", "cinnamon", "mint"),
    "pet": ("Max", "Bella", "Coco", "Rocky", "Daisy", "Charlie", "Luna"),
    "plant": ("tomatoes", "roses", "beans", "tulips", "carrots", "strawberries", "sunflowers"),
    "weather": ("sunny", "rainy", "windy", "cloudy", "foggy", "snowy", "warm", "cold"),
    "tool": ("piano", "guitar", "violin", "drums", "flute", "cello"),
    "vehicle": ("train", "bus", "plane", "car", "boat", "bicycle"),
    "relative": ("sister", "brother", "mother", "father", "cousin", "uncle", "aunt", "neighbour"),
    "job": ("teacher", "doctor", "baker", "painter", "farmer", "pilot", "writer", "engineer"),
    "thing": ("keys", "glasses", "phone", "umbrella", "wallet", "jacket", "notebook", "camera"),
    "room": ("kitchen", "garden", "office", "garage", "hallway", "bedroom", "living room"),
    "good": ("wonderful", "lovely", "great", "perfect", "really nice", "very kind"),
    "book": ("mystery", "story about the sea", "history of trains", "book of poems", "love story"),
}

GREETING = (
    "A: [Hello|Hi|Good morning|Good evening], this is {name}. "
    "[How are you today?|How is it going?]",
    "B: [Hi|Hello] {name}. [I am fine, thank you.|I am doing very well.|Not bad at all.] "
    "[And how are you?|What about you?]",
    "A: [I am good too.|A little tired, but happy.|Very well, thanks.] "
    "[What would you like to talk about?|Do you have some time to talk?|What is new?]",
)
BACKCHANNELS = ("Right.", "Okay.", "I see.", "Yes.", "Sure.", "Oh, nice.", "Really?", "Uh huh.")


@dataclass(frozen=True, slots=True)
class Topic:
    """One exchange of small talk."""

    name: str
    lines: tuple[str, ...]
    held_out: bool
    """Never in training recordings."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one side says before the other answers."""

    speaker: int  # MOSHI or USER
    sentences: tuple[str, ...]


@cache
def topics(held_out: bool) -> tuple[Topic, ...]:
    """All topics of training, or all held-out ones."""
    text = (Path(__file__).parent / "topics.txt").read_text(encoding="utf-8")
    found = []
    for block in text.split("\n== ")[1:]:
        title, *lines = block.strip().splitlines()
        name, mark, _ = title.partition(" (held out)")
        found.append(Topic(name, tuple(lines), bool(mark)))
    return tuple(topic for topic in found if topic.held_out == held_out)


def conversation(rng: np.random.Generator, held_out: bool = False) -> Iterator[Contribution]:
    """What is said in one conversation, without end: a greeting, then exchanges in random order."""
    yield from _contributions(GREETING, rng)
    while True:
        for index in rng.permutation(len(topics(held_out))):
            yield from _contributions(topics(held_out)[index].lines, rng)


def backchannel(rng: np.random.Generator) -> str:
    """What a listener says while the other goes on."""
    return BACKCHANNELS[rng.integers(len(BACKCHANNELS))]


def sentences(seed: int) -> Iterator[str]:
    """Everything that may be said, a few times over: what a tokenizer should know.

    Small talk of all topics, held out or not, back-channels, and every template of the probes.
    """
    rng = np.random.default_rng(seed)
    for _ in range(20):
        for held_out in (False, True):
            for said in itertools.islice(conversation(rng, held_out), 160):
                yield from said.sentences
        yield from BACKCHANNELS
        yield from probes.sentences(rng)


def _contributions(exchange: tuple[str, ...], rng: np.random.Generator) -> Iterator[Contribution]:
    bound: dict[str, str] = {}
    first = int(rng.integers(2))
    for line in exchange:
        role, _, template = line.partition(": ")
        yield Contribution(
            first if role == "A" else 1 - first, probes.split(_expand(template, rng, bound))
        )


def _expand(template: str, rng: np.random.Generator, bound: dict[str, str]) -> str:
    def choose(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return options[rng.integers(len(options))]

    def fill(match: re.Match[str]) -> str:
        name, slot = match[1], match[1].rstrip("2")
        if name not in bound:
            # `{room2}` is another room than `{room}`
            free = [word for word in SLOTS[slot] if word not in bound.values()]
            bound[name] = free[rng.integers(len(free))]
        return bound[name]

    return re.sub(r"\{(\w+)\}", fill, re.sub(r"\[([^\]]+)\]", choose, template))
