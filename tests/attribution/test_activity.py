"""Who speaks when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_trace import noise
from worlds import STEPS, WORLDS, nothing, talked_over, turns, verdict, world

from moshi_ttt.attribution.activity import coupling, moshi_speaks, user_speaks


def test_moshi_speaks_between_its_words_and_not_long_after_them() -> None:
    text = np.full((1, 80), 3)
    text[0, 20:50:4] = 17  # a word every third of a second
    text[0, 50:] = 0
    speaks = moshi_speaks(text, (3, 0))[0]
    assert speaks.shape == (80,)
    assert (speaks[22:46] > 0.15).all()
    assert (speaks[:12] == 0).all()
    assert (speaks[60:] == 0).all()


def test_a_user_speaks_where_there_is_sound() -> None:
    sound = np.random.default_rng(0).normal(size=(2, 40 * 96)) * 1e-4
    sound[1, 10 * 96 : 30 * 96] *= 1000
    speaks = user_speaks(sound, 96)
    assert speaks.shape == (2, 40)
    assert (speaks[0] == 0).all()
    assert (speaks[1, 13:27] == 1).all()
    assert (speaks[1, :7] == 0).all()


@pytest.mark.parametrize("name", ["eviction", "lineage", "drift", "memory"])
def test_what_follows_who_speaks_hides_nothing(name: str) -> None:
    rise, true, _ = WORLDS[name]
    cells = talked_over(world(rise, seed=1), seed=2)
    result = verdict(cells)
    assert result.supported == [true], result.text()
    unknown = verdict([replace(cell, speaking=None) for cell in cells])
    assert unknown.decision(true) == "undecided" or name in ("drift", "memory")


def test_how_the_norm_follows_is_not_learned_from_a_change_that_stays() -> None:
    generator = np.random.default_rng(0)
    speaking = turns(generator, (9, 2, STEPS))
    speaking[:, 0, 350:] = 1.0  # from the jump on, Moshi never stops
    jump = 0.4 * (np.arange(STEPS) >= 350)
    log_norm = -0.7 * speaking[:, 0] + 0.2 * speaking[:, 1] + jump
    log_norm += noise(generator, (9, 1, STEPS), sd=0.06)[:, 0]
    np.testing.assert_allclose(coupling(log_norm, speaking), [-0.7, 0.2], atol=0.08)
    np.testing.assert_array_equal(coupling(log_norm, np.ones_like(speaking)), [0, 0])


def test_a_model_that_only_falls_silent_has_no_jump() -> None:
    cells = talked_over(world(nothing, seed=3), seed=4)
    quiet = []
    for cell in cells:
        speaking = cell.speaking.copy()
        speaking[:, 0, 400:] = 0.0
        more = 0.7 * (cell.speaking[:, :1] - speaking[:, :1])
        quiet.append(replace(cell, log_norm=cell.log_norm + more, speaking=speaking))
    result = verdict(quiet)
    assert result.change == "none", result.text()
    assert "follows who speaks" in result.text()
    heard = verdict([replace(cell, speaking=None) for cell in quiet])
    assert heard.change != "none", "or there was nothing to be taken out"
