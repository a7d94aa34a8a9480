"""JSON as other programs and accidents write it, in manifests and in alignments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fakes import CLOCK, LetterTokenizer, write_manifest

from moshi_ttt.data import ManifestCheck, check_manifest
from moshi_ttt.data.json_text import parse_json

SECONDS = 2.0
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 400
GOOD = '["hi", [0.1, 0.2], "SPEAKER_MAIN"]'
NOT_JSON_VALUES = (
    (DEEP, "nested more than 20 deep"),
    ("[" * 100_000, "nested more than 20 deep"),
    ("[" * 50 + "]" * 50, "nested more than 20 deep"),
    ('{"a": 1, "b": 2, "b": 3}', "the key 'b' is there twice"),
    ('"h\\ud800"', "half a character"),
    ('{"\\udce9": 1}', "half a character"),
)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "m.jsonl", {"a.wav": SECONDS})


def check(manifest: Path) -> ManifestCheck:
    return check_manifest(manifest, CLOCK, LetterTokenizer(), decode=False)


def write_rows(manifest: Path, *rows: str) -> None:
    (manifest.parent / "a.json").write_text(f'{{"alignments": [{", ".join(rows)}]}}')


@pytest.mark.parametrize(("text", "complaint"), NOT_JSON_VALUES)
def test_what_cannot_be_meant_is_a_value_error(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_json(text)


def test_integers_of_many_digits_become_floats() -> None:
    assert parse_json(f"[-12, 9007199254740993, {DIGITS}, -{DIGITS * 20}]") == [
        *(-12, 9007199254740993, float("inf"), -float("inf"))
    ]


@pytest.mark.parametrize(("text", "complaint"), NOT_JSON_VALUES)
def test_a_manifest_line_that_cannot_be_meant_is_named(
    manifest: Path, text: str, complaint: str
) -> None:
    with manifest.open("a") as file:
        file.write(f'{{"path": "a.wav", "duration": {SECONDS}, "more": {text}}}\n')
    (problem,) = check(manifest).problems
    assert problem.startswith("line 2: ")
    assert complaint in problem
    assert len(problem) < 400


@pytest.mark.parametrize("duration", [DIGITS, "true", f'"{SECONDS}"', "1e999"])
def test_durations_that_are_no_numbers_of_seconds_are_refused(
    manifest: Path, duration: str
) -> None:
    manifest.write_text(f'{{"path": "a.wav", "duration": {duration}}}')
    (problem,) = check(manifest).problems
    assert "is not a positive number of seconds" in problem


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c"])
def test_a_line_ends_at_a_line_feed_alone(manifest: Path, separator: str) -> None:
    line = {"path": "a.wav", "duration": SECONDS, "note": f"x{separator}y"}
    manifest.write_text(f"{json.dumps(line, ensure_ascii=False)}\r\n{separator}\n")
    found = check(manifest)
    assert (found.recordings, found.problems, found.warnings) == (1, [], [])


def test_a_byte_order_mark_is_no_part_of_the_text(manifest: Path) -> None:
    for path in (manifest, manifest.parent / "a.json"):
        path.write_text("\ufeff" + path.read_text())
    found = check(manifest)
    assert found.problems == found.warnings == []


def test_a_recording_may_be_listed_twice(manifest: Path) -> None:
    manifest.write_text(manifest.read_text() * 2)
    found = check(manifest)
    assert (found.recordings, found.problems, found.warnings) == (2, [], [])


@pytest.mark.parametrize(
    "row",
    [
        '["hi", [0.1, 0.2], "SPEAKER_MAIN", 0.93]',
        '["hi", ["0.1", "0.2"], "SPEAKER_MAIN"]',
        '{"word": "hi", "start": 0.1, "end": 0.2, "score": 0.9, "speaker": "SPEAKER_MAIN"}',
        '{"text": "hi", "start": "0.1", "end": 0.2, "speaker": "SPEAKER_MAIN"}',
    ],
)
def test_rows_of_other_aligners_are_understood_with_a_warning(manifest: Path, row: str) -> None:
    write_rows(manifest, GOOD, row)
    found = check(manifest)
    assert (found.words, found.problems) == (2, [])
    (warning,) = (text for text in found.warnings if "overlap" not in text)
    assert "a.json: 1 of another shape, read as" in warning


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (GOOD.replace("0.1, 0.2", "null, null"), "finite numbers, got None"),
        (GOOD.replace("0.1", DIGITS), "finite numbers, got inf"),
        (GOOD.replace("0.1, 0.2", "true, false"), "finite numbers, got True"),
        (GOOD.replace("0.1, 0.2", "9, 9.5"), "'hi' at 9 s starts outside the 2.00 s"),
        (GOOD.replace("0.1, 0.2", "1e308, 1e308"), "at 1e+308 s starts outside"),
        ('{"word": "hi", "score": 0.1}', "KeyError: 'start'"),
        ("null", "None is malformed"),
    ],
)
def test_one_word_without_a_usable_time_is_left_out_and_most_of_them_are_refused(
    manifest: Path, row: str, complaint: str
) -> None:
    write_rows(manifest, GOOD, GOOD.replace("0.1, 0.2", "0.5, 0.6"), row)
    found = check(manifest)
    assert (found.words, found.problems) == (2, [])
    (warning,) = found.warnings
    assert "a.json: 1 of 3 words cannot be used" in warning
    assert complaint in warning
    write_rows(manifest, GOOD, row, row)
    (problem,) = check(manifest).problems
    assert "2 of 3 words cannot be used" in problem


@pytest.mark.parametrize(("text", "complaint"), [*NOT_JSON_VALUES, ("{}", "not a list")])
def test_alignments_that_cannot_be_meant_are_named(
    manifest: Path, text: str, complaint: str
) -> None:
    (manifest.parent / "a.json").write_text(f'{{"alignments": {text}}}')
    (problem,) = check(manifest).problems
    assert "a.json are malformed" in problem
    assert complaint in problem


@pytest.mark.parametrize("value", ["1e308", DIGITS, "[]", "-1", "NaN"])
def test_a_probe_is_asked_within_its_recording(manifest: Path, value: str) -> None:
    probe: dict[str, Any] = {"kind": "code", "answered_by": "SPEAKER_MAIN", "chance": 0.1}
    probe |= {"answer": [["hi", [0.1, 0.2]]], "gap_sec": 1, "asked_at": 1.5}
    content = {"alignments": [json.loads(GOOD)], "probes": [probe]}
    path = manifest.parent / "a.json"
    path.write_text(json.dumps(content))
    assert check(manifest).probes == 1
    path.write_text(json.dumps(content).replace("1.5", value))
    (problem,) = check(manifest).problems
    assert "probe 0 is malformed" in problem
