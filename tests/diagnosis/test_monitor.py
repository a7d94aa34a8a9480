"""Damage of every kind, done to real speech, is flagged for what it is, and real speech is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from moshi.models.lm import LMModel

from moshi_ttt.clock import Clock
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.data.codes_file import CodesFormat, read_codes
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.diagnosis.monitor import THRESHOLDS, Speech, flag, runs, windows
from moshi_ttt.evaluation.talk import speech_of
from moshi_ttt.files import plain
from moshi_ttt.model.source import open_source

CLOCK, PADDING, CARDINALITY = Clock(), (3, 0), 512
STEPS, DAMAGED, SAMPLES = 400, 189, 1920  # the first half is what surprise is compared with
LOOPED = 73  # steps after `DAMAGED`, where Moshi begins to speak
Damage = Callable[[np.ndarray, np.ndarray], None]
"""Changes codes [17, n] and sound [2, samples] of what comes after `DAMAGED`, in place."""


@pytest.fixture(scope="module")
def real() -> tuple[LMModel, np.ndarray, np.ndarray]:
    """The tiny Moshi, codes of held-out speech and its sound."""
    source = open_source("tiny")
    path = bundled_held_out(source).parent / "heldout-00000.npz"
    codes = read_codes(path, CodesFormat.of(source))[:, :STEPS].numpy()
    return source.lm(), codes, decode(source.codec(), np.stack([codes[1:9], codes[9:]]))


def reasons(speech: Speech) -> set[str]:
    found = flag([speech.measures(CLOCK, PADDING, CARDINALITY)], CLOCK, 0, len(speech.text_nll))
    assert all(one["stop_step"] > DAMAGED for one in found["segments"])
    return {one["reason"] for one in found["segments"]}


def silence(codes: np.ndarray, sound: np.ndarray) -> None:
    sound[:] = 0


def loop(codes: np.ndarray, sound: np.ndarray) -> None:
    again = LOOPED + np.arange(codes.shape[1]) % 45
    codes[:9] = codes[:9, again]
    steps = sound[0].reshape(-1, SAMPLES)
    steps[:] = steps[again]


def noise(codes: np.ndarray, sound: np.ndarray) -> None:
    sound[0] += 0.1 * np.random.default_rng(0).normal(size=sound.shape[1])


def clipping(codes: np.ndarray, sound: np.ndarray) -> None:
    sound[0] = (30 * sound[0]).clip(-1, 1)


def collapse(codes: np.ndarray, sound: np.ndarray) -> None:
    codes[1:9] %= 8


def babble(codes: np.ndarray, sound: np.ndarray) -> None:
    codes[1:9] = np.random.default_rng(0).integers(0, CARDINALITY, size=codes[1:9].shape)


def another_text(codes: np.ndarray, sound: np.ndarray) -> None:
    codes[0] = np.roll(codes[0], 70)


def word_salad(codes: np.ndarray, sound: np.ndarray) -> None:
    said = ~np.isin(codes[0], PADDING)
    codes[0, said] = np.random.default_rng(0).integers(4, 900, size=said.sum())


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (None, set()),
        (silence, {"silence"}),
        (loop, {"text_loop", "sound_loop"}),
        (noise, {"noise"}),
        (clipping, {"clipping"}),
        (collapse, {"code_collapse"}),
        (babble, {"sound_surprise"}),
        (another_text, {"sound_surprise"}),
        (word_salad, {"text_surprise"}),
    ],
)
def test_damage_is_flagged_for_what_it_is(
    real: tuple[LMModel, np.ndarray, np.ndarray], damage: Damage | None, found: set[str]
) -> None:
    lm, codes, sound = real[0], real[1].copy(), real[2].copy()
    if damage is not None:
        damage(codes[:, DAMAGED:], sound[:, DAMAGED * SAMPLES :])
    seen = reasons(speech_of(lm, torch.from_numpy(codes), sound))
    assert found <= seen if damage else not seen


def made_up(steps: int, **changes: Any) -> Speech:
    """Words and codes that never come again, and no sound."""
    parts: dict[str, Any] = {
        "text_tokens": np.arange(steps) + 4,
        "codes": np.arange(8 * steps).reshape(8, steps) % CARDINALITY,
        "text_nll": np.ones(steps),
        "sound_nll": np.ones(steps),
        "sound": None,
    }
    return Speech(**parts | changes)


def flagged(*speech: Speech, first: int = 0) -> dict[str, Any]:
    measures = [one.measures(CLOCK, PADDING, CARDINALITY, first) for one in speech]
    return flag(measures, CLOCK, first, len(speech[0].text_tokens))


def test_windows_lie_side_by_side_and_only_the_last_may_be_short() -> None:
    assert windows(10, 33, 10) == [slice(10, 20), slice(20, 30)]
    assert windows(10, 35, 10) == [slice(10, 20), slice(20, 30), slice(30, 35)]
    assert windows(0, 4, 10) == windows(5, 5, 10) == []
    assert [*runs(np.array([True, False, True, True]))] == [(0, 1), (2, 4)]


def test_what_has_no_sound_is_judged_by_its_words_alone() -> None:
    steps = 4 * 63
    nll = np.r_[np.ones(126), np.full(126, 9.0)]
    found = flagged(made_up(steps, text_nll=nll), made_up(steps))
    (segment,) = found["segments"]
    assert segment == {
        "stream": 0,
        "reason": "text_surprise",
        "step": 126,
        "stop_step": steps,
        "seconds": 10.08,
        "end_sec": 20.16,
        "legacy_token": 1008,
        "worst": 8.0,
    }
    # two windows of each stream are judged by it, and four by all
    assert found["shares"]["text_surprise"] == 0.5
    assert found["shares"]["any"] == 0.25
    assert found["shares"]["text_loop"] == 0
    assert np.isnan([found["shares"][name] for name in ("silence", "noise", "clipping")]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 30, 40, 100, 126])
def test_what_cannot_be_measured_is_undefined_and_never_flagged(steps: int) -> None:
    unknown = np.full(steps, np.nan)
    quiet = np.zeros((2, steps * SAMPLES), dtype=np.float32)
    still = made_up(
        steps, text_tokens=np.full(steps, 3), text_nll=unknown, sound_nll=unknown, sound=quiet
    )
    found = flagged(still)
    measured = {name for name, share in found["shares"].items() if share == share}
    assert measured == ({"any", "silence", "clipping"} if steps > 31 else set())
    assert {one["reason"] for one in found["segments"]} == ({"silence"} if steps > 53 else set())
    assert json.loads(json.dumps(plain(found), allow_nan=False))["thresholds"] == THRESHOLDS


def test_the_prompt_is_remembered_and_not_judged() -> None:
    said = np.arange(63) + 4
    found = flagged(made_up(189, text_tokens=np.r_[said, said, said]), first=63)
    (segment,) = found["segments"]
    assert (segment["reason"], segment["step"], segment["stop_step"]) == ("text_loop", 126, 189)
    assert found["shares"]["text_loop"] == 0.5
