"""Speech without a synthesiser: codes of phrases that were spoken elsewhere, put together anew.

Synthesising and encoding takes minutes of a core for an hour of sound; pasting codes takes seconds.
Nobody would listen to what results, but to a language model that reads codes it is far nearer to
speech than silence is: a memory learns from it to find words under sound, in many more sentences
than there is speech.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from timeline import SPEAKERS, Placed
from torch import Tensor
from utterance import SAMPLE_RATE, Utterance

from moshi_ttt.clock import Clock
from moshi_ttt.data import CodesFormat, read_manifest
from moshi_ttt.data.alignments import Word
from moshi_ttt.data.codes_file import read_codes
from moshi_ttt.data.text import ZERO_TOKEN
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import ModelSource
from moshi_ttt.rows import Rows

_PAUSE_SEC = 0.6  # a longer one ends what is pasted in one piece
_LEAST_SILENCE_SEC = 1.0
_LOOKED_AT = 60  # places where a phrase begins, of all there are
_MISSING_STEPS = 4  # that a word takes which nobody ever said


@dataclass(frozen=True, slots=True)
class PastedUtterance(Utterance):
    """A sentence of pasted phrases; its audio is nothing but as long."""

    codes: Tensor  # [codebooks, n]
    steps: tuple[int, ...]  # at which its words begin


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What was said without a long pause."""

    words: tuple[str, ...]
    firsts: tuple[int, ...]  # step at which each begins
    lasts: tuple[int, ...]  # and the one after its end
    codes: Tensor  # [codebooks, n]


