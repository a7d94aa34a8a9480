"""What is measured at seams, on sound, text and norms with a planted seam and without."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from synthetic_trace import make_trace

from moshi_ttt.diagnosis.seams import (
    longest_shared,
    norm_steps,
    seam_measures,
    sound_steps,
)
from moshi_ttt.instruments.trace import Trace

STARTS = np.arange(1000) % 2 == 0
SEAMS = [300, 600]
SAMPLES = 1920


def trace_with(text: np.ndarray, **overrides: Any) -> Trace:
    trace = make_trace()
    fields = {name: getattr(trace, name) for name in Trace.__slots__}
    return Trace(**fields | {"text_tokens": text} | overrides)


def usual() -> tuple[np.ndarray, np.ndarray]:
    """Text in which every third step says something new, and a steady tone in noise."""
    trace = make_trace()
    streams, steps = trace.text_tokens.shape
    random = np.random.default_rng(0)
    text = np.full((streams, steps), 3)
    text[:, ::3] = 2 * random.integers(2, 500, size=text[:, ::3].shape)
    time_sec = np.arange(steps * SAMPLES) / 24_000
    tone = 0.2 * np.sin(2 * np.pi * 400 * time_sec)
    return text, tone + 0.02 * random.normal(size=(streams, steps * SAMPLES))


def measures(trace: Trace, sound: np.ndarray | None = None, seams: Any = SEAMS) -> dict[str, Any]:
    return seam_measures(trace, seams, window_steps=60, starts_word=STARTS, sound=sound)


def moved(found: dict[str, Any]) -> set[str]:
    return {name for name, one in found["measures"].items() if one["low"] > 0 or one["high"] < 0}


def test_planted_seams_are_found_by_what_they_change() -> None:
    text, sound = usual()
    norms = make_trace().input_norm.copy()
    for seam in SEAMS:
        text[:, seam + 3 : seam + 24] = text[:, seam - 21 : seam]  # seven words said again
        text[:, seam + 30 : seam + 60] = 3  # and then nothing
        text[:, seam + 27] = 7  # the end of a word without its beginning
        sound[:, seam * SAMPLES : (seam + 20) * SAMPLES] *= 0.1
        norms[:, :, seam] *= 3
    found = measures(trace_with(text, input_norm=norms), sound)
    assert found["steps"] == SEAMS
    assert found["window_steps"] == 60
    one = found["measures"]
    assert one["level_step_db"]["at_seams"] == pytest.approx(20, abs=0.5)
    assert one["level_step_db"]["elsewhere"] < 1
    assert one["spectral_flux_db"]["low"] > 1
    assert one["norm_step"]["at_seams"] == pytest.approx(math.log(3), abs=0.3)
    assert one["repeated_tokens"]["at_seams"] == 7
    assert one["repeated_tokens"]["elsewhere"] < 1.5
    assert one["words_per_minute"]["elsewhere"] == pytest.approx(20 / 4.8 * 60, rel=0.01)
    assert one["words_per_minute"]["high"] < -50
    assert one["broken_words"]["at_seams"] == 1
    assert one["broken_words"]["elsewhere"] == 0
    assert moved(found) == set(one)


def test_places_like_all_others_are_no_seams() -> None:
    text, sound = usual()
    found = measures(trace_with(text), sound)
    assert len(moved(found)) <= 1  # one in twenty by chance
    assert found["measures"]["broken_words"]["change"] == 0


def test_without_sound_or_seams_the_rest_is_measured() -> None:
    trace = trace_with(usual()[0])
    assert "level_step_db" not in measures(trace)["measures"]
    assert measures(trace, seams=[])["steps"] == []
    early = measures(trace, seams=[10])  # in the prompt
    assert (early["steps"], early["measures"]) == ([], {})
    close = measures(trace, seams=list(range(60, trace.steps, 60)))
    assert close["window_steps"] == 20
    assert close["steps"][-1] > trace.steps - 100


def test_the_longest_passage_said_again() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        before, after = random.integers(0, 4, size=(2, 12))
        passages = {tuple(before[a:b].tolist()) for a in range(12) for b in range(a + 1, 13)}
        slow = max(
            (b - a for a in range(12) for b in range(a + 1, 13) if tuple(after[a:b]) in passages),
            default=0,
        )
        assert longest_shared(before, after) == slow
    assert longest_shared(before, before[:0]) == longest_shared(before[:0], after) == 0


def test_steps_of_sound_and_norms_by_hand() -> None:
    time_sec = np.arange(3 * SAMPLES) / 24_000
    sound = np.sin(2 * np.pi * 468.75 * time_sec).reshape(1, 3, SAMPLES)
    sound[:, 1] *= 0.1
    sound[:, 2] = 0
    found = sound_steps(sound)
    np.testing.assert_allclose(found["level_step_db"], [[0, 20, 36.99]], atol=0.01)
    assert found["spectral_flux_db"][0, 0] == 0
    steady = sound_steps(np.tile(sound[:, :1], (1, 2, 1)))
    assert steady["level_step_db"][0, 1] == 0
    norms = np.array([[[1.0, 2.0, 2.0], [1.0, 1.0, 3.0]]])
    expected = [[0, math.log(2) / 2, math.log(3) / 2]]
    np.testing.assert_allclose(norm_steps(norms), expected)
