"""Measures of audio, text and codes on signals whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moshi_ttt.diagnosis.quality import (
    AUDIO,
    CODES,
    TEXT,
    around,
    audio_measures,
    codes_measures,
    compare,
    distinct_n,
    longest_repeat,
    measure_around,
    nll_measures,
    running_text,
    text_measures,
)

RATE = 24_000
TIME = np.arange(2 * RATE) / RATE


def tone(hertz: float, size: float = 0.5) -> np.ndarray:
    return size * np.sin(2 * np.pi * hertz * TIME)


def test_white_noise_is_flat_and_centred_at_half_the_band() -> None:
    noise = 0.1 * np.random.default_rng(0).normal(size=2 * RATE)
    measures = audio_measures(noise, RATE)
    assert measures["spectral_flatness"] > 0.98
    assert measures["spectral_centroid_hz"] == pytest.approx(6000, rel=0.02)
    assert measures["rms"] == pytest.approx(0.1, rel=0.02)
    assert measures["silence_share"] == 0
    assert measures["clipping_share"] == 0


def test_a_tone_is_not_flat_and_centred_at_its_frequency() -> None:
    measures = audio_measures(tone(440), RATE)
    assert measures["spectral_flatness"] < 0.01
    assert measures["spectral_centroid_hz"] == pytest.approx(440, rel=0.02)
    assert measures["rms"] == pytest.approx(0.5 / math.sqrt(2), rel=1e-3)


def test_noise_beside_a_tone_is_in_between() -> None:
    noise = 0.02 * np.random.default_rng(0).normal(size=2 * RATE)
    flatness = [
        audio_measures(signal, RATE)["spectral_flatness"]
        for signal in (tone(440), tone(440) + noise, noise)
    ]
    assert flatness[0] < flatness[1] < flatness[2]


def test_a_sine_driven_past_full_scale_is_counted_as_clipping() -> None:
    clipped = np.clip(tone(201.7, size=2.0), -1, 1)
    # |2 sin| >= 1 for two thirds of a period
    assert audio_measures(clipped, RATE)["clipping_share"] == pytest.approx(2 / 3, abs=0.01)
    assert audio_measures(tone(200, size=0.99), RATE)["clipping_share"] == 0


def test_silence_has_a_level_and_no_spectrum() -> None:
    measures = audio_measures(np.zeros(RATE), RATE)
    assert measures["rms"] == 0
    assert measures["silence_share"] == 1
    assert math.isnan(measures["spectral_flatness"])
    half = np.concatenate([np.zeros(RATE), tone(300)[:RATE]])
    assert audio_measures(half, RATE)["silence_share"] == pytest.approx(0.5, abs=0.02)
    # only what is heard has a spectrum
    assert audio_measures(half, RATE)["spectral_centroid_hz"] == pytest.approx(300, rel=0.05)


def test_nothing_has_no_measures() -> None:
    empty = np.zeros(0)
    for measures, names in (
        (audio_measures(empty, RATE), AUDIO),
        (text_measures(empty.astype(int), (3, 0)), TEXT),
        (codes_measures(np.zeros((8, 0), dtype=int), 512), CODES),
    ):
        assert tuple(measures) == names
        assert all(math.isnan(value) for value in measures.values())


def test_text_measures_of_a_known_stream() -> None:
    # "one two one two ..." with three padding tokens after each word of two pieces
    words = [[10, 11, 3, 3, 0], [20, 21, 3, 3, 0]]
    tokens = np.array([token for n in range(10) for token in words[n % 2]])
    starts_word = np.zeros(30, dtype=bool)
    starts_word[[10, 20]] = True
    measures = text_measures(tokens, (3, 0), starts_word=starts_word, step_sec=0.08)
    assert measures["padding_share"] == pytest.approx(0.6)
    assert measures["words_per_minute"] == pytest.approx(10 / (50 * 0.08 / 60))
    assert measures["distinct_1"] == pytest.approx(4 / 20)
    assert measures["distinct_3"] == pytest.approx(4 / 18)
    assert measures["repetition"] == pytest.approx(14 / 18)
    # 20 tokens of period 4: 10 from the start would overlap their return at 8
    assert measures["longest_repeat"] == 8


def test_text_that_never_repeats_is_all_distinct() -> None:
    measures = text_measures(np.arange(100, 140), (3, 0))
    assert measures["distinct_2"] == 1
    assert measures["repetition"] == 0
    assert measures["longest_repeat"] == 0
    assert math.isnan(measures["words_per_minute"])


def brute_force_repeat(tokens: list[int]) -> int:
    for length in range(len(tokens) // 2, 0, -1):
        for first in range(len(tokens) - 2 * length + 1):
            for second in range(first + length, len(tokens) - length + 1):
                if tokens[first : first + length] == tokens[second : second + length]:
                    return length
    return 0


def test_longest_repeat_agrees_with_trying_everything() -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        tokens = generator.integers(0, 3, size=generator.integers(0, 16))
        assert longest_repeat(tokens) == brute_force_repeat(tokens.tolist()), tokens


def test_distinct_n_needs_an_n_gram() -> None:
    assert math.isnan(distinct_n(np.array([1]), 2))
    assert distinct_n(np.array([1, 1, 1]), 2) == 0.5


def test_code_use_from_one_code_to_all() -> None:
    every = np.tile(np.arange(16), (8, 1))
    measures = codes_measures(every, 16)
    assert measures["codes_used"] == 1
    assert measures["code_perplexity_first"] == pytest.approx(16)
    one = codes_measures(np.zeros((8, 16), dtype=int), 16)
    assert one["codes_used"] == pytest.approx(1 / 16)
    assert one["code_perplexity_others"] == pytest.approx(1)


def test_nll_takes_the_windows_that_lie_in_the_range() -> None:
    nll = {"window_steps": 10, "start_step": [0, 10, 20, 30], "text": [1.0, 2.0, None, 4.0]}
    assert nll_measures(nll, 8, 22) == {"nll_text": 2.0}
    assert nll_measures(nll, 10, 40) == {"nll_text": 3.0}
    assert math.isnan(nll_measures(nll, 20, 30)["nll_text"])


def test_a_change_is_told_from_none_by_its_interval() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=8)
    moved = compare(before, before + 1 + 0.1 * generator.normal(size=8))
    assert moved["low"] > 0.8
    assert moved["change"] == pytest.approx(1, abs=0.15)
    level = compare(before, before + 0.1 * generator.normal(size=8))
    assert level["low"] < 0 < level["high"]
    single = compare([1.0], [2.0])
    assert single["change"] == 1
    assert math.isnan(single["low"])
    assert compare([math.nan, 1.0, 1.0], [5.0, 2.0, 2.0])["change"] == 1
    assert math.isnan(compare([math.nan], [1.0])["change"])


def test_windows_are_cut_at_the_ends_and_dropped_when_little_is_left() -> None:
    assert around(50, 20, first=0, stop=100) == ((30, 50), (50, 70))
    assert around(50, 20, first=38, stop=100) == ((38, 50), (50, 70))
    assert around(50, 20, first=41, stop=100) is None
    assert around(95, 20, first=0, stop=100) is None


def test_measures_are_compared_stream_by_stream() -> None:
    result = measure_around(
        ((0, 10), (10, 20)), 3, lambda stream, first, stop: {"x": 100.0 * stream + first}
    )
    assert result["x"]["change"] == 10
    assert result["x"]["low"] == result["x"]["high"] == 10


def test_running_text_looks_back_over_its_window() -> None:
    said = np.arange(100, 120)
    tokens = np.concatenate([said, np.full(20, 3), said])[None]
    padding, repetition = running_text(tokens, (3, 0), 10)
    assert padding[0, 19] == 0
    assert padding[0, 24] == pytest.approx(0.5)
    assert (padding[0, 29:40] == 1).all()
    # said again 40 steps later: beyond the window, so not counted
    assert (repetition[0, 41:] == 0).all()
    assert math.isnan(repetition[0, 35])
    _, repetition = running_text(tokens, (3, 0), 40)
    # the first two tokens end trigrams that are new: they begin before the pause
    assert repetition[0, -1] == pytest.approx(18 / 20)
