"""How far is real speech from itself? What a study's voice and recogniser say of recordings.

    python scripts/measure_speech.py --model tiny
    python scripts/measure_speech.py --manifest my_held_out.jsonl

Decodes held-out recordings and measures their minutes as a study measures free talk: how far the
voice of either side is from that of its first minute, and from that of the other side; and, where
the recogniser is installed, how much of Moshi's text it hears, against the text of another minute
and the sound of another recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jsonargparse import ArgumentParser

from moshi_ttt.command_line import add_device, add_held_out, add_model, parse, program_parser
from moshi_ttt.data import EncodedRecording, read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.diagnosis.recogniser import Recogniser, agreement, can_recognise
from moshi_ttt.diagnosis.voice import half_spectra, mean_distance_db, voice_distance_db
from moshi_ttt.errors import UserError, run_program, settings_at
from moshi_ttt.evaluation.transcript import said_between, spoken_words
from moshi_ttt.model.source import TINY, ModelSource, open_source
from moshi_ttt.progress import progress
from moshi_ttt.rows import TEXT_ROW, Rows

USUAL = 0.95  # share of the real speech that is within what is called usual

Halves = list[np.ndarray]
"""Spectra of the two halves of a minute."""


@dataclass(slots=True)
class Found:
    """One value a minute; NaN where undefined."""

    first: list[float] = field(default_factory=list)  # dB, between the halves of a first minute
    same: list[float] = field(default_factory=list)  # dB, a later minute from it
    other: list[float] = field(default_factory=list)  # dB, the other side's minutes from it
    own_text: list[float] = field(default_factory=list)  # agreement, 0..1
    other_text: list[float] = field(default_factory=list)  # with the text of another minute
    other_sound: list[float] = field(default_factory=list)  # of another recording's first minute

    def add_voices(self, sides: Sequence[Sequence[Halves]]) -> None:
        """Distances of a recording, whose sides have the same number of minutes, one or more."""
        for side, beside in (sides, sides[::-1]):
            first, *later = side
            self.first.append(voice_distance_db(*first))
            self.same += [mean_distance_db(first, minute) for minute in later]
            self.other += [mean_distance_db(first, minute) for minute in beside]

    def add_words(
        self,
        texts: Sequence[str],
        minutes: Sequence[np.ndarray],
        other: np.ndarray | None,
        rate: int,
    ) -> None:
        """Agreements of a recording's texts and sound, minute by minute.

        Args:
            texts: Moshi's, of each minute.
            minutes: its sound, [samples] each.
            other: a minute of another recording, [samples], if there is one.
            rate: of the sound, in Hz.
        """
        recogniser = Recogniser(texts)
        for number, minute in enumerate(minutes):
            heard = recogniser.hears(minute, rate)
            self.own_text.append(agreement(texts[number], heard))
            self.other_text.append(agreement(texts[number - 1], heard))
        if other is not None:
            self.other_sound.append(agreement(texts[0], recogniser.hears(other, rate)))


def main(args: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    options = parse(_parser(), args)
    with settings_at("", source="--model"):
        source = open_source(options.model)
    manifest = options.manifest or bundled_held_out(source)
    minute = source.clock.steps(60)
    recordings = [
        one
        for one in read_recordings(source, manifest, options.cache_dir)
        if one.steps >= 2 * minute and (one.codes >= 0).all()
    ]
    if not recordings:
        raise UserError(
            f"{manifest} holds no recording of two minutes with text and sound on both sides; give "
            "some with --manifest"
        )
    print("\n".join(tables(measured(source, recordings, options.device))))


def measured(source: ModelSource, recordings: Sequence[EncodedRecording], device: str) -> Found:
    """Voices of all recordings, of whole minutes; and their words, if there is a recogniser."""
    found, clock, rows = Found(), source.clock, Rows.of(source)
    codec, recognises = source.codec(torch.device(device)), can_recognise()
    other: np.ndarray | None = None
    for one in progress(recordings, desc="measuring", unit="recording"):
        count = one.steps // clock.steps(60)
        codes = one.codes[:, : count * clock.steps(60)]
        sides = decode(codec, np.stack([codes[rows.own].numpy(), codes[rows.user].numpy()]))
        minutes = np.split(sides, count, axis=1)
        found.add_voices(
            [[half_spectra(both[side], clock.sample_rate) for both in minutes] for side in range(2)]
        )
        own = [both[0] for both in minutes]
        if recognises:
            words = spoken_words(codes[TEXT_ROW].tolist(), source)
            texts = [said_between(words, 60 * number, 60 * number + 60) for number in range(count)]
            found.add_words(texts, own, other, clock.sample_rate)
        other = own[0]
    return found


def tables(found: Found) -> list[str]:
    """Both measures, and how well they tell one from the other, as lines of text."""
    lines = [
        "| voice (dB) | minutes | median | 5 % | 95 % |",
        "|---|---|---|---|---|",
        _row("halves of a first minute", found.first),
        _row("later minutes from it", found.same),
        _row("the other side's from it", found.other),
        f"Of two minutes the other side's is further away in {_above(found.other, found.same):.2%};"
        f" {_beyond(found.other, found.same):.1%} of its minutes are further than "
        f"{USUAL:.0%} of the same side's.",
    ]
    if found.own_text:
        better = np.greater(found.own_text, found.other_text)[np.isfinite(found.own_text)]
        lines += [
            "| agreement | minutes | median | 5 % | 95 % |",
            "|---|---|---|---|---|",
            _row("of sound with its text", found.own_text),
            _row("with another minute's", found.other_text),
            _row("of another recording's sound", found.other_sound),
            f"Its own text agrees better in {better.mean():.1%} of the minutes.",
        ]
    return lines


def _row(name: str, values: Sequence[float]) -> str:
    known = _known(values)
    cells = (f"{one:.2f}" for one in np.quantile(known, [0.5, 1 - USUAL, USUAL]))
    return f"| {name} | {len(known)} | {' | '.join(cells)} |"


def _known(values: Sequence[float]) -> np.ndarray:
    """Those that are defined."""
    return np.array([value for value in values if np.isfinite(value)])


def _above(some: Sequence[float], others: Sequence[float]) -> float:
    """How often one of some is above one of the others: the area under the ROC curve."""
    return float(np.mean(_known(some)[:, None] > _known(others)))


def _beyond(some: Sequence[float], others: Sequence[float]) -> float:
    """Share of some that are above what is usual of the others."""
    return float(np.mean(_known(some) > np.quantile(_known(others), USUAL)))


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add_model(parser, default=TINY)
    add_held_out(parser)
    add_device(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
