"""Thresholds from real speech, and how often they err."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from moshi_ttt.data import EncodedRecording
from moshi_ttt.diagnosis.monitor import THRESHOLDS
from moshi_ttt.errors import UserError

script: Any = importlib.import_module("measure_alarms")


def speech(count: int, windows: int = 72) -> list[dict[str, np.ndarray]]:
    """Measures of recordings, 10 to the hour, with exponential tails; nothing is clipped."""
    generator = np.random.default_rng(0)
    return [
        {name: generator.exponential(size=windows) * (name != "clipping") for name in THRESHOLDS}
        for _ in range(count)
    ]


def test_thresholds_are_passed_as_often_as_wanted() -> None:
    found = script.thresholds(speech(400), 1.0)
    assert found.pop("clipping") == script.LEAST
    # of 720 windows an hour, one in eight hours: a share of exp(-8.66)
    assert list(found.values()) == pytest.approx([np.log(8 * 720)] * 7, rel=0.1)
    often = script.thresholds(speech(400), 10.0)
    assert all(often[name] < threshold for name, threshold in found.items())


def test_a_recording_is_judged_by_the_thresholds_of_the_others() -> None:
    recordings = speech(20)
    recordings[3]["noise"][[5, 6, 9]] = 100.0
    lines = script.table(recordings, 0.1)
    assert len(lines) == 2 + len(THRESHOLDS) + 1
    # two of the three windows are neighbours
    (noise,) = (line for line in lines if "`noise`" in line)
    assert noise.endswith("| 2 |")
    count = sum(int(line.split("|")[-2]) for line in lines[2:-1])
    assert lines[-1].startswith(f"{count} false alarms in 2.00 h of 20 recordings, each with")
    assert lines[-1].endswith("; 0.1 wanted.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--model SOURCE or --checkpoint"),
        (["--model", "tiny", "--checkpoint", "x.ckpt"], "--model SOURCE or --checkpoint"),
        (["--model", "tiny", "--per_hour", "0"], "--per_hour=0.*above 0"),
    ],
)
def test_impossible_settings_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script.main(args)


def test_it_takes_three_recordings_with_sound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = torch.randint(4, 500, (17, 130), generator=torch.Generator().manual_seed(0))
    text_alone = torch.cat([codes[:1], torch.full((16, 130), -1)])
    recordings = [EncodedRecording(name, codes) for name in "abc"]
    given = [*recordings[:2], EncodedRecording("text", text_alone)]
    monkeypatch.setattr(script, "read_recordings", lambda *_: given)
    with pytest.raises(UserError, match=r"holds 2 recordings with sound.*3 or more"):
        script.main(["--model", "tiny", "--device", "cpu"])
    given.append(recordings[2])
    script.main(["--model", "tiny", "--device", "cpu"])
    assert "of 3 recordings" in capsys.readouterr().out
