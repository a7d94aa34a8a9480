"""Progress where no one sees a bar move."""

from __future__ import annotations

import time

import pytest
from tqdm import tqdm

from moshi_ttt.progress import AS_LINES


def test_each_time_is_a_line_and_short_work_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in tqdm(range(3), desc="short", **AS_LINES):
        pass
    assert capsys.readouterr().err == ""
    often = AS_LINES | {"mininterval": 0.0, "delay": 1e-9}
    for _ in tqdm(range(3), desc="long", leave=False, **often):
        time.sleep(0.001)
    lines = capsys.readouterr().err.split("\n")
    assert [line.split("|")[0] for line in lines] == ["long:  33%", "long:  67%", "long: 100%", ""]
