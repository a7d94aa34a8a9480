"""Reading word alignments: `{"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}`.

What is refused is what says that the timestamps belong to another file or another unit; what
annotators really produce (unsorted, overlapping or empty words, a few without times, scores) is
mended and reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moshi_ttt.data.json_text import is_number, parse_json, read_text
from moshi_ttt.errors import UserError
from moshi_ttt.files import MISSING, why_unreadable

MAIN_SPEAKER = "SPEAKER_MAIN"
RULE = 'the rule is {"alignments": [["word", [start_sec, end_sec], "SPEAKER_MAIN"], ...]}'
REMEDY = "annotate the recording again, or remove the file to train without its text"
MOST_SPOILT = 0.1  # of the words; beyond it they belong to another file, unit or program

Row = tuple[str, float, float, str]  # text, start and end in seconds, speaker


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
    if why_unreadable(path) == MISSING:
        found.warnings.append(
            f"alignments {path} do not exist; the text of this recording is unknown to the model"
        )
        return found
    try:
        items = _items(parse_json(read_text(path, "alignments", REMEDY)))
    except UserError as error:
        found.problems.append(str(error))
        return found
    except (ValueError, KeyError, TypeError) as error:
        found.problems.append(
            f"alignments {path} are malformed ({type(error).__name__}: {error}); {RULE}: {REMEDY}"
        )
        return found

    rows, spoilt, reshaped = _sort_out(items, duration_sec, step_sec)
    if spoilt:
        what = f"{len(spoilt)} of {len(items)} words cannot be used, first: {spoilt[0]}"
        if not rows or len(spoilt) > max(1, MOST_SPOILT * len(items)):
            found.problems.append(
                f"alignments {path}: {what}; {RULE}, in seconds from the start of this file: "
                f"{REMEDY}"
            )
            return found
        found.warnings.append(f"alignments {path}: {what}; the others are used")

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
        (reshaped, f"{reshaped} of another shape, read as [word, [start_sec, end_sec], speaker]"),
        (not main, f"no {MAIN_SPEAKER} words; the text is all padding"),
        (ordered != usable, "not sorted by start; they were sorted"),
        (len(usable) < len(main), f"{len(main) - len(usable)} empty or without duration, left out"),
        (overlapping, f"{overlapping} overlap the next by over a step, which cuts them short"),
        (past_end, f"{past_end} end after the audio; only starts matter"),
    ):
        if applies:
            found.warnings.append(f"alignments {path}: {what}")
    return found


def _items(content: Any) -> list[Any]:
    """The rows of a file; raises KeyError or TypeError."""
    items = content["alignments"]
    if not isinstance(items, list):
        raise TypeError(f"alignments={items!r:.40} is not a list")
    return items


def _sort_out(
    items: list[Any], duration_sec: float, step_sec: float
) -> tuple[list[Row], list[str], int]:
    """The rows that can be used, what is wrong with the others, and how many had another shape."""
    rows, spoilt, reshaped = [], [], 0
    for item in items:
        try:
            row = _row(item)
        except (ValueError, KeyError, TypeError) as error:
            spoilt.append(f"{item!r:.80} is malformed ({type(error).__name__}: {error!s:.120})")
            continue
        text, start, end, speaker = row
        if -step_sec <= start < duration_sec + step_sec:
            rows.append(row)
            reshaped += not isinstance(item, list) or item[1:] != [[start, end], speaker]
        else:
            spoilt.append(
                f"{text!r:.80} at {start:g} s starts outside the {duration_sec:.2f} s of audio"
            )
    return rows, spoilt, reshaped


def _row(item: Any) -> Row:
    """One alignment as text, start, end, speaker; raises ValueError, KeyError or TypeError.

    Aligners add scores behind the speaker, write times as text or make each word a dictionary.
    """
    if isinstance(item, dict):
        word = item["word"] if "word" in item else item["text"]
        item = word, (item["start"], item["end"]), item["speaker"]
    text, (start, end), speaker, *_ = item
    if not isinstance(text, str) or not isinstance(speaker, str):
        raise TypeError(f"word and speaker must be strings, got {item!r:.80}")
    return text.strip(), _seconds(start), _seconds(end), speaker


def _seconds(value: Any) -> float:
    try:
        time = float(value) if isinstance(value, str) or is_number(value) else math.nan
    except ValueError:
        time = math.nan
    if not math.isfinite(time):
        raise TypeError(f"times must be finite numbers, got {value!r:.40}")
    return time
