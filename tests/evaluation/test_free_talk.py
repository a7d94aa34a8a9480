"""What a study keeps of a long generation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from synthetic_trace import make_trace

from moshi_ttt.evaluation.free_talk import minute_measures

MINUTE, PROMPT = 750, 100
SAMPLES_A_STEP = 1920


def test_minutes_count_from_the_prompt_and_are_measured_one_by_one() -> None:
    trace = make_trace(shape=(2, 1, PROMPT + 2 * MINUTE + 300), hybrid_layers=())
    text = np.full_like(trace.text_tokens, 3)  # padding
    codes = np.zeros_like(trace.codes)
    text[:, :PROMPT] = 7  # forced, and not measured
    first, second = slice(PROMPT, PROMPT + MINUTE), slice(PROMPT + MINUTE, PROMPT + 2 * MINUTE)
    text[0, first.start : first.start + 20] = range(10, 30)
    text[1, first.start : first.start + 10] = 10
    codes[:, :, second] = np.arange(MINUTE) % 8
    trace = dataclasses.replace(trace, text_tokens=text, codes=codes)
    sound = np.zeros(trace.steps * SAMPLES_A_STEP)
    sound[second.start * SAMPLES_A_STEP : second.stop * SAMPLES_A_STEP] = 0.1
    found = minute_measures(trace, [sound], starts_word=np.ones(1000, dtype=bool), cardinality=8)
    assert found["words_per_minute"] == [15.0, 0.0]
    # nothing said is nothing repeated: one stream of the first minute repeats itself
    assert found["distinct_1"] == pytest.approx([(1 + 0.1) / 2, np.nan], nan_ok=True)
    assert found["codes_used"] == [1 / 8, 1.0]
    assert found["silence_share"] == [1.0, 0.0]


def test_less_than_a_minute_is_no_minute_and_without_sound_none_is_measured() -> None:
    words = np.ones(1000, dtype=bool)
    short = make_trace(shape=(2, 1, 700))
    assert minute_measures(short, [], starts_word=words, cardinality=512) == {}
    trace = make_trace(shape=(2, 1, PROMPT + MINUTE))
    found = minute_measures(trace, [], starts_word=words, cardinality=512)
    assert len(found["codes_used"]) == 1
    assert "silence_share" not in found
