"""Likeness of synthetic voices: pulse trains through the resonances of a vocal tract."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from moshi_ttt.diagnosis.voice import (
    BANDS,
    LEAST_SEC,
    mean_distance_db,
    voice_distance_db,
    voice_drift,
    voice_spectrum,
)

RATE = 24_000
ANNA, BILL = (700.0, 1800.0, 2900.0), (550.0, 1300.0, 2400.0)
ALIKE_DB, OTHER_DB = 1.0, 3.0


def voice(formants: tuple[float, ...], seconds: float = 30.0, seed: int = 0) -> np.ndarray:
    """A glottis of wandering pitch and a bit of breath, filtered at the formants, RMS 0.1."""
    rng = np.random.default_rng(seed)
    count = round(seconds * RATE)
    times = np.arange(0, count + RATE, RATE // 4)
    hertz = 120 * np.exp(np.interp(np.arange(count), times, 0.1 * rng.normal(size=len(times))))
    sound = np.diff(np.floor(np.cumsum(hertz) / RATE), prepend=0) + 0.02 * rng.normal(size=count)
    for formant in formants:
        radius = np.exp(-np.pi * 120 / RATE)
        sound = lfilter(
            [1 - radius], [1, -2 * radius * np.cos(2 * np.pi * formant / RATE), radius**2], sound
        )
    return 0.1 * sound / sound.std()


def distance_db(one: np.ndarray, other: np.ndarray) -> float:
    return voice_distance_db(voice_spectrum(one, RATE), voice_spectrum(other, RATE))


def test_a_voice_is_like_itself_and_unlike_another() -> None:
    anna = voice(ANNA)
    assert distance_db(anna, anna) == 0
    assert distance_db(anna, voice(ANNA, seed=1)) < ALIKE_DB
    assert distance_db(anna, voice(BILL)) > OTHER_DB


def test_neither_level_nor_pauses_make_another_voice() -> None:
    anna = voice(ANNA)
    assert distance_db(anna, 0.25 * anna) == pytest.approx(0, abs=1e-6)
    paused = np.concatenate([anna[: 10 * RATE], np.zeros(20 * RATE), anna[10 * RATE :]])
    assert distance_db(anna, paused) < 0.3


def test_the_spectrum_of_white_noise_rises_by_a_decibel_a_band() -> None:
    noise = 0.1 * np.random.default_rng(0).normal(size=20 * RATE)
    spectrum = voice_spectrum(noise, RATE)
    # each band is a third of an octave wider than the one below it
    np.testing.assert_allclose(np.diff(spectrum), 10 * np.log10(2) / 3, atol=0.4)
    assert spectrum.mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seconds", [0, 0.01, LEAST_SEC - 1])
def test_too_little_that_is_heard_has_no_voice(seconds: float) -> None:
    brief = np.concatenate([voice(ANNA, seconds or 1)[: round(seconds * RATE)], np.zeros(RATE)])
    assert np.isnan(voice_spectrum(brief, RATE)).all()
    assert np.isnan(distance_db(brief, voice(ANNA)))
    assert voice_spectrum(voice(ANNA, LEAST_SEC + 1), RATE).shape == (BANDS,)


def test_each_minute_is_held_against_the_first_and_the_first_against_itself() -> None:
    first, same, other = voice(ANNA, 60), voice(ANNA, 60, seed=1), voice(BILL, 60)
    silent = np.zeros_like(first)
    begun = np.concatenate([same[: 30 * RATE], silent[: 30 * RATE]])
    drift = voice_drift([first, same, other, silent, begun], RATE)
    assert drift[0] == pytest.approx(distance_db(*np.split(first, 2)))
    assert max(drift[0], drift[1], drift[4]) < ALIKE_DB
    assert drift[2] > OTHER_DB
    assert np.isnan(drift[3])
    assert np.isnan(voice_drift([silent, first], RATE)).all()
    assert voice_drift([], RATE) == []


def test_the_mean_distance_leaves_out_what_has_no_voice() -> None:
    level, louder, unheard = np.zeros(BANDS), np.full(BANDS, 2.0), np.full(BANDS, np.nan)
    assert mean_distance_db([level, unheard], [louder, level]) == 1
    assert np.isnan(mean_distance_db([unheard], [level]))
