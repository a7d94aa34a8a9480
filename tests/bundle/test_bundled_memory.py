"""The bundled memory remembers: what no attention holds, and only with its own memory."""

from __future__ import annotations

from pathlib import Path

from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.data.recordings import read_recordings
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.model.subject import open_subject
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced


def test_it_answers_what_the_window_has_lost(tmp_path: Path) -> None:
    source = open_source("tiny")
    lm = open_subject(ASSETS / "tiny/memory.safetensors", "cpu").lm
    assert lm.context == 188  # 15 s
    recordings = read_recordings(source, bundled_held_out(source), tmp_path)[2:4]
    recall = read_teacher_forced(lm, recordings, steps=1500, window_steps=750).recall
    assert recall is not None

    def mean(memory: str, what: str) -> float:
        found = recall[memory]["own"]
        rows = zip(found["gap_sec"], found["words"], found[what], strict=True)
        lost = [(words, value) for gap_sec, words, value in rows if gap_sec >= 20]
        total = sum(words for words, _ in lost)
        assert total >= 20
        return sum(words * value for words, value in lost) / total

    # 85 % of 213 words of all held-out recordings; 26 and 16 % with the other memories
    assert mean("kept", "accuracy") > 0.65
    assert max(mean("reset", "accuracy"), mean("other", "accuracy")) < 0.5
    assert mean("kept", "nll") < 0.7 * min(mean("reset", "nll"), mean("other", "nll"))
