"""A spoken sentence and when each word was spoken, cut and levelled as all voices are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 24_000
_FRAME_SEC = 0.005
_MARGIN_SEC = 0.05  # kept before the first and after the last word
_FADE_SEC = 0.01
_SPEECH_RMS = 0.06


@dataclass(frozen=True, slots=True)
class Utterance:
    """One spoken sentence."""

    audio: np.ndarray  # [samples] float32 at `SAMPLE_RATE`, peak below 1
    words: tuple[tuple[str, float, float], ...]  # word, start and end in seconds

    @property
    def duration_sec(self) -> float:
        """How long it sounds."""
        return len(self.audio) / SAMPLE_RATE


def tidied(audio: np.ndarray, words: list[tuple[str, float, float]]) -> Utterance:
    """Without the silence around its words, which differs between the voices, at one loudness.

    Args:
        audio: [samples] at `SAMPLE_RATE`.
        words: each with its start and end in seconds, which may hold silence too.
    """
    loud = _loud(audio)
    words = [(word, *_trim(start, end, loud)) for word, start, end in words]
    start_sec = max(0.0, words[0][1] - _MARGIN_SEC)
    first, last = (
        round(start_sec * SAMPLE_RATE),
        round((words[-1][2] + _MARGIN_SEC) * SAMPLE_RATE),
    )
    audio = audio[first:last]
    fade = round(_FADE_SEC * SAMPLE_RATE)
    window = np.ones(len(audio), np.float32)
    window[:fade] = np.linspace(0, 1, fade)
    window[-fade:] = np.linspace(1, 0, fade)
    gain = min(_SPEECH_RMS / audio.std(), 0.9 / np.abs(audio).max())
    moved = tuple((word, start - start_sec, end - start_sec) for word, start, end in words)
    return Utterance(audio * window * np.float32(gain), moved)


def _loud(audio: np.ndarray) -> np.ndarray:
    """Which frames of `_FRAME_SEC` are less than 35 dB below the loudest one, [frames]."""
    frame = round(_FRAME_SEC * SAMPLE_RATE)
    power = np.square(audio[: len(audio) // frame * frame]).reshape(-1, frame).mean(axis=1)
    return power > power.max() * 10**-3.5


def _trim(start_sec: float, end_sec: float, loud: np.ndarray) -> tuple[float, float]:
    """Take the silence off both ends of a word; the graphs give pauses to the sounds around."""
    first, last = int(start_sec / _FRAME_SEC), int(end_sec / _FRAME_SEC)
    heard = first + np.flatnonzero(loud[first : last + 1])
    if not len(heard):
        return start_sec, end_sec
    return max(start_sec, heard[0] * _FRAME_SEC), min(end_sec, (heard[-1] + 1) * _FRAME_SEC)
