"""A recogniser that expects a text, where there is one."""

from __future__ import annotations

import importlib.util
import logging
import math

import numpy as np
import pytest

from moshi_ttt.data.codes_file import read_codes
from moshi_ttt.diagnosis import recogniser
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.diagnosis.recogniser import Recogniser, agreement, can_recognise, plain_words
from moshi_ttt.evaluation.transcript import spoken_words
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.rows import Rows

with_recogniser = pytest.mark.skipif(
    importlib.util.find_spec("pocketsphinx") is None, reason="needs pocketsphinx"
)


def test_words_are_plain() -> None:
    assert plain_words(" Good morning, I'm \u2014 ANNA! 4") == "good morning i'm anna 4"
    assert plain_words("...") == ""


def test_that_there_is_no_recogniser_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recogniser.importlib.util, "find_spec", lambda _: None)
    can_recognise.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [can_recognise(), can_recognise()] == [False, False]
    can_recognise.cache_clear()
    (said,) = caplog.messages
    assert "pip install -e '.[asr]'" in said


@with_recogniser
def test_agreement_is_the_share_of_words_that_are_the_same() -> None:
    assert agreement("How are you?", "how are you") == 1
    assert agreement("How are you?", "how were you") == pytest.approx(2 / 3)
    assert agreement("How are you?", "") == 0
    # nobody knows how it would sound
    assert agreement("How are zzqxes you?", "how are you") == 1
    for nothing in ("", "...", "zzqxes"):
        assert math.isnan(agreement(nothing, "how"))


@with_recogniser
@pytest.mark.parametrize("texts", [[""], ["zzqxes", ""], ["yes"], ["Good morning, this is Anna."]])
def test_whatever_is_expected_little_is_heard_in_silence(texts: list[str]) -> None:
    assert len(Recogniser(texts).hears(np.zeros(24_000), 24_000).split()) <= 1


@with_recogniser
def test_real_speech_agrees_with_its_own_text_and_not_with_that_of_the_next_seconds() -> None:
    source, steps = open_source("tiny"), 250
    codes = read_codes(ASSETS / "conversations/heldout/heldout-00003.npz", None)[:, 750:1250]
    texts = [
        " ".join(word for _, word in spoken_words(row.tolist(), source))
        for row in codes[0].split(steps)
    ]
    own = codes[Rows.of(source).own, :steps]
    (sound,) = decode(source.codec("cpu"), own[None].numpy())
    expecting = Recogniser(texts)
    heard = expecting.hears(sound, source.clock.sample_rate)
    right, wrong = (agreement(text, heard) for text in texts)
    assert right > 0.8
    assert wrong < 0.3
