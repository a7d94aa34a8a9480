from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from data_fakes import CLOCK, LetterTokenizer, write_audio, write_manifest, write_words

from moshi_ttt.data import ManifestCheck, check_manifest
from moshi_ttt.data.audio import read_audio
from moshi_ttt.errors import UserError, run_program

SECONDS = 2.0


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(
        tmp_path / "m.jsonl", {"a.wav": SECONDS, "b.flac": SECONDS, "c.ogg": SECONDS}
    )


def check(manifest: Path, decode: bool = True) -> ManifestCheck:
    return check_manifest(manifest, CLOCK, LetterTokenizer(), decode=decode)


def test_a_good_manifest_has_totals_and_nothing_to_say(manifest: Path) -> None:
    found = check(manifest)
    assert found.problems == found.warnings == []
    assert (found.recordings, found.duration_sec, found.words) == (3, 3 * SECONDS, 3)
    assert (found.text_tokens, found.dropped_text_tokens) == (3 * len("hello"), 0)


def break_header(path: Path) -> None:
    path.write_bytes(b"not audio at all")


def cut_body(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def spoil_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)


def write_nan(path: Path) -> None:
    samples = np.zeros((round(SECONDS * 24_000), 2), np.float32)
    samples[7, 1] = np.nan
    soundfile.write(path, samples, 24_000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        ("a.wav", Path.unlink, "does not exist"),
        ("a.wav", break_header, "not readable audio"),
        ("b.flac", cut_body, "damaged"),
        ("c.ogg", spoil_middle, "cut short"),
        ("a.wav", lambda path: write_audio(path, 0.0), "holds no samples"),
        ("a.wav", lambda path: write_audio(path, SECONDS, channels=1), "1 channel.*sox"),
        ("a.wav", lambda path: write_audio(path, SECONDS, channels=3), "3 channel"),
        ("a.wav", lambda path: write_audio(path, SECONDS - 0.1), r"lasts 1\.900 s"),
        ("a.wav", write_nan, "NaN"),
    ],
)
def test_bad_audio_is_refused_with_line_and_file(
    manifest: Path, name: str, spoil: Callable[[Path], None], complaint: str
) -> None:
    spoil(manifest.parent / name)
    found = check(manifest)
    line = ["a.wav", "b.flac", "c.ogg"].index(name) + 1
    with pytest.raises(UserError, match=rf"(?s)1 problem.*line {line}: .*{name}.*({complaint})"):
        found.raise_problems()


def test_a_duration_off_by_less_than_a_step_is_accepted(manifest: Path) -> None:
    write_audio(manifest.parent / "a.wav", SECONDS - 0.07)
    assert check(manifest).problems == []


@pytest.mark.parametrize(
    ("alignments", "complaint"),
    [
        ("{", "malformed"),
        ('{"words": []}', "malformed .*alignments"),
        ("[]", "malformed"),
        ('{"alignments": [["hi", 0.1, "SPEAKER_MAIN"]]}', "malformed"),
        ('{"alignments": [["hi", [0.1, "x"], "SPEAKER_MAIN"]]}', "finite numbers"),
        ('{"alignments": [["hi", [NaN, 1], "SPEAKER_MAIN"]]}', "finite numbers"),
        ('{"alignments": [[3, [0.1, 0.2], "SPEAKER_MAIN"]]}', "must be strings"),
        (
            '{"alignments": [["hi", [-0.5, 0.2], "SPEAKER_MAIN"]]}',
            "1 of 1 words cannot be used.* outside",
        ),
        ('{"alignments": [["hi", [2.1, 2.2], "SPEAKER_MAIN"]]}', "outside the 2.00 s"),
        ('{"alignments": [["hi", [500, 800], "SPEAKER_MAIN"]]}', "'hi' at 500 s"),
    ],
)
def test_alignments_that_cannot_belong_are_refused(
    manifest: Path, alignments: str, complaint: str
) -> None:
    (manifest.parent / "a.json").write_text(alignments)
    with pytest.raises(UserError, match=rf"(?s)line 1: alignments .*a\.json.*{complaint}"):
        check(manifest).raise_problems()


