"""What sounds, frame by frame, as a power spectrum."""

from __future__ import annotations

import numpy as np

SILENT_RMS = 10 ** (-50 / 20)  # -50 dB below full scale
FFT_SAMPLES = 1024  # 43 ms at 24 kHz
HOP_SAMPLES = FFT_SAMPLES // 2


def is_silent(frames: np.ndarray) -> np.ndarray:
    """Whether there is nothing to hear in each frame, [..., samples] to bool [...]."""
    silent: np.ndarray = np.sqrt(np.mean(np.square(frames), axis=-1)) < SILENT_RMS
    return silent


def heard_power(samples: np.ndarray) -> np.ndarray:
    """Power spectra of the frames that are not silent.

    Args:
        samples: [n], full scale 1.

    Returns:
        [frames, FFT_SAMPLES // 2 + 1], a frame each HOP_SAMPLES that are heard.
    """
    if len(samples) < FFT_SAMPLES:
        return np.empty((0, FFT_SAMPLES // 2 + 1))
    frames = np.lib.stride_tricks.sliding_window_view(samples, FFT_SAMPLES)[::HOP_SAMPLES]
    heard = frames[~is_silent(frames)]
    power: np.ndarray = np.square(np.abs(np.fft.rfft(heard * np.hanning(FFT_SAMPLES), axis=1)))
    return power
