"""Does it go on in the voice it began with? Pure functions of samples.

A voice is told by its long-term average spectrum: what is said evens out in a quarter of a minute
of speech, what the vocal tract adds to all of it stays. `scripts/measure_speech.py` measures how
far real speech is from itself, and from other voices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moshi_ttt.diagnosis.jumps import finite_mean
from moshi_ttt.diagnosis.spectrum import FFT_SAMPLES, HOP_SAMPLES, heard_power

BANDS = 20
EDGES_HZ = 100 * 2 ** ((np.arange(BANDS + 1) - 0.5) / 3)
"""Of the bands, thirds of an octave around 100 Hz to 8 kHz."""
FLOOR = 1e-6  # of the whole power: 60 dB below it nothing is told from silence
LEAST_SEC = 5.0  # of sound; in less, what is said weighs more than who says it


def voice_spectrum(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Long-term average spectrum of what is not silent, its level removed.

    Args:
        samples: [n], full scale 1.
        sample_rate: in Hz.

    Returns:
        Level of each third of an octave above their mean, in dB, [20]; NaN where less than 5 s
        are not silent.
    """
    power = heard_power(samples.astype(np.float64))
    if len(power) * HOP_SAMPLES < LEAST_SEC * sample_rate:
        return np.full(BANDS, np.nan)
    # up to the upper edge of each bin, so that a band may begin and end inside a bin
    below = np.cumsum(power.mean(axis=0))
    upper_hz = (np.arange(len(below)) + 0.5) * sample_rate / FFT_SAMPLES
    bands = np.diff(np.interp(EDGES_HZ, upper_hz, below))
    level_db = 10 * np.log10(bands + FLOOR * below[-1])
    return level_db - level_db.mean()


def half_spectra(minute: np.ndarray, sample_rate: int) -> list[np.ndarray]:
    """`voice_spectrum` of either half of a minute, [samples]."""
    return [voice_spectrum(half, sample_rate) for half in np.array_split(minute, 2)]


def voice_distance_db(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two voices' spectra [20] in dB; NaN if one is."""
    return float(np.sqrt(np.mean(np.square(one - other))))


def voice_drift(minutes: Sequence[np.ndarray], sample_rate: int) -> list[float]:
    """How far the voice of each minute is from that of the first, in dB.

    Half minutes are compared, each with both of the first minute, so that the first has a
    value of the same kind: the distance between its own two.

    Args:
        minutes: [samples] each.
        sample_rate: in Hz.

    Returns:
        One value a minute; NaN where less than 5 s of every half, or of the first minute's, are
        not silent.
    """
    halves = [half_spectra(minute, sample_rate) for minute in minutes]
    return [
        voice_distance_db(*minute) if number == 0 else mean_distance_db(halves[0], minute)
        for number, minute in enumerate(halves)
    ]


def mean_distance_db(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Mean distance of each spectrum of the ones from each of the others; NaN without any."""
    distances = [voice_distance_db(one, other) for one in some for other in others]
    return finite_mean(np.array(distances))
