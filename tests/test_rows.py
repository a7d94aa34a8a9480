"""Rows of codes: whose they are, and that every model's are told apart alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moshi_ttt.model.source import open_source
from moshi_ttt.rows import AUDIO_ROWS, GROUPS, TEXT_ROW, Rows


@pytest.mark.parametrize("rows", [Rows(8, 8), Rows(2, 3), Rows(1, 0)])
def test_text_own_and_user_part_the_rows_without_gap_or_overlap(rows: Rows) -> None:
    numbers = range(rows.count)
    assert [*numbers[rows.text], *numbers[rows.own], *numbers[rows.user]] == list(numbers)
    assert list(numbers[rows.text]) == [TEXT_ROW]
    assert numbers[AUDIO_ROWS] == range(1, rows.count)


@pytest.mark.parametrize("rows", [Rows(8, 8), Rows(1, 1)])
def test_groups_of_losses_together_are_what_moshi_speaks(rows: Rows) -> None:
    numbers = range(rows.count)
    assert tuple(rows.groups) == GROUPS
    spoken = [row for group in rows.groups.values() for row in numbers[group]]
    assert spoken == list(numbers[rows.spoken])


def test_moshis_rows_are_one_and_eight_and_eight() -> None:
    assert Rows.of(SimpleNamespace(n_q=16, dep_q=8)) == Rows(8, 8)
    assert Rows.of(open_source("tiny")).count == 17
    assert Rows(8, 8).own == slice(1, 9)
    assert Rows(8, 8).user == slice(9, 17)
