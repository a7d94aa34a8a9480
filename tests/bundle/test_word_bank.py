"""Speech pasted from the codes of phrases that were spoken elsewhere."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moshi_ttt.data import CodesFormat, read_recordings
from moshi_ttt.data.codes_file import read_codes, write_codes
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import open_source
from moshi_ttt.rows import Rows

SOURCE = open_source("tiny")
ROWS = Rows.of(SOURCE)
OWN_SILENCE, USER_SILENCE = 500, 501
PHRASES = ("Hello, this is Peter.", "How are you today?", "This is a garden.")


def code_of(word: str, user: bool) -> int:
    words = sorted({word for phrase in PHRASES for word in phrase.split()})
    return 1 + words.index(word) + 100 * user


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A recording in which each side says every phrase; a word's codes are its number, 3 steps."""
    codes = torch.full((ROWS.count, 250), OWN_SILENCE)
    codes[ROWS.user] = USER_SILENCE
    alignments = []
    for user, (side, who, late) in enumerate(
        ((ROWS.own, "SPEAKER_MAIN", 20), (ROWS.user, "SPEAKER_USER", 50))
    ):
        for number, phrase in enumerate(PHRASES):
            for at, word in enumerate(phrase.split()):
                first = late + 70 * number + 3 * at
                codes[side, first : first + 3] = code_of(word, bool(user))
                span = (first * 0.08 + 0.01, first * 0.08 + 0.235)
                alignments.append([word, span, who])
    write_codes(tmp_path / "a.npz", codes, CodesFormat.of(SOURCE), "a test")
    beside = {"alignments": alignments, "voices": ["heart", "joe"]}
    (tmp_path / "a.json").write_text(json.dumps(beside))
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.npz", "duration": 20.0}))
    return tmp_path / "m.jsonl"


def test_a_sentence_is_put_together_of_the_longest_phrases_there_are(manifest: Path) -> None:
    bank = importlib.import_module("word_bank").WordBank.read(manifest, SOURCE)
    speakers = bank.speakers(np.random.default_rng(0), SOURCE.clock)
    for user, speaker in enumerate(speakers):
        said = speaker.say("Hello, this is a garden. How nice")
        words = ["Hello,", "this", "is", "a", "garden.", "How"]
        assert [word for word, _, _ in said.words] == [*words, "nice"]
        assert said.steps == (0, 3, 6, 9, 12, 15, 18)
        expected = [code_of(word, bool(user)) for word in words]
        silence = USER_SILENCE if user else OWN_SILENCE
        assert said.codes[0].tolist() == [*np.repeat(expected, 3), *[silence] * 4]
        assert said.duration_sec == pytest.approx(said.codes.shape[1] * 0.08)
        assert speaker.silence(30).unique().tolist() == [silence]


def test_a_pasted_conversation_sounds_where_its_words_are(manifest: Path, tmp_path: Path) -> None:
    timeline, utterance = map(importlib.import_module, ("timeline", "utterance"))
    pasted = importlib.import_module("word_bank")
    speakers = pasted.WordBank.read(manifest, SOURCE).speakers(
        np.random.default_rng(0), SOURCE.clock
    )
    placed = [
        timeline.Placed(0, 1.03, speakers[0].say(PHRASES[0])),
        timeline.Placed(1, 2.50, speakers[1].say(PHRASES[1])),
    ]
    assert isinstance(placed[0].utterance, utterance.Utterance)
    codes, words = pasted.lay_pasted(placed, speakers, SOURCE, 50)
    assert codes.shape == (ROWS.count, 50)
    assert codes[0].eq(-1).all()
    for word in words:
        first = round(word.start_sec / 0.08)
        assert codes[ROWS.own, first : first + 3].eq(code_of(word.text, False)).all()
    assert [word.text for word in words] == PHRASES[0].split()
    first = int(2.50 / 0.08)
    assert codes[ROWS.user][:, first].eq(code_of("How", True)).all()
    assert codes[ROWS.own][:, 30:].eq(OWN_SILENCE).all()


def test_make_text_pastes_both_sides(manifest: Path, tmp_path: Path) -> None:
    script: Any = importlib.import_module("make_text")
    out = tmp_path / "pasted"
    script.main(out, hours=0.015, model="tiny", minutes=(1.0, 1.2), words_of=manifest)
    (recording,) = read_recordings(SOURCE, out / "manifest.jsonl", out)
    assert recording.codes[ROWS.own].ge(0).all()
    text = recording.codes[0]
    assert text.ne(SOURCE.text_padding_id).sum() > 40
    again = tmp_path / "again"
    script.main(again, hours=0.015, model="tiny", minutes=(1.0, 1.2), words_of=manifest)
    made_with = CodesFormat.of(SOURCE)
    (name,) = (path.name for path in out.glob("*.npz"))
    assert torch.equal(read_codes(out / name, made_with), read_codes(again / name, made_with))


def test_a_process_reads_the_phrases_once(manifest: Path, tmp_path: Path) -> None:
    script: Any = importlib.import_module("make_text")
    script._bank.cache_clear()
    for recipe in script.recipes(0.03, "far", 0, (1.0, 1.0)):
        # as a pool hands them to a process
        script.write_text(recipe, tmp_path, pickle.loads(pickle.dumps(SOURCE)), manifest)
    assert script._bank.cache_info().misses == 1
    assert script._bank.cache_info().hits == 1


def test_a_side_that_is_never_silent_is_refused(manifest: Path) -> None:
    beside = json.loads(manifest.with_name("a.json").read_text())
    beside["alignments"] = [["Hello,", (0.1, 19.5), "SPEAKER_MAIN"], *beside["alignments"][-4:]]
    manifest.with_name("a.json").write_text(json.dumps(beside))
    bank = importlib.import_module("word_bank").WordBank.read(manifest, SOURCE)
    with pytest.raises(UserError, match="SPEAKER_MAIN is never silent"):
        bank.speakers(np.random.default_rng(0), SOURCE.clock)


def test_speech_without_words_beside_it_is_refused(manifest: Path) -> None:
    manifest.with_name("a.json").unlink()
    with pytest.raises(UserError, match=r"a\.npz has no words beside it"):
        importlib.import_module("word_bank").WordBank.read(manifest, SOURCE)
