"""Memory probes: facts that one side plants, asks for later, and hears from the other side.

They stand in the JSON beside a recording, under `probes`; scripts/bundle/make_conversations.py
writes them. What a model is asked for are the tokens of the answer, so a probe is kept as their
steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.data.alignments import MAIN_SPEAKER, Word
from moshi_ttt.data.json_text import parse_json, read_text
from moshi_ttt.data.text import TextRow, Tokenizer

RULE = (
    'each probe is {"kind": "code", "answered_by": "SPEAKER_MAIN", "answer": [["four", '
    '[start_sec, end_sec]], ...], "gap_sec": 40.2, "chance": 0.1, "class": "own", ...}, its '
    "answer words as they stand in the alignments"
)
RecallClass = Literal["own", "heard"]
"""Whether Moshi has said the fact itself, so that its own text is enough to answer, or the user
alone has said it."""

Spoken = tuple[str, float]  # a word and when it starts, in seconds


@dataclass(frozen=True, slots=True)
class Probe:
    """A fact that Moshi's side is asked for."""

    kind: str
    """What was planted: `code`, `colour`, ..."""
    gap_sec: float
    """From the end of the last mention of the fact to the start of the question."""
    chance: float
    """Of guessing a word of the answer for one who knows only the kind."""
    answer_steps: tuple[range, ...]
    """Of each word of the answer, the steps of its tokens in the text row."""
    recall_class: RecallClass = "own"
    unseen: tuple[str, ...] = ()
    """What of it is in no recording of the training set: `template`, `key`, `value`."""
    asked_step: int | None = None
    """Step in which the question starts; None if the file does not say."""
    asked_until_step: int | None = None
    """Step in which the question ends; None if the file does not say."""
    rivals: int | None = None
    """Other facts of its kind whose last mention came after its own and before the question; None
    if the file does not say when it is asked."""

    @property
    def question_step(self) -> int:
        """Step in which the question starts, or the answer if nothing is known of the question."""
        return self.answer_steps[0].start if self.asked_step is None else self.asked_step


def read_probes(
    path: Path,
    words: Sequence[Word],
    layout: TextRow,
    text_row: Tensor,
    tokenizer: Tokenizer,
    clock: Clock,
) -> tuple[tuple[Probe, ...], list[str]]:
    """Read the probes of one recording that Moshi's side answers: only its words are tokens.

    A word that the next one cuts short counts with the tokens that were written; a word without
    any is left out.

    Args:
        path: JSON file whose alignments were read without a problem.
        words: the main speaker's, from those alignments.
        layout: of those words.
        text_row: [T] what the model reads, which must hold the words where the layout says.
        tokenizer: that the row was made with.
        clock: of the codec.

    Returns:
        The probes, and problems, each naming the file.
    """
    items = parse_json(read_text(path, "probes", RULE)).get("probes", [])
    if not isinstance(items, list):
        return (), [f"{path}: probes={items!r:.40} is not a list; {RULE}"]
    steps_of = {
        (word.text, word.start_sec): steps
        for word, steps in zip(words, layout.word_steps, strict=True)
    }
    mentions = _mentions(items)
    probes, problems = [], []
    for number, item in enumerate(items):
        try:
            if item["answered_by"] != MAIN_SPEAKER:
                continue
            answer = _answer(item, steps_of)
            probe = _probe(item, answer, mentions, clock.seconds(len(text_row) + 1), clock)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(
                f"{path}: probe {number} is malformed ({type(error).__name__}: {error!s:.200}); "
                f"{RULE}"
            )
            continue
        stranger = _first_stranger(answer, text_row, tokenizer)
        if stranger is not None:
            (text, start_sec), steps = stranger
            problems.append(
                f"{path}: probe {number} answers {text!r} at {start_sec:g} s, and the text row "
                f"holds other tokens at step {steps.start}; the file belongs to another version "
                "of the recording: restore it, or encode the recording again with "
                "scripts/encode_manifest.py"
            )
        elif probe.answer_steps:
            probes.append(probe)
    return tuple(probes), problems


def _probe(
    item: dict[str, Any],
    answer: Sequence[tuple[Spoken, range]],
    mentions: Sequence[tuple[str, float]],
    duration_sec: float,
    clock: Clock,
) -> Probe:
    return Probe(
        str(item["kind"]),
        _number(item, "gap_sec", math.inf),
        _number(item, "chance", 1.0),
        tuple(steps for _, steps in answer if steps),
        _recall_class(item),
        _unseen(item),
        _step(item, "asked_at", duration_sec, clock),
        _step(item, "asked_until", duration_sec, clock),
        _rivals(item, mentions),
    )


def _mentions(items: Sequence[Any]) -> list[tuple[str, float]]:
    """Kind and last mention, in seconds, of the facts of which the file says when; both sides'."""
    found = []
    for item in items:
        try:
            found.append((str(item["kind"]), _mentioned_sec(item)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # of what is malformed, reading it tells
    return found


def _mentioned_sec(item: Mapping[str, Any]) -> float:
    return float(item["asked_at"]) - float(item["gap_sec"])


def _rivals(item: Mapping[str, Any], mentions: Sequence[tuple[str, float]]) -> int | None:
    if "asked_at" not in item:
        return None
    since = _mentioned_sec(item)
    return sum(
        kind == str(item["kind"]) and since < at_sec < float(item["asked_at"])
        for kind, at_sec in mentions
    )


def _answer(item: dict[str, Any], steps_of: Mapping[Spoken, range]) -> list[tuple[Spoken, range]]:
    """The words of one probe's answer, as the main speaker says them, and their steps."""
    answer = []
    for text, (start, _) in item["answer"]:
        word = text.strip(), float(start)
        if word not in steps_of:
            raise ValueError(f"the main speaker says no {word[0]!r} at {word[1]:g} s")
        answer.append((word, steps_of[word]))
    return answer


def _first_stranger(
    answer: Sequence[tuple[Spoken, range]], text_row: Tensor, tokenizer: Tokenizer
) -> tuple[Spoken, range] | None:
    """The first word of an answer that the text row does not hold where it should."""
    for (text, start_sec), steps in answer:
        expected = tokenizer.encode(text)[: len(steps)]
        if text_row[steps.start : steps.stop].tolist() != expected:
            return (text, start_sec), steps
    return None


def _number(item: dict[str, Any], key: str, most: float) -> float:
    value = float(item[key])
    if not 0 <= value <= most or math.isinf(value):
        raise ValueError(f"{key}={value:g} is outside 0..{most:g}")
    return value


def _step(item: dict[str, Any], key: str, duration_sec: float, clock: Clock) -> int | None:
    if key not in item:
        return None
    seconds = _number(item, key, duration_sec)
    return round(seconds * clock.sample_rate) // clock.samples_per_step


def _recall_class(item: dict[str, Any]) -> RecallClass:
    # recordings made before there were classes: whether Moshi repeated the value
    found = item.get("class", "own" if item.get("echo") else "heard")
    if found not in get_args(RecallClass):
        raise ValueError(f"class={found!r} is none of {', '.join(get_args(RecallClass))}")
    return cast(RecallClass, found)


def _unseen(item: dict[str, Any]) -> tuple[str, ...]:
    found = item.get("unseen", [])
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        raise ValueError(f"unseen={found!r} is not a list of words")
    return tuple(found)
