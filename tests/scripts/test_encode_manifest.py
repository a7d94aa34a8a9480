"""Recordings that were encoded before: the same windows without the audio, or a clear refusal."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_fakes import CLOCK, FakeSource, LetterTokenizer, write_audio, write_manifest, write_words

from moshi_ttt.data import (
    CodesFormat,
    RecordingReader,
    WindowLoader,
    check_manifest,
    read_manifest,
    read_recordings,
)
from moshi_ttt.data.codes_file import read_codes, write_codes
from moshi_ttt.data.encode import encode_manifest
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.model.source import open_source
from train.data import ConversationData

FORMAT = CodesFormat("codec-1", "letters", 4, (3, 0), 2048, 32_000)


@pytest.fixture
def program() -> Any:
    return importlib.import_module("encode_manifest")


@pytest.fixture
def audio_manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "audio/m.jsonl", {"a.wav": 3.0, "b.flac": 1.99})


def encode(manifest: Path, out: Path, **options: Any) -> FakeSource:
    source = options.pop("source", FakeSource())
    encode_manifest(manifest, out, source, out / "cache", **{"with_words": False, **options})
    return source


def windows(manifest: Path, cache: Path) -> list[torch.Tensor]:
    recordings = RecordingReader(FakeSource(), cache).read(read_manifest(manifest)[0])
    return [batch["codes"] for batch in WindowLoader(recordings, 10, 2, seed=0)]


@pytest.mark.parametrize("with_words", [False, True])
def test_an_encoded_manifest_gives_the_windows_of_its_audio_bit_for_bit(
    audio_manifest: Path, tmp_path: Path, with_words: bool
) -> None:
    encode(audio_manifest, tmp_path / "codes", with_words=with_words)
    encoded = tmp_path / "codes/manifest.jsonl"
    wanted, got = windows(audio_manifest, tmp_path / "c1"), windows(encoded, tmp_path / "c2")
    assert len(wanted) == len(got) > 1
    for one, other in zip(wanted, got, strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "c2").exists()  # nothing was encoded
    assert (tmp_path / "codes/a.json").exists() == with_words


def test_a_manifest_may_mix_audio_and_codes(audio_manifest: Path, tmp_path: Path) -> None:
    encode(audio_manifest, tmp_path / "codes")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        '{"path": "codes/a.npz", "duration": 3.0}\n{"path": "audio/b.flac", "duration": 1.99}\n'
    )
    wanted, got = windows(audio_manifest, tmp_path / "c1"), windows(mixed, tmp_path / "c2")
    assert all(torch.equal(one, other) for one, other in zip(wanted, got, strict=True))
    reader = RecordingReader(FakeSource(), tmp_path / "c3")
    assert [rows.shape for rows in reader.audio_codes(read_manifest(mixed)[0])] == [
        (4, 38),
        (4, 25),
    ]
    found = check_manifest(mixed, CLOCK, LetterTokenizer(), decode=True, codes_format=FORMAT)
    assert found.problems == found.warnings == []
    assert (found.recordings, found.text_tokens) == (2, 2 * len("hello"))
    assert found.duration_sec == pytest.approx(38 * 0.08 + 1.99)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("codec-2", "letters"), r"codec codec-1.* codec codec-2.*encode_manifest\.py"),
        (("codec-1", "words"), r"tokenizer letters.* tokenizer words.*encode_manifest\.py"),
    ],
)
def test_codes_of_another_codec_or_tokenizer_are_refused_by_name(
    audio_manifest: Path, tmp_path: Path, model: tuple[str, str], message: str
) -> None:
    encode(audio_manifest, tmp_path / "codes")
    manifest = tmp_path / "codes/manifest.jsonl"
    source: Any = FakeSource(model[0])
    source.tokenizer_fingerprint = model[1]
    reader = RecordingReader(source, tmp_path / "c")
    entries, _ = read_manifest(manifest)
    for read in (reader.audio_codes, reader.read):
        with pytest.raises(UserError, match=rf"(?s)2 problem.*line 1: .*a\.npz .*{message}"):
            read(entries)
    found = check_manifest(
        manifest, CLOCK, LetterTokenizer(), decode=False, codes_format=CodesFormat.of(source)
    )
    assert len(found.problems) == 2
    # without a model to compare with, the file itself is sound
    assert check_manifest(manifest, CLOCK, LetterTokenizer(), decode=False).problems == []


def text_codes(token: int) -> np.ndarray:
    return np.array([[token] * 38, *[[0] * 38] * 4], np.int16)


def audio_codes(code: int) -> np.ndarray:
    return np.array([*[[0] * 38] * 4, [code] * 38], np.int16)


def rewrite(path: Path, **changes: Any) -> None:
    with np.load(path) as file:
        content = {name: file[name] for name in file.files} | changes
    np.savez_compressed(path, **{name: v for name, v in content.items() if v is not None})


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda path: rewrite(path, codes=text_codes(32_000)),
            r"text token 32000 is.* -1\.\.31999",
        ),
        (Path.unlink, "does not exist"),
        (lambda path: path.write_bytes(b"not a zip"), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: rewrite(path, tokenizer=None), "lacks tokenizer"),
        (lambda path: rewrite(path, codes=np.zeros((5, 38))), r"float64 \[5, 38\]; the rule is"),
        (lambda path: rewrite(path, codes=np.zeros(38, np.int16)), r"int16 \[38\]"),
        (lambda path: rewrite(path, codes=np.zeros((5, 0), np.int16)), r"int16 \[5, 0\]"),
        (lambda path: rewrite(path, codes=np.zeros((17, 38), np.int16)), r"\[17, 38\].*\[5, steps"),
        (
            lambda path: rewrite(path, codes=np.full((5, 38), -2, np.int16)),
            "text token -2 is outside",
        ),
        (lambda path: rewrite(path, codes=audio_codes(2048)), r"code 2048 is.* -1\.\.2047"),
        (lambda path: rewrite(path, codes=np.zeros((5, 30), np.int16)), "lasts 2.400 s"),
    ],
)
def test_unusable_codes_are_refused_with_line_and_file(
    tmp_path: Path, spoil: Callable[[Path], None], complaint: str
) -> None:
    write_codes(tmp_path / "a.npz", torch.zeros(5, 38, dtype=torch.long), FORMAT, "x")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "a.npz", "duration": 3.0}\n')

    def check() -> list[str]:
        return check_manifest(
            manifest, CLOCK, LetterTokenizer(), decode=False, codes_format=FORMAT
        ).problems

    assert check() == []
    spoil(tmp_path / "a.npz")
    (problem,) = check()
    assert problem.startswith("line 1: ")
    assert "a.npz" in problem
    assert re.search(complaint, problem)


def test_a_codes_file_is_read_once_for_the_check_and_all_that_follows(
    audio_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(audio_manifest, tmp_path / "codes")
    opened: list[str] = []

    def count(path: Path, expected: CodesFormat | None) -> torch.Tensor:
        opened.append(path.name)
        return read_codes(path, expected)

    monkeypatch.setattr("moshi_ttt.data.recordings.read_codes", count)
    monkeypatch.setattr("moshi_ttt.data.manifest.read_codes", count)
    source: Any = FakeSource()
    for _ in range(2):
        read = read_recordings(source, tmp_path / "codes/manifest.jsonl", tmp_path / "c")
        assert sorted(opened) == ["a.npz", "b.npz"]
        assert torch.equal(read[0].codes, read_codes(tmp_path / "codes/a.npz", FORMAT))
        opened.clear()


def test_text_ids_beyond_the_audio_codebooks_are_kept(tmp_path: Path) -> None:
    codes = torch.zeros(5, 7, dtype=torch.long)
    codes[0] = 31_999  # moshi's text vocabulary has 32000
    write_codes(tmp_path / "a.npz", codes, FORMAT, "x")
    assert torch.equal(read_codes(tmp_path / "a.npz", FORMAT), codes)


def test_encoding_goes_on_where_it_stopped(
    audio_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "codes"
    assert len(encode(audio_manifest, out).encoded) == 4  # two files of two channels
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    # the cache would hide what is encoded again
    monkeypatch.setattr("moshi_ttt.data.cache.CodeCache.load", lambda self, path: None)
    (out / "a.npz").unlink()
    assert len(encode(audio_manifest, out).encoded) == 2
    assert (out / "b.npz").stat().st_mtime_ns == before["b.npz"]
    # other words are another text row, other sound other codes, another codec other codes
    write_words(audio_manifest.parent / "a.wav", [["bye", [0.0, 0.5], "SPEAKER_MAIN"]])
    write_audio(audio_manifest.parent / "b.flac", 1.99, seed=9)
    assert len(encode(audio_manifest, out).encoded) == 4
    assert read_codes(out / "a.npz", FORMAT)[0, :3].tolist() == [11, 34, 14]
    assert encode(audio_manifest, out).encoded == []
    other = FakeSource("codec-2")
    assert len(encode(audio_manifest, out, source=other).encoded) == 4


def test_as_many_recordings_as_fit_are_encoded(audio_manifest: Path, tmp_path: Path) -> None:
    lines = {}
    for seconds in (3.0, 4.9, 5.0):
        encode(audio_manifest, tmp_path / "codes", hours=seconds / 3600)
        text = (tmp_path / "codes/manifest.jsonl").read_text()
        lines[seconds] = [json.loads(line)["path"] for line in text.splitlines()]
    assert lines == {3.0: ["a.npz"], 4.9: ["a.npz"], 5.0: ["a.npz", "b.npz"]}
    with pytest.raises(UserError, match=r"--hours=0\.0005 is less than the first recording"):
        encode(audio_manifest, tmp_path / "codes", hours=0.0005)


def test_recordings_of_one_name_are_encoded_to_files_of_their_own(
    audio_manifest: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate(("sub/a.wav", "a.flac", "a-2.wav"), 7):
        write_audio(audio_manifest.parent / name, 1.0, seed=seed)
    # a recording that is listed twice is still one
    lines = [
        json.dumps({"path": name, "duration": 1.0})
        for name in ("sub/a.wav", "a.flac", "a-2.wav", "sub/a.wav")
    ]
    audio_manifest.write_text("\n".join([audio_manifest.read_text(), *lines]))
    out = tmp_path / "codes"
    assert len(encode(audio_manifest, out).encoded) == 2 * 5
    listed = [json.loads(line)["path"] for line in (out / "manifest.jsonl").open()]
    assert listed == ["a.npz", "b.npz", "a-2.npz", "a-3.npz", "a-2-2.npz", "a-2.npz"]
    wanted, got = (
        RecordingReader(FakeSource(), tmp_path / "c").read(read_manifest(manifest)[0])
        for manifest in (audio_manifest, out / "manifest.jsonl")
    )
    assert all(torch.equal(one.codes, two.codes) for one, two in zip(wanted, got, strict=True))


def test_an_unusable_manifest_is_not_encoded(
    program: Any, audio_manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(audio_manifest, tmp_path / "codes")
    with pytest.raises(UserError, match="holds the recordings themselves"):
        encode(tmp_path / "codes/manifest.jsonl", tmp_path / "codes")
    (audio_manifest.parent / "a.wav").unlink()
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: program.main([str(audio_manifest), str(tmp_path / "codes3")]))
    assert stop.value.code == 2
    assert "line 1: audio file" in capsys.readouterr().err
    assert not (tmp_path / "codes3").exists()


def test_the_program_encodes_with_the_bundled_model(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "audio/m.jsonl", {"a.wav": 1.0})
    out = tmp_path / "codes"
    args = [str(manifest), str(out), "--with-words", "--cache_dir", str(tmp_path / "cache")]
    program.main(args)
    assert "manifest.jsonl (0.00 MB of codes)" in capsys.readouterr().out
    line = json.loads((out / "manifest.jsonl").read_text())
    assert line == {"path": "a.npz", "duration": 1.04}
    assert (out / "a.json").read_bytes() == (tmp_path / "audio/a.json").read_bytes()
    checker = importlib.import_module("check_manifest")
    assert checker.main([str(out / "manifest.jsonl")]) == 0
    encoded = str(out / "manifest.jsonl")
    data = ConversationData(
        manifest=encoded, val_manifest=encoded, cache_dir=str(tmp_path / "unused")
    )
    data.prepare_data()
    data.setup("fit")
    (recording,) = data.val_recordings()
    (audio,) = RecordingReader(open_source("tiny"), tmp_path / "cache").read(
        read_manifest(manifest)[0]
    )
    assert torch.equal(recording.codes, audio.codes)
    assert not (tmp_path / "unused").exists()
    rewrite(out / "a.npz", codec=np.array("other"))
    assert checker.main([str(out / "manifest.jsonl")]) == 1
    assert "made with codec other" in capsys.readouterr().out
