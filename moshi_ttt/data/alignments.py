"""Reading word alignments: `{"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}`.

What is refused is what says that the timestamps belong to another file or another unit; what
annotators really produce (unsorted, overlapping or empty words) is mended and reported.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAIN_SPEAKER = "SPEAKER_MAIN"


@dataclass(frozen=True, slots=True)
class Word:
    """One spoken word of the main speaker."""

    text: str
    start_sec: float
    """May lie up to a step before the audio; the word is then said at once."""
    end_sec: float


@dataclass(slots=True)
class Alignments:
    """What one alignment file says."""

    words: list[Word] | None = None
    """The main speaker's words by start; None if there is no file."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Not empty: the file must not be used."""


def read_alignments(path: Path, duration_sec: float, step_sec: float) -> Alignments:
    """Read, check and mend the alignments of one recording.

    Args:
        path: JSON file beside the audio; it may be missing, which leaves the text unknown.
        duration_sec: length of the audio.
        step_sec: length of a step, the tolerance for starts outside the audio.
    """
    found = Alignments()
    if not path.is_file():
        found.warnings.append(
            f"alignments {path} do not exist; the text of this recording is unknown to the model"
        )
        return found
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        items = content["alignments"]
        rows = [_row(item) for item in items]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.problems.append(
            f"alignments {path} are malformed ({type(error).__name__}: {error}); the rule is "
            '{"alignments": [["word", [start_sec, end_sec], "SPEAKER_MAIN"], ...]}: annotate the '
            "recording again, or remove the file to train without its text"
        )
        return found

    outside = [row for row in rows if not -step_sec <= row[1] < duration_sec + step_sec]
    if outside:
        text, start, *_ = outside[0]
        found.problems.append(
            f"alignments {path}: {len(outside)} of {len(rows)} words start outside the "
            f"{duration_sec:.2f} s of audio, first {text!r} at {start:g} s; times are seconds from "
            "the start of this file: annotate it again, or remove the alignments"
        )
        return found

    main = [row for row in rows if row[3] == MAIN_SPEAKER]
    usable = [row for row in main if row[2] > row[1] and row[0]]
    ordered = sorted(usable, key=lambda row: row[1])
    found.words = [Word(text, start, end) for text, start, end, _ in ordered]

    overlapping = sum(
        word.end_sec > following.start_sec + step_sec
        for word, following in zip(found.words, found.words[1:], strict=False)
    )
    past_end = sum(word.end_sec > duration_sec + step_sec for word in found.words)
    for applies, what in (
        (not main, f"no {MAIN_SPEAKER} words; the text is all padding"),
        (ordered != usable, "not sorted by start; they were sorted"),
        (len(usable) < len(main), f"{len(main) - len(usable)} empty or without duration, left out"),
        (overlapping, f"{overlapping} overlap the next by over a step, which cuts them short"),
        (past_end, f"{past_end} end after the audio; only starts matter"),
    ):
        if applies:
            found.warnings.append(f"alignments {path}: {what}")
    return found


def _row(item: Any) -> tuple[str, float, float, str]:
    """One alignment as text, start, end, speaker; raises ValueError or TypeError."""
    text, (start, end), speaker = item
    if not isinstance(text, str) or not isinstance(speaker, str):
        raise TypeError(f"word and speaker must be strings, got {item!r}")
    if not all(isinstance(time, int | float) and math.isfinite(time) for time in (start, end)):
        raise TypeError(f"times must be finite numbers, got {item!r}")
    return text.strip(), float(start), float(end), speaker
