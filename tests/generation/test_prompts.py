"""Where generations start, and the streams that start there."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError
from moshi_ttt.generation.prompts import choose_prompts, seeded_batch
from moshi_ttt.rows import Rows

ROWS = Rows(own_codebooks=8, user_codebooks=8)


def recording(name: str, steps: int) -> EncodedRecording:
    generator = torch.Generator().manual_seed(len(name))
    return EncodedRecording(name, torch.randint(0, 512, (17, steps), generator=generator))


def test_prompts_go_round_the_recordings_and_then_along_them() -> None:
    long, short = recording("long", 110), recording("short", 60)
    starts = choose_prompts([long, recording("tiny", 5), short], 4, prompt_steps=10, steps=40)
    assert [(one.name, start) for one, start in starts] == [
        ("long", 0),
        ("short", 0),
        ("long", 50),
        ("short", 25),
    ]
    with pytest.raises(UserError, match=r"no held-out recording.*prompt_sec"):
        choose_prompts([short], 1, prompt_steps=61, steps=100)
    assert choose_prompts([short], 2, prompt_steps=60, steps=100) == [(short, 0)] * 2


def test_recordings_that_last_as_long_as_the_generation_come_first() -> None:
    short, long, other = recording("short", 60), recording("long", 110), recording("other", 100)
    starts = choose_prompts([short, long, other], 3, prompt_steps=10, steps=100)
    assert [one.name for one, _ in starts] == ["long", "other", "short"]


def test_streams_are_every_start_with_every_seed() -> None:
    starts = [(recording("a", 30), 5), (recording("bb", 12), 0)]
    starts[1][0].codes[9, 3] = -1
    silence = torch.full((8, 1), 7)
    batch = seeded_batch(starts, silence, Clock(), steps=20, prompt_steps=4, seeds=3, rows=ROWS)
    assert batch.prompt.shape == (6, 17, 4)
    assert (batch.prompt[:3] == starts[0][0].codes[:, 5:9]).all()
    assert (batch.user[:3] == starts[0][0].codes[9:, 5:25]).all()
    # what nobody knows is silence, in a recording and after it
    assert (batch.user[3:, :, 12:] == 7).all()
    assert (batch.user[3:, 0, 3] == 7).all()
    assert batch.names == [
        f"{name} from 0 s, seed {seed}" for name in ("a", "bb") for seed in (0, 1, 2)
    ]


def test_text_can_be_told_to_the_end_of_a_recording_and_sound_is_free() -> None:
    one = recording("a", 30)
    silence = torch.full((8, 1), 7)
    batch = seeded_batch(
        [(one, 5)], silence, Clock(), steps=28, prompt_steps=4, seeds=1, rows=ROWS, told_text=True
    )
    assert (batch.prompt[0, :, :4] == one.codes[:, 5:9]).all()
    assert (batch.prompt[0, 0, :25] == one.codes[0, 5:]).all()
    assert (batch.prompt[0, 0, 25:] == -1).all()
    assert (batch.prompt[0, 1:, 4:] == -1).all()
