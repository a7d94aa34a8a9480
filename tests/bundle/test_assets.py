"""The bundled files are small, and the demo's words are where its sound is."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moshi_ttt.model.source import ASSETS

DEMO = ASSETS / "demo"
SAMPLE_RATE = 24_000
SPEAKERS = ("SPEAKER_MAIN", "SPEAKER_USER")  # left, right


@dataclass(frozen=True, slots=True)
class Recording:
    path: Path
    audio: np.ndarray  # [samples, 2]
    alignments: list[tuple[str, tuple[float, float], str]]

    def words(self, channel: int) -> list[tuple[float, float]]:
        """Spans in seconds of one side's words."""
        return [span for _, span, speaker in self.alignments if speaker == SPEAKERS[channel]]


def entries(manifest: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DEMO / manifest).read_text().splitlines()]


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    found = []
    for entry in entries("train.jsonl") + entries("val.jsonl"):
        path = DEMO / str(entry["path"])
        audio, sample_rate = soundfile.read(path, dtype="float32")
        assert sample_rate == SAMPLE_RATE
        found.append(
            Recording(path, audio, json.loads(path.with_suffix(".json").read_text())["alignments"])
        )
    return found


def size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def test_bundles_stay_small() -> None:
    assert size_mb(DEMO) < 6
    assert size_mb(ASSETS / "tiny") < 36  # ten million weights in bf16, a memory and a codec
    assert size_mb(ASSETS / "conversations") < 5
    assert size_mb(ASSETS) < 48


@pytest.mark.parametrize(("manifest", "least_sec"), [("train.jsonl", 170), ("val.jsonl", 185)])
def test_manifest_durations_match_the_files(manifest: str, least_sec: float) -> None:
    for entry in entries(manifest):
        info = soundfile.info(DEMO / str(entry["path"]))
        assert (info.samplerate, info.channels) == (SAMPLE_RATE, 2)
        assert entry["duration"] == pytest.approx(info.frames / info.samplerate)
        assert info.frames / info.samplerate >= least_sec


def test_validation_recordings_are_held_out() -> None:
    train, val = (
        {entry["path"] for entry in entries(f"{name}.jsonl")} for name in ("train", "val")
    )
    assert len(train) >= 4
    assert val
    assert not train & val


def test_alignments_are_sorted_and_inside_the_audio(recordings: list[Recording]) -> None:
    for recording in recordings:
        spans = [span for _, span, _ in recording.alignments]
        assert spans == sorted(spans)
        assert all(0 <= start < end <= len(recording.audio) / SAMPLE_RATE for start, end in spans)
        assert all(word and word == word.strip() for word, _, _ in recording.alignments)
        for channel in (0, 1):
            words = recording.words(channel)
            assert len(words) > 100
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(words)), (
                "a side talks over itself"
            )


def test_words_are_loud_and_long_gaps_are_quiet(recordings: list[Recording]) -> None:
    for recording in recordings:
        for channel in (0, 1):
            words = recording.words(channel)
            loud = [rms(recording, channel, start, end) for start, end in words]
            assert min(loud) > 3e-3, "a word without sound"
            gaps = [
                rms(recording, channel, a[1] + 0.1, b[0] - 0.1)
                for a, b in itertools.pairwise(words)
                if b[0] - a[1] > 0.5
            ]
            assert len(gaps) > 20
            assert max(gaps) < 1e-3, "sound where no word is"


def rms(recording: Recording, channel: int, start_sec: float, end_sec: float) -> float:
    first, last = round(start_sec * SAMPLE_RATE), round(end_sec * SAMPLE_RATE)
    return float(np.sqrt(np.square(recording.audio[first:last, channel]).mean()))


def test_no_shift_of_the_alignments_fits_the_sound_better(recordings: list[Recording]) -> None:
    def energy(recording: Recording, channel: int, shift_sec: float) -> float:
        squared = np.square(recording.audio[:, channel])
        spans = [
            (
                max(0, round((start + shift_sec) * SAMPLE_RATE)),
                round((end + shift_sec) * SAMPLE_RATE),
            )
            for start, end in recording.words(channel)
        ]
        return float(sum(squared[first:last].sum() for first, last in spans))

    for recording in recordings:
        for channel in (0, 1):
            shifted = {s: energy(recording, channel, s) for s in (-0.1, -0.05, 0.0, 0.05, 0.1)}
            assert max(shifted, key=lambda s: shifted[s]) == 0.0


def test_both_sides_sometimes_speak_at_once(recordings: list[Recording]) -> None:
    for recording in recordings:
        overlap_sec = sum(
            max(0.0, min(left[1], right[1]) - max(left[0], right[0]))
            for left in recording.words(0)
            for right in recording.words(1)
        )
        assert 0.5 < overlap_sec < 20
