"""Whole recordings as codes: text row, Moshi's codebooks, the user's codebooks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moshi_ttt.data.alignments import Word, read_alignments
from moshi_ttt.data.audio import read_audio, sound_warnings
from moshi_ttt.data.cache import CodeCache
from moshi_ttt.data.codes import encode_recording
from moshi_ttt.data.codes_file import CodesFormat, read_codes
from moshi_ttt.data.manifest import ManifestEntry, check_manifest, raise_together, read_manifest
from moshi_ttt.data.probes import Probe, read_probes
from moshi_ttt.data.text import TextRow, Tokenizer, lay_text
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import ModelSource
from moshi_ttt.progress import progress
from moshi_ttt.rows import TEXT_ROW

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedRecording:
    """A whole conversation, ready for the language model."""

    name: str
    """Path as the manifest spells it."""
    codes: Tensor
    """[17, T] int64: text, Moshi's 8 codebooks, the user's 8; -1 where nothing is known."""
    probes: tuple[Probe, ...] = ()
    """Facts that Moshi's side is asked for."""

    @property
    def steps(self) -> int:
        """Length T."""
        return self.codes.shape[-1]


class RecordingReader:
    """Turns manifest entries into codes, encoding only what is neither encoded nor cached.

    A codes file is read once, however often it is asked for: the recordings hold the same memory.

    Args:
        source: whose codec and tokenizer are used.
        cache_dir: folder of encoded audio, shared between runs and processes.
    """

    def __init__(self, source: ModelSource, cache_dir: Path) -> None:
        self._source = source
        self._whole: dict[Path, Tensor] = {}  # codes files that were read
        clock = source.clock
        self._cache = CodeCache(
            cache_dir,
            {
                "codec": source.codec_fingerprint,
                "sample_rate": clock.sample_rate,
                "samples_per_step": clock.samples_per_step,
                "codebooks": source.n_q,
            },
        )

    def audio_codes(self, entries: Sequence[ManifestEntry]) -> list[Tensor]:
        """Codes of both channels of every entry, [16, T] int64 each.

        The codec exists only while something has to be encoded, on the GPU if there is one.

        Raises:
            UserError: naming every recording that could not be read; the others are cached.
        """
        whole = self._read_files([entry for entry in entries if entry.is_encoded])
        audio = self._encode_all([entry for entry in entries if not entry.is_encoded])
        return [
            whole[entry.path][1:] if entry.is_encoded else audio[entry.path] for entry in entries
        ]

    def _read_files(self, entries: Sequence[ManifestEntry]) -> dict[Path, Tensor]:
        """Codes of codes files by path, [17, T] int64 each."""
        codes: dict[Path, Tensor] = {}
        problems = []
        for entry in entries:
            try:
                codes[entry.path] = self.codes(entry.path)
            except UserError as error:
                problems.append(f"line {entry.line}: {error}")
        raise_together("reading codes", problems)
        return codes

    def codes(self, path: Path) -> Tensor:
        """Content of a codes file, [17, T] int64.

        Raises:
            UserError: it cannot be used, or was made for another model.
        """
        if path not in self._whole:
            self._whole[path] = read_codes(path, CodesFormat.of(self._source))
        return self._whole[path]

    def _encode_all(self, entries: Sequence[ManifestEntry]) -> dict[Path, Tensor]:
        """Codes of audio files by path, [16, T] int64 each, from the cache where it has them."""
        codes = [self._cache.load(entry.path) for entry in entries]
        # by content: a recording that is listed twice is encoded once
        keys = [self._cache.path(entry.path) for entry in entries]
        missing = {
            key: entry
            for key, entry, found in zip(keys, entries, codes, strict=True)
            if found is None
        }
        encoded = self._encode(missing) if missing else {}
        if missing and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {
            entry.path: encoded[key] if found is None else found
            for entry, key, found in zip(entries, keys, codes, strict=True)
        }

    def _encode(self, missing: Mapping[Path, ManifestEntry]) -> dict[Path, Tensor]:
        """Encode and cache; the codec is freed on return."""
        codec = self._source.codec("cuda" if torch.cuda.is_available() else "cpu")
        encoded: dict[Path, Tensor] = {}
        problems = []
        seconds = round(sum(entry.duration_sec for entry in missing.values()))
        with progress(total=seconds, desc="encoding audio", unit="s", unit_scale=True) as bar:
            for key, entry in missing.items():
                try:
                    audio = self._listen(entry)
                except UserError as error:
                    problems.append(f"line {entry.line}: {error}")
                    continue
                encoded[key] = encode_recording(codec, audio)
                self._cache.store(entry.path, encoded[key])
                bar.update(round(entry.duration_sec))
        raise_together("encoding audio", problems)
        return encoded

    def _listen(self, entry: ManifestEntry) -> Tensor:
        """The sound of a recording, [2, samples]; what is strange about it is logged."""
        clock = self._source.clock
        audio = read_audio(entry.path, clock.sample_rate)
        duration_sec = audio.shape[-1] / clock.sample_rate
        words = read_alignments(entry.alignments_path, duration_sec, clock.step_sec).words
        for warning in sound_warnings(entry.path, audio, clock.sample_rate, words):
            logger.warning("line %d: %s", entry.line, warning)
        return audio

    def read(self, entries: Sequence[ManifestEntry]) -> list[EncodedRecording]:
        """Audio codes of every entry under the text row of its alignments, and its probes.

        Raises:
            UserError: a recording or its alignments could not be read.
        """
        tokenizer = self._source.tokenizer()
        whole = self._read_files([entry for entry in entries if entry.is_encoded])
        audio = self._encode_all([entry for entry in entries if not entry.is_encoded])
        recordings = []
        for entry in entries:
            codes = whole[entry.path] if entry.is_encoded else audio[entry.path]
            words, laid = self._text(entry, codes.shape[-1], tokenizer)
            if not entry.is_encoded:
                codes = torch.cat([laid.tokens[None], codes])
            probes: tuple[Probe, ...] = ()
            if words is not None:
                probes, problems = read_probes(
                    entry.alignments_path,
                    words,
                    laid,
                    codes[TEXT_ROW],
                    tokenizer,
                    self._source.clock,
                )
                raise_together(entry.name, problems)
            recordings.append(EncodedRecording(entry.name, codes, probes))
        return recordings

    def _text(
        self, entry: ManifestEntry, steps: int, tokenizer: Tokenizer
    ) -> tuple[list[Word] | None, TextRow]:
        """Words beside a recording (None if there is no such file), laid over its steps."""
        clock = self._source.clock
        found = read_alignments(entry.alignments_path, clock.seconds(steps), clock.step_sec)
        raise_together(entry.name, found.problems)
        return found.words, lay_text(
            found.words,
            tokenizer,
            steps,
            clock,
            padding_id=self._source.text_padding_id,
            end_of_padding_id=self._source.end_of_text_padding_id,
        )


def read_recordings(source: ModelSource, manifest: Path, cache_dir: Path) -> list[EncodedRecording]:
    """All recordings of a manifest, checked first, so that one error names all that is wrong.

    Args:
        source: whose codec and tokenizer are used.
        manifest: JSON lines, one recording a line.
        cache_dir: of `RecordingReader`.

    Raises:
        UserError: the manifest cannot be read, or something in it cannot be used.
    """
    reader = RecordingReader(source, cache_dir)
    check_manifest(
        manifest, source.clock, source.tokenizer(), decode=False, read=reader.codes
    ).raise_problems()
    return reader.read(read_manifest(manifest)[0])