@dataclass
class _Voice:
    """All that one person said."""

    stretches: list[_Stretch] = field(default_factory=list)
    places: dict[tuple[str, ...], list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Stretch and word where one or two words begin."""
    pauses: list[Tensor] = field(default_factory=list)
    """Codes [codebooks, n] of silence."""

    def add(self, stretch: _Stretch) -> None:
        for at, word in enumerate(stretch.words):
            for words in ((word,), stretch.words[at : at + 2]):
                self.places[words].append((len(self.stretches), at))
        self.stretches.append(stretch)

    def longest(
        self, words: Sequence[str], rng: np.random.Generator
    ) -> tuple[_Stretch, int, int] | None:
        """The longest beginning of `words` that was ever said: where, from which word, how many."""
        places = self.places.get(tuple(words[:2])) or self.places.get(tuple(words[:1]))
        if not places:
            return None
        tried = rng.integers(len(places), size=min(len(places), _LOOKED_AT)).tolist()
        found = [(self.stretches[number], at) for number, at in (places[one] for one in tried)]
        stretch, at = max(found, key=lambda one: _alike(words, one[0].words[one[1] :]))
        return stretch, at, _alike(words, stretch.words[at:])


def _alike(words: Sequence[str], said: Sequence[str]) -> int:
    """How many words are the same from the first on."""
    pairs = enumerate(zip(words, said, strict=False))
    return next((count for count, (a, b) in pairs if a != b), min(len(words), len(said)))


Voices = dict[str, _Voice]


class PastedSpeaker:
    """Says what it is told in phrases that a voice said before."""

    def __init__(self, voice: _Voice, rng: np.random.Generator, clock: Clock) -> None:
        self._voice, self._rng, self._clock = voice, rng, clock

    def say(self, sentence: str) -> PastedUtterance:
        """One sentence; a word that the voice never said is silence."""
        words = sentence.split()
        pieces: list[Tensor] = []
        steps: list[int] = []  # at which each word begins and ends
        ends: list[int] = []
        while len(steps) < len(words):
            length = sum(piece.shape[1] for piece in pieces)
            found = self._voice.longest(words[len(steps) :], self._rng)
            if found is None:
                pieces.append(self.silence(_MISSING_STEPS))
                steps.append(length)
                ends.append(length + _MISSING_STEPS)
                continue
            stretch, at, count = found
            first, last = stretch.firsts[at], stretch.lasts[at + count - 1]
            pieces.append(stretch.codes[:, first:last])
            steps += [length + one - first for one in stretch.firsts[at : at + count]]
            ends += [length + one - first for one in stretch.lasts[at : at + count]]
        codes = torch.cat(pieces, dim=1)
        seconds = [self._clock.seconds(one) for one in (*steps, *ends)]
        spans = zip(words, seconds[: len(words)], seconds[len(words) :], strict=True)
        audio = np.zeros(round(self._clock.seconds(codes.shape[1]) * SAMPLE_RATE), np.float32)
        return PastedUtterance(audio, tuple(spans), codes, tuple(steps))

    def silence(self, steps: int) -> Tensor:
        """Codes [codebooks, steps] of the voice's pauses."""
        tape: list[Tensor] = []
        while sum(one.shape[1] for one in tape) < steps:
            tape.append(self._voice.pauses[self._rng.integers(len(self._voice.pauses))])
        return torch.cat(tape, dim=1)[:, :steps]


@dataclass(frozen=True)
class WordBank:
    """Every voice of some conversations, by side; Moshi's first."""

    sides: tuple[Voices, Voices]

    @classmethod
    def read(cls, manifest: Path, source: ModelSource) -> WordBank:
        """Take recordings apart.

        Args:
            manifest: what `encode_manifest.py --with_words` made of generated conversations.
            source: the model whose codec made them.

        Raises:
            UserError: the manifest or a recording cannot be read, or has no words beside it.
        """
        rows, made_with = Rows.of(source), CodesFormat.of(source)
        sides: tuple[Voices, Voices] = defaultdict(_Voice), defaultdict(_Voice)
        for entry in read_manifest(manifest)[0]:
            if not entry.alignments_path.is_file():
                raise UserError(f"{entry.path} has no words beside it; encode it --with_words")
            codes = read_codes(entry.path, made_with)
            beside = json.loads(entry.alignments_path.read_text(encoding="utf-8"))
            for side, own, name, who in zip(
                sides, (rows.own, rows.user), beside["voices"], SPEAKERS, strict=True
            ):
                words = [
                    Word(text, *span) for text, span, one in beside["alignments"] if one == who
                ]
                _take_apart(side[name], words, codes[own], source.clock)
        return cls(sides)

    def speakers(
        self, rng: np.random.Generator, clock: Clock
    ) -> tuple[PastedSpeaker, PastedSpeaker]:
        """One voice of each side, of those that can be silent.

        Raises:
            UserError: a side is never silent for a second.
        """
        usable = [sorted(name for name, one in side.items() if one.pauses) for side in self.sides]
        for names, who in zip(usable, SPEAKERS, strict=True):
            if not names:
                raise UserError(f"--words_of: {who} is never silent for a second; give more speech")
        own, user = (
            side[names[rng.integers(len(names))]]
            for side, names in zip(self.sides, usable, strict=True)
        )
        return PastedSpeaker(own, rng, clock), PastedSpeaker(user, rng, clock)


def lay_pasted(
    placed: Sequence[Placed],
    speakers: tuple[PastedSpeaker, PastedSpeaker],
    source: ModelSource,
    steps: int,
) -> tuple[Tensor, list[Word]]:
    """Codes [17, steps] of a conversation, its text row unknown (-1), and when Moshi says what."""
    rows, clock = Rows.of(source), source.clock
    codes = torch.full((rows.count, steps), ZERO_TOKEN, dtype=torch.int64)
    sides = rows.own, rows.user
    for side, speaker in zip(sides, speakers, strict=True):
        codes[side] = speaker.silence(steps).to(codes.dtype)
    words = []
    for item in placed:
        said = item.utterance
        assert isinstance(said, PastedUtterance)
        first = int(item.start_sec // clock.step_sec)
        there = codes[sides[item.speaker], first : first + said.codes.shape[1]]
        there.copy_(said.codes[:, : there.shape[1]])
        if item.speaker == 0:
            for (text, start, end), step in zip(said.words, said.steps, strict=True):
                start_sec = clock.seconds(first + step)
                words.append(Word(text, start_sec, start_sec + end - start))
    return codes, words


def _take_apart(voice: _Voice, words: Sequence[Word], codes: Tensor, clock: Clock) -> None:
    """Add what one side of a recording says, and its pauses."""
    spans = [_span(word, clock) for word in words]
    breaks = [
        number
        for number in range(1, len(words))
        if words[number].start_sec - words[number - 1].end_sec > _PAUSE_SEC
    ]
    for first, last in zip([0, *breaks], [*breaks, len(words)], strict=True):
        if first == last:
            continue
        begin, end = spans[first][0], spans[last - 1][1]
        firsts, lasts = zip(*((a - begin, b - begin) for a, b in spans[first:last]), strict=True)
        said = tuple(word.text for word in words[first:last])
        voice.add(_Stretch(said, firsts, lasts, codes[:, begin:end].clone()))
    edges = [0, *(edge for span in spans for edge in span), codes.shape[1]]
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if end - begin >= clock.steps(_LEAST_SILENCE_SEC):
            voice.pauses.append(codes[:, begin:end].clone())


def _span(word: Word, clock: Clock) -> tuple[int, int]:
    first = int(word.start_sec // clock.step_sec)
    return first, max(first + 1, clock.steps(word.end_sec))
