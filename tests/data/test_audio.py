"""Sound that reads and yet cannot be what was meant: refused, or warned about."""

from __future__ import annotations

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
