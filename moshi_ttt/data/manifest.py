"""Reading and checking manifests: `{"path": "a.wav", "duration": 24.5}`, one recording a line.

A line may name a codes file (`a.npz`, from scripts/encode_manifest.py) in place of the audio.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.data.alignments import Word, read_alignments
from moshi_ttt.data.audio import inspect_audio, read_audio, sound_warnings
from moshi_ttt.data.codes_file import CODES_SUFFIX, CodesFormat, read_codes
from moshi_ttt.data.json_text import is_number, parse_json, read_text
from moshi_ttt.data.probes import read_probes
from moshi_ttt.data.text import TextRow, Tokenizer, lay_text
from moshi_ttt.errors import UserError
from moshi_ttt.files import MISSING, why_unreadable
from moshi_ttt.rows import TEXT_ROW

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One line of a manifest."""

    line: int
    name: str
    """Path as the manifest spells it."""
    path: Path
    """Audio, or a codes file that was made of it."""
    duration_sec: float

    @property
    def is_encoded(self) -> bool:
        """Whether the line names a codes file."""
        return self.path.suffix == CODES_SUFFIX

    @property
    def alignments_path(self) -> Path:
        """The word alignments beside the recording; a codes file holds its text and needs none."""
        return self.path.with_suffix(".json")


@dataclass(slots=True)
class ManifestCheck:
    """What a manifest holds and what is wrong with it."""

    manifest: Path
    recordings: int = 0
    duration_sec: float = 0.0
    words: int = 0
    """The main speaker's usable words, where alignments are at hand."""
    probes: int = 0
    """Memory probes that the main speaker answers."""
    text_tokens: int = 0
    dropped_text_tokens: int = 0
    """Tokens that found no step because the next word came first."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Refuse a manifest with problems.

        Raises:
            UserError: listing them (the first 20 if there are more).
        """
        raise_together(str(self.manifest), self.problems)


def raise_together(where: str, problems: list[str]) -> None:
    """Raise one `UserError` for a list of problems; none if the list is empty."""
    if problems:
        shown = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            shown.append(f"  and {len(problems) - SHOWN_PROBLEMS} more")
        raise UserError("\n".join([f"{where}: {len(problems)} problem(s)", *shown]))


def read_manifest(path: Path) -> tuple[list[ManifestEntry], list[str]]:
    """Parse a manifest without opening what it names.

    Returns:
        Entries of the good lines, and problems of the others.

    Raises:
        UserError: the manifest cannot be read, or has no lines.
    """
    text = read_text(
        path, "manifest", 'give a JSON-lines file of {"path": "a.wav", "duration": 24.5}'
    )
    entries, problems = [], []
    # not splitlines(), which also splits at separators that may stand within a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = parse_json(line)
            name, duration = content["path"], content["duration"]
            if not isinstance(name, str) or not name:
                raise TypeError(f"path={name!r:.80} is not a file name")
            if not is_number(duration) or not 0 < duration < math.inf:
                raise ValueError(f"duration={duration!r:.80} is not a positive number of seconds")
        except (ValueError, KeyError, TypeError) as error:
            problems.append(
                f"line {number}: {line[:80]!r} is malformed ({type(error).__name__}: {error}); the "
                'rule is {"path": "a.wav", "duration": SECONDS}'
            )
        else:
            entries.append(ManifestEntry(number, name, _find(path.parent, name), float(duration)))
    if not entries and not problems:
        raise UserError(f"manifest {path} is empty; it needs at least one recording")
    return entries, problems


def _find(folder: Path, name: str) -> Path:
    """The file of a line, also where another system spelt its separators or its accents."""
    spelt = name.replace("\\", "/")
    for one in (name, spelt, *(unicodedata.normalize(form, spelt) for form in ("NFC", "NFD"))):
        if why_unreadable(folder / one) is None:
            return folder / one
    return folder / name


