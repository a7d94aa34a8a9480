"""What a study keeps of a long generation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from synthetic_trace import make_trace

from moshi_ttt.evaluation import free_talk
from moshi_ttt.evaluation.free_talk import agreement_by_minute, minute_measures

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
    # the first minute has no voice that the second could be held against
    assert found["voice_distance_db"] == pytest.approx([np.nan, np.nan], nan_ok=True)


def test_less_than_a_minute_is_no_minute_and_without_sound_none_is_measured() -> None:
    words = np.ones(1000, dtype=bool)
    short = make_trace(shape=(2, 1, 700))
    assert minute_measures(short, [], starts_word=words, cardinality=512) == {}
    trace = make_trace(shape=(2, 1, PROMPT + MINUTE))
    found = minute_measures(trace, [], starts_word=words, cardinality=512)
    assert len(found["codes_used"]) == 1
    assert "silence_share" not in found
    assert "voice_distance_db" not in found


def test_a_voice_is_held_against_that_of_the_first_minute_of_its_own_stream() -> None:
    trace = make_trace(shape=(2, 1, PROMPT + 2 * MINUTE), hybrid_layers=())
    rng = np.random.default_rng(0)
    hiss = 0.1 * rng.normal(size=trace.steps * SAMPLES_A_STEP)
    rumble = np.cumsum(hiss - hiss.mean()) / 100
    changed = hiss.copy()
    changed[(PROMPT + MINUTE) * SAMPLES_A_STEP :] = rumble[(PROMPT + MINUTE) * SAMPLES_A_STEP :]
    words = np.ones(1000, dtype=bool)
    for second, alike in ((hiss, True), (rumble, True), (changed, False)):
        found = minute_measures(trace, [hiss, second], starts_word=words, cardinality=512)
        first, last = found["voice_distance_db"]
        assert first < 1
        assert (last < 1) == alike


class Listener:
    """Hears whatever it expects, where there is any sound."""

    def __init__(self, texts: list[str]) -> None:
        self.text = " ".join(texts)

    def hears(self, samples: np.ndarray, sample_rate: int) -> str:
        assert len(samples) == 60 * sample_rate
        return self.text if samples.any() else ""


def words_agreed_on(text: str, heard: str) -> float:
    return min(text.count("w"), heard.count("w")) if text else np.nan


def test_the_recogniser_hears_each_minute_beside_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(free_talk, "Recogniser", Listener)
    monkeypatch.setattr(free_talk, "agreement", words_agreed_on)
    trace = make_trace(shape=(3, 1, PROMPT + 2 * MINUTE + 300), hybrid_layers=())
    speech = np.ones(trace.steps * SAMPLES_A_STEP)
    begun = np.where(np.arange(len(speech)) < (PROMPT + MINUTE) * SAMPLES_A_STEP, speech, 0)
    prompted, first, second, after = 7.9, 8.0, 68.0, 128.0
    words = [
        [(prompted, "w"), (first, "w"), (20.0, "w"), (second, "w"), (after, "w")],
        [(first, "w"), (20.0, "w"), (30.0, "w"), (40.0, "w"), (second, "w")],
        [],  # the third stream has no sound
    ]
    found = agreement_by_minute(trace, [speech, begun], words)
    assert found == {"recogniser_agreement": [3.0, 0.5]}
    silent = agreement_by_minute(trace, [speech, begun], [[], words[1]])
    assert silent == {"recogniser_agreement": [4.0, 0.0]}
    assert agreement_by_minute(make_trace(shape=(1, 1, 700)), [speech], words) == {}
    assert agreement_by_minute(trace, [], words) == {}
