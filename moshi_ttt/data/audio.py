"""Reading recordings: two channels at the codec's sample rate, or an error that names the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
LOUDEST = 4.0  # +12 dB over full scale; a click as loud changes 2 s of codes
SILENCE = 1e-3  # -60 dB
RATES = (4_000, 384_000)  # Hz
BLOCK_SAMPLES = 2**20
MOST_SAMPLES = 2**29  # of a channel: 4 GiB when read, 6.2 h at 24 kHz


def inspect_audio(path: Path, channels: Sequence[int] = (CHANNELS,)) -> tuple[float, int]:
    """Read the header only.

    Args:
        path: any format that libsndfile reads.
        channels: how many there may be.

    Returns:
        Length in seconds, and the sample rate.

    Raises:
        UserError: missing, unreadable, empty, of other channels, or a header that claims an
            impossible rate or length.
    """
    require_readable(path, "audio file", PATHS_REMEDY)
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless, by its name
        raise UserError(
            f"{path} is not readable audio ({error}); convert it to WAV, FLAC or Ogg, or remove "
            "the line"
        ) from error
    if info.channels not in channels:
        if 1 in channels:
            raise UserError(
                f"{path} has {info.channels} channels; give one, or two of which the right is the "
                "user"
            )
        raise UserError(
            f"{path} has {info.channels} channel(s); two are needed, left = Moshi, right = user. "
            "For a recording of Moshi's side alone add a silent user, e.g. "
            "`sox in.wav out.wav remix 1 0`"
        )
    if info.frames == 0:
        raise UserError(f"{path} holds no samples; remove the line")
    if not RATES[0] <= info.samplerate <= RATES[1]:
        raise UserError(
            f"{path} claims {info.samplerate} samples a second; the rule is {RATES[0]}.."
            f"{RATES[1]}: convert it, or remove the line"
        )
    if info.frames > MOST_SAMPLES:
        raise UserError(
            f"{path} claims {info.frames} samples a channel, the most is {MOST_SAMPLES} "
            f"({MOST_SAMPLES / info.samplerate / 3600:.1f} h at its rate): cut it, convert it if "
            "its header is wrong, or remove the line"
        )
    return info.frames / info.samplerate, info.samplerate


def read_user(path: Path, sample_rate: int) -> Tensor:
    """The user's side of a recording, [samples] float32: its only channel, or the right of two.

    Arguments and errors as of `read_audio`.
    """
    return read_audio(path, sample_rate, (1, CHANNELS))[-1]


def read_audio(path: Path, sample_rate: int, channels: Sequence[int] = (CHANNELS,)) -> Tensor:
    """Read a whole recording, stereo unless told otherwise, resampled where needed.

    Args:
        path: any format that libsndfile reads.
        sample_rate: wanted rate, Hz.
        channels: how many there may be.

    Returns:
        [channels, samples] float32.

    Raises:
        UserError: as `inspect_audio`, or the body is damaged, cut short, or holds NaN, infinity or
            samples far beyond full scale.
    """
    duration_sec, file_rate = inspect_audio(path, channels)
    expected = round(duration_sec * file_rate)
    decoded = 0
    try:
        with soundfile.SoundFile(path) as file:
            samples = np.empty((file.channels, expected), np.float32)
            # in blocks: only what is there takes memory, whatever the header says
            for start in range(0, expected, BLOCK_SAMPLES):
                block = file.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
                decoded = start + len(block)
                samples[:, start:decoded] = block.T
                if len(block) < BLOCK_SAMPLES:  # the end, or damage behind which some formats go on
                    break
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{path} is damaged: its header reads, its samples do not ({error}); restore the "
            "file or remove the line"
        ) from error
    if decoded != expected:
        raise UserError(
            f"{path} is cut short: {decoded} of {expected} samples decode; restore the file "
            "or remove the line"
        )
    _check_loudness(path, samples)
    if file_rate != sample_rate:
        samples = _resample(samples, file_rate, sample_rate)
    return torch.from_numpy(np.ascontiguousarray(samples))


def _check_loudness(path: Path, samples: np.ndarray) -> None:
    """Refuse samples that are no sound; no copy is made of them if they are."""
    loudest = float(max(samples.max(), -samples.min()))  # NaN if there is one
    if not math.isfinite(loudest):
        raise UserError(f"{path} holds NaN or infinite samples; re-export it or remove the line")
    if loudest > LOUDEST:
        loud = int((np.abs(samples) > LOUDEST).sum())
        raise UserError(
            f"{path}: {loud} of {samples.size} samples are beyond {LOUDEST:g}, the loudest is "
            f"{loudest:g}; sound lies within -1..1: divide integers kept as floats by their full "
            "scale (16 bits: 32768), repair clicks, and export it again, or remove the line"
        )


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
    """Polyphase resampling, [channels, samples] at both ends.

    scipy's own filter lets through what lies just above the lower Nyquist frequency (-12 dB at
    1.05 times, -23 dB at 1.1 times); three times its length stops it at -85 dB and is flat to
    0.86 times.
    """
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    half_length = 32 * max(up, down)
    window = signal.firwin(2 * half_length + 1, 0.93 / max(up, down), window=("kaiser", 8.0))
    return signal.resample_poly(samples, up, down, axis=1, window=window.astype(samples.dtype))
