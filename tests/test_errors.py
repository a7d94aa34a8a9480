"""Settings are held against their bounds, and called what the user calls them."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from moshi_ttt.errors import SettingError, UserError, check_bounds, settings_at


@pytest.mark.parametrize(
    ("value", "bounds", "rule"),
    [
        (0, {"least": 1}, "must be at least 1"),
        (0.0, {"above": 0}, "must be above 0"),
        (math.nan, {"above": 0}, "must be above 0"),
        (1.5, {"least": 0, "most": 1}, "must be at least 0 and at most 1"),
        (1.0, {"least": 0, "below": 1}, "must be at least 0 and below 1"),
        (1, {"least": 2, "remedy": "use null"}, "must be at least 2; use null"),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_value_and_rule(
    value: float, bounds: dict[str, Any], rule: str
) -> None:
    with pytest.raises(SettingError) as error:
        check_bounds("key", value, **bounds)
    assert str(error.value) == f"key={value} {rule}"


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(1, {"least": 1}), (None, {"least": 1}), (1.0, {"least": 0, "most": 1}), (0.1, {"above": 0})],
)
def test_a_number_within_its_bounds_passes(value: float | None, bounds: dict[str, Any]) -> None:
    check_bounds("key", value, **bounds)


def test_holders_of_settings_say_where_they_stand() -> None:
    with pytest.raises(UserError) as error, settings_at("model"), settings_at("memory"):
        check_bounds("heads", 0, least=1)
    assert str(error.value) == "model.memory.heads=0 must be at least 1"
    with pytest.raises(UserError) as error, settings_at("run", seconds="--seconds"):
        check_bounds("seconds", 0, above=0)
    assert str(error.value) == "--seconds=0 must be above 0"
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)


def test_other_mistakes_pass_through_as_they_are() -> None:
    with pytest.raises(UserError, match=r"^a\.wav is missing$"), settings_at("data"):
        raise UserError("a.wav is missing")
