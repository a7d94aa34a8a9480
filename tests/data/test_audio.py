"""Sound that reads and yet cannot be what was meant: refused, or warned about."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from data_fakes import CLOCK, FakeSource, LetterTokenizer, write_manifest

from moshi_ttt.data import ManifestCheck, RecordingReader, check_manifest, read_manifest
from moshi_ttt.errors import UserError

SECONDS = 2.0
Change = Callable[[np.ndarray], None]


def click(samples: np.ndarray) -> None:
    samples[700, 0] = 1e20


def as_integers(samples: np.ndarray) -> None:
    samples *= 2**15


def copy_left(samples: np.ndarray) -> None:
    samples[:, 1] = samples[:, 0]


def mute_left(samples: np.ndarray) -> None:
    samples[:, 0] = 0


def mute_right(samples: np.ndarray) -> None:
    samples[:, 1] = 0


def boost(samples: np.ndarray) -> None:
    samples *= 4


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "m.jsonl", {"a.wav": SECONDS})


def spoil(manifest: Path, change: Change) -> None:
    samples, rate = soundfile.read(manifest.parent / "a.wav")
    change(samples)
    soundfile.write(manifest.parent / "a.wav", samples, rate, subtype="FLOAT")


def check(manifest: Path) -> ManifestCheck:
    return check_manifest(manifest, CLOCK, LetterTokenizer(), decode=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (click, r"1 of 96000 samples are beyond 4, the loudest is 1e\+20"),
        (as_integers, r"the loudest is 1\d{4}.*16 bits: 32768"),
    ],
)
def test_sound_far_beyond_full_scale_is_refused_before_it_is_encoded(
    manifest: Path, tmp_path: Path, change: Change, complaint: str
) -> None:
    spoil(manifest, change)
    with pytest.raises(UserError, match=rf"line 1: .*a\.wav: .*{complaint}"):
        check(manifest).raise_problems()
    with pytest.raises(UserError, match=rf"line 1: .*a\.wav: .*{complaint}"):
        RecordingReader(FakeSource(), tmp_path / "cache").audio_codes(read_manifest(manifest)[0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (copy_left, "both channels are the same"),
        (mute_left, "1 of 1 words of Moshi lie where the left channel is silent"),
    ],
)
def test_channels_that_cannot_be_the_two_speakers_are_warned_about(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Change, complaint: str
) -> None:
    spoil(manifest, change)
    found = check(manifest)
    assert found.problems == []
    (warning,) = found.warnings
    assert "line 1: " in warning
    assert complaint in warning
    RecordingReader(FakeSource(), tmp_path / "cache").audio_codes(read_manifest(manifest)[0])
    assert warning in caplog.text


@pytest.mark.parametrize("change", [mute_right, boost])
def test_a_silent_user_and_a_hot_mix_are_nothing_to_speak_of(
    manifest: Path, change: Change
) -> None:
    spoil(manifest, change)
    found = check(manifest)
    assert found.problems == found.warnings == []


def claim_in_flac(path: Path, *, rate: int | None = None, samples: int | None = None) -> None:
    """Write another rate or length into the header of a FLAC file."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[18:26], "big")  # 20 bits rate, 8 others, 36 bits length
    if rate is not None:
        header = header & ((1 << 44) - 1) | rate << 44
    if samples is not None:
        header = header & ~((1 << 36) - 1) | samples
    content[18:26] = header.to_bytes(8, "big")
    path.write_bytes(content)


def claim_in_wav(path: Path, *, rate: int | None = None, data_bytes: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    if rate is not None:
        content[24:28] = rate.to_bytes(4, "little")
    if data_bytes is not None:
        place = content.index(b"data") + 4
        content[place : place + 4] = data_bytes.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "claim", "complaint"),
    [
        ("a.flac", {"samples": 2**36 - 1}, "claims 68719476735 samples a channel, the most is"),
        ("a.flac", {"samples": 0}, "claims 9223372036854775807 samples"),  # length unknown
        ("a.flac", {"samples": 2**29}, "damaged|cut short"),
        ("a.flac", {"samples": 40_000}, "lasts 1.667 s"),
        ("a.flac", {"rate": 655_350}, "claims 655350 samples a second"),
        ("a.wav", {"rate": 1}, "claims 1 samples a second"),
        ("a.wav", {"rate": 1_999_999_973}, "claims 1999999973 samples a second"),
        ("a.wav", {"rate": 2**32 - 1}, "not readable audio"),
        ("a.wav", {"data_bytes": 1000}, "lasts 0.010 s"),
        ("a.wav", {"data_bytes": 0}, "holds no samples"),
    ],
)
def test_headers_that_lie_are_refused_before_memory_is_taken(
    tmp_path: Path, name: str, claim: dict[str, int], complaint: str
) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {name: SECONDS})
    assert check(manifest).problems == []
    (claim_in_flac if name == "a.flac" else claim_in_wav)(tmp_path / name, **claim)
    (problem,) = check(manifest).problems
    assert problem.startswith("line 1: ")
    assert name in problem
    assert re.search(complaint, problem)


def test_a_stream_without_a_length_is_read_to_its_end(manifest: Path) -> None:
    claim_in_wav(manifest.parent / "a.wav", data_bytes=2**32 - 1)
    assert check(manifest).problems == []


def test_sound_without_a_header_is_refused(manifest: Path) -> None:
    (manifest.parent / "a.raw").write_bytes(bytes(1000))
    manifest.write_text(manifest.read_text().replace("a.wav", "a.raw"))
    (problem,) = check(manifest).problems
    assert "a.raw is not readable audio" in problem
