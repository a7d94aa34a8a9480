"""Memory probes: read from their file and found in the text row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fakes import CLOCK, FakeSource, LetterTokenizer, write_audio

from moshi_ttt.data import EncodedRecording, Probe, RecordingReader, check_manifest, read_manifest
from moshi_ttt.data.encode import encode_manifest
from moshi_ttt.errors import UserError

MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"
WORDS: list[Any] = [
    ["two", [0.2, 0.3], USER],
    ["is", [1.0, 1.1], MAIN],
    ["four", [2.0, 2.1], MAIN],  # step 25
    ["two", [2.16, 2.3], MAIN],  # step 27, cuts "four" short after two letters
]


def probe(**changes: Any) -> dict[str, Any]:
    answer = [["four", [2.0, 2.1]], ["two", [2.16, 2.3]]]
    return {
        **{"kind": "code", "key": "my code", "asked_by": USER, "answered_by": MAIN},
        **{"fact": [], "echo": [], "asked_at": 1.5, "answer": answer},
        **{"gap_sec": 12.5, "chance": 0.1, **changes},
    }


def write_recording(folder: Path, probes: Any) -> Path:
    write_audio(folder / "a.wav", 4.0)
    (folder / "a.json").write_text(json.dumps({"alignments": WORDS, "probes": probes}))
    manifest = folder / "m.jsonl"
    manifest.write_text('{"path": "a.wav", "duration": 4.0}')
    return manifest


def read(manifest: Path) -> EncodedRecording:
    reader = RecordingReader(FakeSource(), manifest.parent / "cache")
    return reader.read(read_manifest(manifest)[0])[0]


def test_an_answer_is_where_its_tokens_are_in_the_text_row(tmp_path: Path) -> None:
    mirrored = probe(asked_by=MAIN, answered_by=USER, answer=[["two", [0.2, 0.3]]])
    recording = read(write_recording(tmp_path, [mirrored, probe()]))
    answer = (range(25, 27), range(27, 30))
    expected = Probe("code", 12.5, 0.1, answer, "heard", asked_step=18, rivals=0)
    assert recording.probes == (expected,)
    letters = LetterTokenizer().encode("fotwo")
    assert recording.codes[0, 25:30].tolist() == letters
    found = check_manifest(tmp_path / "m.jsonl", CLOCK, LetterTokenizer(), decode=False)
    assert (found.problems, found.probes) == ([], 1)


def test_a_probe_says_its_class_and_what_of_it_is_unseen(tmp_path: Path) -> None:
    said = [
        probe(**{"class": "own", "unseen": ["template", "key"]}),
        probe(**{"class": "heard"}),
        # from before there were classes: the echo tells
        probe(echo=[["two", [1.2, 1.3]]]),
        probe(),
    ]
    found = read(write_recording(tmp_path, said)).probes
    assert [one.recall_class for one in found] == ["own", "heard", "own", "heard"]
    assert [one.unseen for one in found] == [("template", "key"), (), (), ()]


def test_a_probe_says_when_the_question_is_asked_if_the_file_does(tmp_path: Path) -> None:
    unknown = {key: value for key, value in probe().items() if key != "asked_at"}
    said = [probe(asked_until=1.93), probe(), unknown]
    found = read(write_recording(tmp_path, said)).probes
    steps = [(one.asked_step, one.asked_until_step) for one in found]
    assert steps == [(18, 24), (18, None), (None, None)]


def test_a_probe_counts_what_of_its_kind_was_said_since(tmp_path: Path) -> None:
    said = [
        probe(asked_at=1.5, gap_sec=1.0),  # mentioned at 0.5 s
        probe(asked_at=1.9, gap_sec=1.0, answered_by=USER),  # at 0.9 s, by the other side
        probe(kind="day", asked_at=1.8, gap_sec=0.8),  # at 1.0 s, of another kind
        probe(asked_at=1.95, gap_sec=0.05),  # at 1.9 s, after the first question
        {key: value for key, value in probe().items() if key != "asked_at"},
    ]
    found = read(write_recording(tmp_path, said)).probes
    assert [one.rivals for one in found] == [1, 0, 0, None]


def test_recordings_without_probes_have_none(tmp_path: Path) -> None:
    assert read(write_recording(tmp_path, [])).probes == ()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (probe(answer=[["five", [2.0, 2.1]]]), "probe 0 .* says no 'five' at 2 s"),
        (probe(answer=[["four", [2.5, 2.6]]]), "probe 0 .* says no 'four' at 2.5 s"),
        (probe(answer=[["two", [0.2, 0.3]]]), "probe 0 .* says no 'two'"),  # the other side's word
        (probe(gap_sec=-1), "probe 0 .*gap_sec=-1 is outside"),
        (probe(chance=1.5), "probe 0 .*chance=1.5 is outside"),
        (probe(**{"class": "told"}), "probe 0 .*class='told' is none of own, heard"),
        (probe(unseen="key"), "probe 0 .*unseen='key' is not a list"),
        (probe(unseen=[1]), "probe 0 .*unseen=.1. is not a list of words"),
        (probe(asked_until=-1), "probe 0 .*asked_until=-1 is outside"),
        (probe(gap_sec="soon"), "probe 0 is malformed .*soon"),
        ({"kind": "code"}, "probe 0 is malformed .*answered_by"),
        ("code", "probe 0 is malformed"),
        (None, "probes=None is not a list"),
    ],
)
def test_probes_that_do_not_fit_are_refused(tmp_path: Path, broken: Any, complaint: str) -> None:
    manifest = write_recording(tmp_path, broken and [broken])
    with pytest.raises(UserError, match=rf"a\.json: {complaint}"):
        read(manifest)
    (problem,) = check_manifest(manifest, CLOCK, LetterTokenizer(), decode=False).problems
    assert problem.startswith("line 1: ")


def test_probes_beside_codes_are_held_against_their_text_row(tmp_path: Path) -> None:
    manifest = write_recording(tmp_path / "audio", [probe()])
    source: Any = FakeSource()
    encode_manifest(manifest, tmp_path / "codes", source, tmp_path / "cache", with_words=True)
    encoded = tmp_path / "codes/manifest.jsonl"
    assert read(encoded).probes == read(manifest).probes
    path = tmp_path / "codes/a.json"
    # the words moved by a second after they were encoded
    path.write_text(path.read_text().replace("[2.0, 2.1]", "[3.0, 3.1]"))
    with pytest.raises(UserError, match=r"'four' at 3 s, and the text row holds other tokens"):
        read(encoded)
    found = check_manifest(encoded, CLOCK, LetterTokenizer(), decode=False)
    assert len(found.problems) == 1
