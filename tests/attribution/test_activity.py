"""Who speaks when."""

from __future__ import annotations

import numpy as np

from moshi_ttt.attribution.activity import moshi_speaks, user_speaks


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
