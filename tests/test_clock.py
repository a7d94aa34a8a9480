"""Lengths as people write them."""

from __future__ import annotations

import pytest

from moshi_ttt.clock import Clock
from moshi_ttt.errors import SettingError


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        (100, 100),
        ("100", 100),
        ("100 steps", 100),
        ("8s", 100),
        ("8 sec", 100),
        ("0.1s", 2),
        ("800tokens", 100),
        ("801 tokens", 101),
        (0, 0),
        ("0s", 0),
    ],
)
def test_an_interval_is_in_steps_seconds_or_legacy_tokens(written: int | str, steps: int) -> None:
    assert Clock().interval("log_interval", written) == steps


@pytest.mark.parametrize("written", [-1, "", "s", "8m", "1e3", "1.", "8 s s", "tokens"])
def test_any_other_interval_is_refused_with_what_to_write(written: int | str) -> None:
    with pytest.raises(SettingError, match=r"key=.*use e\.g\. 100, 8s or 800tokens"):
        Clock().interval("key", written)
