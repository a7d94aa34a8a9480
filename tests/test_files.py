"""Files that cannot be read or written are one clear line, whatever they are."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from data_fakes import CLOCK, FakeSource, LetterTokenizer, write_manifest

from moshi_ttt.data import ManifestCheck, RecordingReader, check_manifest, read_manifest
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import clear_litter, why_unreadable, write_atomic, write_bytes

SECONDS = 1.0


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "m.jsonl", {"a.wav": SECONDS})


def check(manifest: Path) -> ManifestCheck:
    return check_manifest(manifest, CLOCK, LetterTokenizer(), decode=True)


def list_only(manifest: Path, name: str) -> None:
    manifest.write_text(json.dumps({"path": name, "duration": SECONDS}))


@pytest.mark.parametrize("name", ["a.wav", "a.json", "a.npz"])
@pytest.mark.parametrize(
    ("make", "complaint"), [(os.mkfifo, "a pipe or a device"), (os.mkdir, "a folder")]
)
@pytest.mark.timeout(20)
def test_pipes_and_folders_are_refused_without_waiting(
    manifest: Path, name: str, make: object, complaint: str
) -> None:
    (manifest.parent / name).unlink(missing_ok=True)
    assert callable(make)
    make(manifest.parent / name)
    if name == "a.npz":
        list_only(manifest, name)
    (problem,) = check(manifest).problems
    assert name in problem
    assert f"cannot be read (it is {complaint})" in problem


@pytest.mark.timeout(20)
def test_a_manifest_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.jsonl")
    for path, what in ((tmp_path, "a folder"), (tmp_path / "m.jsonl", "a pipe")):
        with pytest.raises(UserError, match=rf"manifest .* cannot be read \(it is {what}"):
            read_manifest(path)


def test_no_permission_is_a_reason(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # the tests may run as root, who may do everything
    monkeypatch.setattr(Path, "stat", refuse)
    assert why_unreadable(manifest) == "Permission denied"


@pytest.mark.parametrize("name", ["x" * 300 + ".wav", "a\0.wav", "a.wav/b.wav"])
def test_names_that_no_file_can_have_are_problems(manifest: Path, name: str) -> None:
    list_only(manifest, name)
    (problem,) = check(manifest).problems
    assert problem.startswith("line 1: audio file")


def test_the_longest_name_is_a_name(manifest: Path) -> None:
    name = "x" * 251 + ".wav"
    (manifest.parent / "a.wav").rename(manifest.parent / name)
    list_only(manifest, name)
    assert check(manifest).problems == []  # its .json has a name too long to exist
    write_bytes(manifest.parent / name, b"written")


@pytest.mark.parametrize(("listed", "form"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_found_in_either_normal_form(manifest: Path, listed: str, form: str) -> None:
    def name(form: str) -> str:
        return unicodedata.normalize(form, "caf\u00e9")  # type: ignore[arg-type]

    for suffix in (".wav", ".json"):
        (manifest.parent / f"a{suffix}").rename(manifest.parent / f"{name(form)}{suffix}")
    list_only(manifest, f"{name(listed)}.wav")
    found = check(manifest)
    assert (found.problems, found.words) == ([], 1)
    assert "does not exist" in found.warnings[0]
    assert found.warnings[0].endswith("was taken")


def test_windows_separators_are_found(manifest: Path) -> None:
    (manifest.parent / "sub").mkdir()
    for name in ("a.wav", "a.json"):
        (manifest.parent / name).rename(manifest.parent / "sub" / name)
    list_only(manifest, "sub\\a.wav")
    found = check(manifest)
    assert (found.problems, found.words) == ([], 1)
    assert found.warnings[0].endswith("sub/a.wav was taken")


def test_a_full_disk_and_a_cache_that_is_no_folder_are_one_line(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, _ = read_manifest(manifest)
    with pytest.raises(UserError, match=r"m\.jsonl/.* cannot be written \(.*another folder"):
        RecordingReader(FakeSource(), manifest).audio_codes(entries)

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"cache/.* cannot be written \(No space left"):
        RecordingReader(FakeSource(), tmp_path / "cache").audio_codes(entries)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_terminal_that_cannot_print_a_name_prints_it_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def program() -> None:
        print("reading caf\u00e9.wav")
        raise UserError("caf\u00e9\udce9.wav is missing")

    with pytest.raises(SystemExit) as stop:
        run_program(program)
    assert stop.value.code == 2
    for stream, text in (
        (out, b"reading caf\\xe9.wav\n"),
        (err, b"error: caf\\xe9\\udce9.wav is missing\n"),
    ):
        stream.flush()
        assert stream.buffer.getvalue() == text  # type: ignore[attr-defined]


def test_a_recording_that_went_away_is_named(manifest: Path, tmp_path: Path) -> None:
    entries, _ = read_manifest(manifest)
    (manifest.parent / "a.wav").unlink()
    with pytest.raises(UserError, match=r"audio file .*a\.wav cannot be read \(it does not exist"):
        RecordingReader(FakeSource(), tmp_path / "cache").audio_codes(entries)


def test_litter_is_what_nobody_writes_any_more(tmp_path: Path) -> None:
    litter = tmp_path / "below/.half.abc.tmp"
    litter.parent.mkdir()
    litter.write_text("half")
    clear_litter(tmp_path, below=False)
    assert litter.exists()

    def write(file: IO[bytes]) -> None:
        file.write(b"whole")
        clear_litter(tmp_path)
        assert not litter.exists()

    write_atomic(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "below"}


def test_a_file_that_is_taken_for_litter_at_birth_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkstemp, list[str]()

    def made_and_cleared(**settings: Any) -> tuple[int, str]:
        handle, name = make(**settings)
        made.append(name)
        if len(made) == 1:
            clear_litter(tmp_path)
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", made_and_cleared)
    write_bytes(tmp_path / "a", b"whole")
    assert (len(made), (tmp_path / "a").read_bytes()) == (2, b"whole")


class Broken(io.BytesIO):
    """A file that takes some of what is written to it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def write(self, data: Any, /) -> int:
        if self.tell() > 1000:
            raise self._error
        return super().write(data)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt("a signal"), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
    ],
)
def test_what_breaks_a_checkpoint_off_is_what_is_said(
    tmp_path: Path, error: BaseException, raised: type[BaseException]
) -> None:
    checkpoint = {name: torch.zeros(1000) for name in "abc"}
    with pytest.raises(raised, match=r"a signal|cannot be written \(No space left"):
        write_atomic(tmp_path / "last.ckpt", lambda _: torch.save(checkpoint, Broken(error)))
    assert not list(tmp_path.iterdir())
