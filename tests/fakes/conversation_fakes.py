"""Conversations that no voice has to speak, for the tests of their generator."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"
WORD_SEC, SPOKEN_SEC, MARGIN_SEC = 0.25, 0.21, 0.05
MODULES = (
    "conversation",
    "make_conversations",
    "probe_words",
    "probes",
    "splits",
    "timeline",
    "voices",
)
SPLITS = ("train", "far", "farther", "crowded", "heldout", "final")


def bare(word: str) -> str:
    return word.strip(".,?!").lower()


class Metronome:
    """Says every word in the same time."""

    def __init__(self, utterance: type) -> None:
        self._utterance = utterance

    def say(self, sentence: str) -> Any:
        starts = [(word, MARGIN_SEC + i * WORD_SEC) for i, word in enumerate(sentence.split())]
        samples = round((2 * MARGIN_SEC + len(starts) * WORD_SEC) * 24_000)
        words = tuple((word, start, start + SPOKEN_SEC) for word, start in starts)
        return self._utterance(np.zeros(samples, np.float32), words)


def make_plan(scripts: dict[str, ModuleType], split: str, seed: int, minutes: float = 8) -> Any:
    speaker = Metronome(scripts["voices"].Utterance)
    rng = np.random.default_rng(seed)
    chosen = scripts["splits"].SPLITS[split]
    return scripts["timeline"].plan((speaker, speaker), rng, 60 * minutes, chosen)


def every_plan(plans: dict[str, list[Any]]) -> list[Any]:
    return [plan for split in SPLITS for plan in plans[split]]


def every_probe(plans: dict[str, list[Any]]) -> list[Any]:
    return [probe for plan in every_plan(plans) for probe in plan.probes]
