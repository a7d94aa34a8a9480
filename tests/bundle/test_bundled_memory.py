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
    recordings = read_recordings(source, bundled_held_out(source), tmp_path)[:3]
    read = read_teacher_forced(lm, recordings, steps=1500, window_steps=750)
    assert read.recall is not None
    assert lm.context is not None

    def right(memory: str) -> float:
        found = read.recall[memory]["own"]
        rows = zip(found["gap_sec"], found["words"], found["accuracy"], strict=True)
        lost = [(words, share) for gap_sec, words, share in rows if 20 <= gap_sec <= 120]
        assert sum(words for words, _ in lost) >= 10
        return sum(words * share for words, share in lost) / sum(words for words, _ in lost)

    # 91 % of 151 words in docs/recall.md, and 26 and 23 % without
    assert right("kept") > 0.75
    assert max(right("reset"), right("other")) < right("kept") - 0.25