@pytest.mark.parametrize(
    ("words", "warning", "usable"),
    [
        ([["b", [1.0, 1.2]], ["a", [0.1, 0.2]]], "not sorted", 2),
        ([["a", [0.1, 0.9]], ["b", [0.2, 1.0]]], "1 overlap the next", 2),
        ([["a", [0.3, 0.3]], ["b", [0.5, 0.4]], ["c", [0.6, 0.7]]], "2 empty or without", 1),
        ([[" ", [0.1, 0.2]], ["b", [0.5, 0.6]]], "1 empty or without", 1),
        ([["a", [1.9, 2.5]]], "1 end after the audio", 1),
        ([["a", [-0.05, 0.2]]], None, 1),
    ],
)
def test_alignments_as_annotators_make_them_are_mended_with_a_warning(
    manifest: Path, words: list[Any], warning: str | None, usable: int
) -> None:
    write_words(manifest.parent / "a.wav", [[*word, "SPEAKER_MAIN"] for word in words])
    found = check(manifest)
    assert found.problems == []
    assert found.words == usable + 2
    assert len(found.warnings) == (warning is not None)
    if warning is not None:
        assert warning in found.warnings[0]
        assert "a.json" in found.warnings[0]


def test_only_the_main_speaker_counts(manifest: Path) -> None:
    write_words(manifest.parent / "a.wav", [["a", [0.1, 0.2], "SPEAKER_USER"]])
    found = check(manifest)
    assert found.words == 2
    assert "no SPEAKER_MAIN words" in found.warnings[0]


def test_missing_alignments_and_other_rates_are_warnings(manifest: Path) -> None:
    (manifest.parent / "a.json").unlink()
    write_audio(manifest.parent / "b.flac", SECONDS, rate=44_100)
    found = check(manifest)
    assert found.problems == []
    assert "a.json do not exist" in found.warnings[0]
    assert "b.flac is resampled from 44100 to 24000 Hz" in found.warnings[1]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '"a.wav"',
        '{"path": "a.wav"}',
        '{"duration": 2.0}',
        '{"path": 3, "duration": 2.0}',
        '{"path": "a.wav", "duration": "2"}',
        '{"path": "a.wav", "duration": 0}',
        '{"path": "a.wav", "duration": NaN}',
    ],
)
def test_malformed_lines_are_refused_by_number(manifest: Path, line: str) -> None:
    with manifest.open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(UserError, match=r"line 5: .* is malformed"):
        check(manifest).raise_problems()


def test_all_problems_are_reported_together(manifest: Path) -> None:
    (manifest.parent / "a.wav").unlink()
    (manifest.parent / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"(?s)m\.jsonl: 2 problem.*line 1: .*line 2: "):
        check(manifest).raise_problems()


@pytest.mark.parametrize("content", ["", "\n\n", None, b"\xff\xfe"])
def test_an_unusable_manifest_is_refused(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "m.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"m\.jsonl (is empty|cannot be read)"):
        check(path)


def test_resampling_keeps_speech_frequencies_and_removes_what_would_alias(tmp_path: Path) -> None:
    rate = 44_100
    time = np.arange(rate) / rate
    kept, removed = (np.sin(2 * np.pi * hertz * time) for hertz in (10_000, 12_600))
    soundfile.write(tmp_path / "x.wav", np.stack([kept, removed], 1), rate, subtype="FLOAT")
    left, right = read_audio(tmp_path / "x.wav", 24_000).numpy()
    assert left.shape == (24_000,)
    expected = np.sin(2 * np.pi * 10_000 * np.arange(24_000) / 24_000)
    middle = slice(1_000, -1_000)
    np.testing.assert_allclose(left[middle], expected[middle], atol=1e-3)
    assert np.abs(right[middle]).max() < 1e-3


def test_the_program_prints_totals_and_exits_by_problems(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module("check_manifest")
    assert program.main([str(manifest)]) == 0
    assert "recordings                    3" in capsys.readouterr().out
    (manifest.parent / "a.wav").unlink()
    assert program.main([str(manifest)]) == 1
    assert "problem: line 1: audio file" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: program.main([str(manifest.parent / "none.jsonl")]))
    assert stop.value.code == 2
    assert "error: manifest" in capsys.readouterr().err


def test_paths_are_relative_to_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    write_audio(tmp_path / "sound" / "a.wav", SECONDS)
    write_words(tmp_path / "sound" / "a.wav", [])
    manifest = tmp_path / "deep" / "m.jsonl"
    manifest.write_text(json.dumps({"path": "../sound/a.wav", "duration": SECONDS}))
    monkeypatch.chdir("/")
    assert check(manifest).problems == []
