"""What a model answers to a recording of a user."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.reply import Reply, reply
from moshi_ttt.evaluation.transcript import spoken_lines, spoken_words
from moshi_ttt.model.source import open_source

RATE = 24_000
SOURCE = open_source("tiny")


def record(path: Path, seconds: float, channels: int = 1) -> Path:
    sound = 0.1 * np.random.default_rng(0).standard_normal((round(seconds * RATE), channels))
    soundfile.write(path, sound, RATE)
    return path


@pytest.fixture(scope="module")
def lm() -> torch.nn.Module:
    return SOURCE.lm().eval()


def test_a_reply_lasts_as_long_as_what_is_heard(lm, tmp_path: Path) -> None:
    path = record(tmp_path / "me.wav", 1.6)
    said = reply(lm, SOURCE, path, LongRunConfig())
    assert said.sound.shape == (19 * 1920, 2)  # the last step gives no frame yet
    heard, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(said.sound[:, 1], heard[: 19 * 1920])
    assert said.sound[:, 0].std() > 0
    again = reply(lm, SOURCE, path, LongRunConfig())
    np.testing.assert_array_equal(again.sound, said.sound)
    other = reply(lm, SOURCE, path, LongRunConfig(seed=1))
    chunks = reply(lm, SOURCE, path, LongRunConfig(chunk_sec=0.4, reprompt_sec=0.16))
    assert chunks.sound.shape == said.sound.shape
    assert (chunks.sound != said.sound).any()
    assert not np.array_equal(other.sound, said.sound)


def test_of_two_channels_the_right_one_is_the_user(lm, tmp_path: Path) -> None:
    both = record(tmp_path / "both.wav", 0.8, channels=2)
    right, _ = soundfile.read(both)
    soundfile.write(tmp_path / "right.wav", right[:, 1], RATE)
    alone = reply(lm, SOURCE, tmp_path / "right.wav", LongRunConfig())
    np.testing.assert_array_equal(reply(lm, SOURCE, both, LongRunConfig()).sound, alone.sound)


def test_a_pause_begins_a_new_line() -> None:
    tokenizer, padding = SOURCE.tokenizer(), SOURCE.text_padding_id
    first, second = tokenizer.encode("Hello there."), tokenizer.encode("How are you?")
    tokens = [padding] * 5 + first + [padding] * 11 + first[:1] + [padding] * 13 + second
    lines = spoken_lines(tokens, SOURCE)
    late = 5 + len(first) + 11 + 1 + 13
    assert [seconds for seconds, _ in lines] == pytest.approx([5 * 0.08, late * 0.08])
    assert lines[0][1].startswith("Hello there.")
    assert lines[1][1] == "How are you?"
    said = Reply(np.zeros((1, 2)), lines)
    assert said.transcript().endswith(f"{late * 0.08:6.1f} s  How are you?\n")
    assert spoken_lines([padding] * 9, SOURCE) == []


def test_words_have_the_second_they_begin_at_and_what_no_one_can_read_is_silence() -> None:
    tokenizer, padding = SOURCE.tokenizer(), SOURCE.text_padding_id
    sentence = "Hello, remarkable neighbours."
    tokens = [padding] * 3 + tokenizer.encode(sentence) + [-1, 10**6]
    words = spoken_words(tokens, SOURCE)
    assert [text for _, text in words] == sentence.split()
    starts = [sum(len(tokenizer.encode(one)) for one in sentence.split()[:n]) for n in range(3)]
    assert [seconds for seconds, _ in words] == pytest.approx([0.08 * (3 + n) for n in starts])


@pytest.mark.parametrize(
    ("seconds", "channels", "message"),
    [(0.05, 1, "is shorter than two steps"), (1.0, 3, r"has 3 channels; give one, or two")],
)
def test_what_cannot_be_heard_is_refused(
    lm, tmp_path: Path, seconds: float, channels: int, message: str
) -> None:
    path = record(tmp_path / "x.wav", seconds, channels)
    with pytest.raises(UserError, match=message):
        reply(lm, SOURCE, path, LongRunConfig())


def test_the_program_writes_sound_and_words(tmp_path: Path) -> None:
    program = importlib.import_module("evaluate")
    path, out = record(tmp_path / "me.wav", 0.8), tmp_path / "moshi.wav"
    args = ["--model", "tiny", "--device", "cpu", "--input", str(path)]
    with pytest.raises(UserError, match="--input and --output go together"):
        program.main(args)
    transcript = program.main([*args, "--output", str(out)])
    assert transcript == tmp_path / "moshi.txt"
    assert transcript.is_file()
    assert soundfile.info(out).channels == 2
