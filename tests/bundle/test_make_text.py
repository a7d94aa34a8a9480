"""Conversations as text alone: files that train beside spoken ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moshi_ttt.data import read_recordings
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import open_source
from moshi_ttt.teacher_forcing.losses import LossConfig, lm_losses


@pytest.fixture
def script() -> Any:
    return importlib.import_module("make_text")


@pytest.fixture
def recipe(script: Any) -> Any:
    return next(script.recipes(0.01, "train", 3, (1.0, 1.5)))


def test_a_text_file_says_what_moshi_says_and_nothing_of_the_sound(
    script: Any, recipe: Any, tmp_path: Path
) -> None:
    source = open_source("tiny")
    name, seconds = script.write_text(recipe, tmp_path, source)
    assert script.write_text(recipe, tmp_path, source) == (name, seconds)
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": name, "duration": seconds}))
    (recording,) = read_recordings(source, tmp_path / "m.jsonl", tmp_path)
    assert recording.steps == pytest.approx(seconds * 12.5)
    assert recording.codes[1:].eq(-1).all()
    text = recording.codes[0]
    words = text[(text != source.text_padding_id) & (text != source.end_of_text_padding_id)]
    said = source.tokenizer().decode(words.tolist())
    # a conversation of a minute, half of it Moshi's
    assert 40 < len(said.split()) < 200
    assert "unk" not in said.lower()

    lm = source.lm()
    codes = recording.codes[None, :, :100]
    text_loss, audio_loss = lm_losses(lm, lm(codes), codes, LossConfig())
    (text_loss + audio_loss).backward()
    assert 0 < text_loss < 7
    assert audio_loss == 0
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["transformer.layers.0.self_attn.in_projs.0.weight"].abs().max() > 0


def test_a_set_of_text_has_a_manifest_like_one_of_speech(script: Any, tmp_path: Path) -> None:
    minutes = (1.0, 1.2)
    script.main(tmp_path, hours=0.03, model="tiny", minutes=minutes, workers=1)
    recordings = read_recordings(open_source("tiny"), tmp_path / "manifest.jsonl", tmp_path)
    assert len(recordings) == 2
    assert all(one.codes[1:].eq(-1).all() for one in recordings)
    with pytest.raises(UserError, match="--hours 0"):
        script.main(tmp_path, hours=0, model="tiny", workers=1)


def test_text_of_far_conversations_asks_late_and_has_only_own_facts(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []

    def plan(*arguments: Any) -> Any:
        made.append(importlib.import_module("timeline").plan(*arguments))
        return made[-1]

    monkeypatch.setattr(script, "plan", plan)
    recipe = next(script.recipes(0.01, "far", 0, (5.0, 5.0)))
    name, _ = script.write_text(recipe, tmp_path, open_source("tiny"))
    assert name == "text-far-00000.npz"
    (conversation,) = made
    assert {probe.fact.recall_class for probe in conversation.probes} == {"own"}
    assert np.median([probe.drawn_gap_sec for probe in conversation.probes]) >= 20


def test_a_reader_takes_as_long_as_a_voice(script: Any) -> None:
    reader = script.Reader(np.random.default_rng(0))
    sentence = "I was thinking about the garden of my sister."
    seconds = [reader.say(sentence).duration_sec for _ in range(50)]
    assert 1.8 < sum(seconds) / 50 < 2.8
    assert max(seconds) > 1.1 * min(seconds)
    spoken = reader.say(sentence)
    assert [word for word, _, _ in spoken.words] == sentence.split()
    assert spoken.words[-1][2] == pytest.approx(spoken.duration_sec, abs=1e-4)