def check_manifest(
    path: Path,
    clock: Clock,
    tokenizer: Tokenizer,
    *,
    decode: bool,
    codes_format: CodesFormat | None = None,
    read: Callable[[Path], Tensor] | None = None,
) -> ManifestCheck:
    """Open everything a manifest names and collect all that is wrong.

    Args:
        path: the manifest.
        clock: of the codec.
        tokenizer: counts text tokens.
        decode: also decode every sample, which finds damage behind an intact header; slow, and
            done anyway when a recording is first encoded.
        codes_format: what codes files must have been made with; None leaves that to whoever
            reads them (`RecordingReader` always checks).
        read: what reads codes files, e.g. `RecordingReader.codes`, which keeps what it has read;
            None reads them for the check alone.

    Raises:
        UserError: the manifest itself cannot be read, or has no lines.
    """
    entries, problems = read_manifest(path)
    read = read or partial(read_codes, expected=codes_format)
    check = ManifestCheck(path, recordings=len(entries), problems=problems)
    for entry in entries:
        if entry.path != path.parent / entry.name:
            check.warnings.append(
                f"line {entry.line}: {entry.name!r} does not exist; {entry.path} was taken"
            )
        try:
            if entry.is_encoded:
                _check_codes(entry, read(entry.path), clock, tokenizer, codes_format, check)
            else:
                _check_audio(entry, clock, tokenizer, decode, check)
        except UserError as error:
            check.problems.append(f"line {entry.line}: {error}")
    return check


def _check_audio(
    entry: ManifestEntry, clock: Clock, tokenizer: Tokenizer, decode: bool, check: ManifestCheck
) -> None:
    duration_sec, sample_rate = inspect_audio(entry.path)
    audio = read_audio(entry.path, sample_rate) if decode else None
    if sample_rate != clock.sample_rate:
        check.warnings.append(
            f"line {entry.line}: {entry.path} is resampled from {sample_rate} to "
            f"{clock.sample_rate} Hz"
        )
    _check_duration(entry, duration_sec, clock, check)
    words, laid = _check_words(entry, duration_sec, None, clock, tokenizer, check)
    if audio is not None:
        found = sound_warnings(entry.path, audio, sample_rate, words)
        check.warnings += [f"line {entry.line}: {warning}" for warning in found]
    if laid is not None:
        check.text_tokens += laid.written_tokens
        check.dropped_text_tokens += laid.dropped_tokens


def _check_codes(
    entry: ManifestEntry,
    codes: Tensor,
    clock: Clock,
    tokenizer: Tokenizer,
    codes_format: CodesFormat | None,
    check: ManifestCheck,
) -> None:
    duration_sec = clock.seconds(codes.shape[-1])
    _check_duration(entry, duration_sec, clock, check)
    if codes_format is not None:
        check.text_tokens += codes_format.text_tokens(codes)
    if why_unreadable(entry.alignments_path) != MISSING:
        _check_words(entry, duration_sec, codes[TEXT_ROW], clock, tokenizer, check)


def _check_duration(
    entry: ManifestEntry, duration_sec: float, clock: Clock, check: ManifestCheck
) -> None:
    check.duration_sec += duration_sec
    if abs(duration_sec - entry.duration_sec) > clock.step_sec:
        check.problems.append(
            f"line {entry.line}: duration={entry.duration_sec:g} but {entry.path} lasts "
            f"{duration_sec:.3f} s; they may differ by {clock.step_sec:g} s: correct the line"
        )


def _check_words(
    entry: ManifestEntry,
    duration_sec: float,
    text_row: Tensor | None,
    clock: Clock,
    tokenizer: Tokenizer,
    check: ManifestCheck,
) -> tuple[list[Word] | None, TextRow | None]:
    """Check alignments and probes, against a `text_row` [T] where there is one already."""
    found = read_alignments(entry.alignments_path, duration_sec, clock.step_sec)
    check.problems += [f"line {entry.line}: {problem}" for problem in found.problems]
    check.warnings += [f"line {entry.line}: {warning}" for warning in found.warnings]
    if found.words is None or found.problems:
        return None, None
    # only counts and places are used, so the ids of padding do not matter
    laid = lay_text(
        found.words,
        tokenizer,
        clock.steps(duration_sec),
        clock,
        padding_id=0,
        end_of_padding_id=0,
    )
    row = laid.tokens if text_row is None else text_row
    probes, problems = read_probes(entry.alignments_path, found.words, laid, row, tokenizer, clock)
    check.words += len(found.words)
    check.probes += len(probes)
    check.problems += [f"line {entry.line}: {problem}" for problem in problems]
    return found.words, laid
