"""Reading recordings: two channels at the codec's sample rate, or an error that names the file."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy import signal
from torch import Tensor

from moshi_ttt.data.alignments import Word
from moshi_ttt.data.json_text import PATHS_REMEDY
from moshi_ttt.errors import UserError
from moshi_ttt.files import require_readable

CHANNELS = 2  # left is Moshi, right is the user
LOUDEST = (
    4.0  # +12 dB over full scale; a codec hears all of a recording through its loudest samples
)
SILENCE = 1e-3  # -60 dB


def inspect_audio(path: Path) -> tuple[float, int]:
    """Read the header only.

    Returns:
        Length in seconds, and the sample rate.

    Raises:
        UserError: missing, unreadable, empty, or not stereo.
    """
    require_readable(path, "audio file", PATHS_REMEDY)
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{path} is not readable audio ({error}); convert it to WAV, FLAC or Ogg, or remove "
            "the line"
        ) from error
    if info.channels != CHANNELS:
        raise UserError(
            f"{path} has {info.channels} channel(s); two are needed, left = Moshi, right = user. "
            "For a recording of Moshi's side alone add a silent user, e.g. "
            "`sox in.wav out.wav remix 1 0`"
        )
    if info.frames == 0:
        raise UserError(f"{path} holds no samples; remove the line")
    return info.frames / info.samplerate, info.samplerate


def read_audio(path: Path, sample_rate: int) -> Tensor:
    """Read a whole stereo recording, resampled where needed.

    Args:
        path: any format that libsndfile reads.
        sample_rate: wanted rate, Hz.

    Returns:
        [2, samples] float32.

    Raises:
        UserError: as `inspect_audio`, or the body is damaged, cut short, or holds NaN, infinity or
            samples far beyond full scale.
    """
    duration_sec, file_rate = inspect_audio(path)
    try:
        samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{path} is damaged: its header reads, its samples do not ({error}); restore the "
            "file or remove the line"
        ) from error
    expected = round(duration_sec * file_rate)
    if len(samples) != expected:
        raise UserError(
            f"{path} is cut short: {len(samples)} of {expected} samples decode; restore the file "
            "or remove the line"
        )
    if not np.isfinite(samples).all():
        raise UserError(f"{path} holds NaN or infinite samples; re-export it or remove the line")
    loudest = float(np.abs(samples).max())
    if loudest > LOUDEST:
        loud = int((np.abs(samples) > LOUDEST).sum())
        raise UserError(
            f"{path}: {loud} of {samples.size} samples are beyond {LOUDEST:g}, the loudest is "
            f"{loudest:g}; sound lies within -1..1: divide integers kept as floats by their full "
            "scale (16 bits: 32768), repair clicks, and export it again, or remove the line"
        )
    if file_rate != sample_rate:
        samples = _resample(samples, file_rate, sample_rate)
    return torch.from_numpy(np.ascontiguousarray(samples.T))


def sound_warnings(
    path: Path, audio: Tensor, sample_rate: int, words: Sequence[Word] | None
) -> list[str]:
    """What a listener would find strange in a recording that can be used.

    Args:
        path: of the recording.
        audio: [2, samples].
        sample_rate: of `audio`, Hz.
        words: of the main speaker, who is on the left.
    """
    found = []
    left, right = audio
    if (left - right).abs().max() <= SILENCE * left.abs().max():
        found.append(
            f"{path}: both channels are the same, so Moshi hears itself as the user; left must be "
            "Moshi alone, right the user alone"
        )
    duration_sec = len(left) / sample_rate
    heard = [
        left[slice(*(round(min(max(0.0, end), duration_sec) * sample_rate) for end in ends))]
        for ends in ((word.start_sec, word.end_sec) for word in words or ())
    ]
    silent = sum(not bool((stretch.abs() > SILENCE).any()) for stretch in heard)
    if 2 * silent > len(heard):
        found.append(
            f"{path}: {silent} of {len(heard)} words of Moshi lie where the left channel is "
            "silent; left must be Moshi, and times are seconds from the start of this file"
        )
    return found


def _resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Polyphase resampling, [samples, channels] at both ends.

    scipy's own filter lets through what lies just above the lower Nyquist frequency (-12 dB at
    1.05 times, -23 dB at 1.1 times); three times its length stops it at -85 dB and is flat to
    0.86 times.
    """
    divisor = gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    half_length = 32 * max(up, down)
    window = signal.firwin(2 * half_length + 1, 0.93 / max(up, down), window=("kaiser", 8.0))
    return signal.resample_poly(samples, up, down, axis=0, window=window.astype(samples.dtype))
