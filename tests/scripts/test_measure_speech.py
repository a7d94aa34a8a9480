"""What real speech has by a study's measures of voice and words."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import open_source

script: Any = importlib.import_module("measure_speech")

LOW, HIGH = np.full(20, -1.0), np.full(20, 3.0)  # dB
NAN = float("nan")


def test_minutes_are_held_against_the_first_of_their_own_side_and_of_the_other() -> None:
    found = script.Found()
    louder = LOW + 0.5
    found.add_voices([[[LOW, louder], [LOW, LOW]], [[HIGH, HIGH], [HIGH, LOW]]])
    assert found.first == [0.5, 0.0]
    assert found.same == [0.25, 2.0]
    assert found.other == [3.75, 2.0, 3.75, 4.0]
    assert script.tables(found)[2:] == [
        "| halves of a first minute | 2 | 0.25 | 0.03 | 0.47 |",
        "| later minutes from it | 2 | 1.12 | 0.34 | 1.91 |",
        "| the other side's from it | 4 | 3.75 | 2.26 | 3.96 |",
        "Of two minutes the other side's is further away in 87.50%; 100.0% of its minutes are "
        "further than 95% of the same side's.",
    ]


def test_what_is_undefined_does_not_count() -> None:
    voices = {"first": [1.0], "same": [1.0, NAN], "other": [2.0, NAN, 3.0]}
    words = {"own_text": [0.9, NAN, 0.1], "other_text": [0.2, 0.3, 0.2], "other_sound": [0.1]}
    lines = script.tables(script.Found(**voices, **words))
    assert lines[4].startswith("| the other side's from it | 2 | 2.50 |")
    assert "in 100.00%; 100.0% of its minutes" in lines[5]
    assert lines[8].startswith("| of sound with its text | 2 | 0.50 |")
    assert lines[-1] == "Its own text agrees better in 50.0% of the minutes."


class Listener:
    """Hears the first text that it expects in every sound but silence."""

    def __init__(self, texts: list[str]) -> None:
        self.text = texts[0]

    def hears(self, samples: np.ndarray, sample_rate: int) -> str:
        return self.text if samples.any() else ""


def test_each_recording_is_heard_minute_by_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("tiny")
    (word,) = source.tokenizer().encode("one")[:1]
    codes = torch.full((17, 1600), source.text_padding_id)
    codes[0, :750:50], codes[0, 750:1500:25] = word, word
    rng = np.random.default_rng(0)
    sound = rng.normal(size=(2, 1500 * source.clock.samples_per_step)).astype(np.float32) / 10
    monkeypatch.setattr(script, "decode", lambda *_: sound)
    monkeypatch.setattr(script, "can_recognise", lambda: True)
    monkeypatch.setattr(script, "Recogniser", Listener)
    monkeypatch.setattr(
        script, "agreement", lambda text, heard: len(heard.split()) / len(text.split())
    )
    found = script.measured(source, [EncodedRecording(name, codes) for name in "ab"], "cpu")
    assert (len(found.first), len(found.same), len(found.other)) == (4, 4, 8)
    assert max(found.same) < 1
    assert found.own_text == [1.0, 0.5] * 2
    assert found.other_text == [0.5, 1.0] * 2
    assert found.other_sound == [1.0]


def test_a_recording_of_two_minutes_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.zeros((17, 1500), dtype=torch.int64)
    codes[0] = -1  # no text
    short = torch.zeros((17, 1400), dtype=torch.int64)
    given = [EncodedRecording("a", codes), EncodedRecording("b", short)]
    monkeypatch.setattr(script, "read_recordings", lambda *_: given)
    with pytest.raises(UserError, match=r"held\.jsonl holds no recording of two minutes"):
        script.main(["--manifest", "held.jsonl", "--device", "cpu"])
